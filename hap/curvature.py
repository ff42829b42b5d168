"""The diagonal of the loss Hessian, weight by weight: `exact` in closed form, `hutchinson` by random probes.

For a loss whose Hessian in the outputs is sum_c s_c s_c^T, the generalised Gauss-Newton matrix has the diagonal
sum_c (d (s_c . f) / dw)^2 [Schraudolph02]: one backward pass a column c, with per-sample gradients squared. Where the
network is piecewise linear in each single weight, that *is* the diagonal of the Hessian. This file knows layers and
losses; of groups it knows only how to sum over them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_map

from hap import HapError
from hap.groups import Groups
from hap.losses import CrossEntropy, Loss, SquaredError
from hap.persample import Squares, squared_gradients
from hap.taps import evaluating, is_mixing

PIECEWISE_LINEAR = frozenset(
    "AccumulateGrad T Transpose Permute View ReshapeAlias UnsafeView Relu Hardtanh LeakyRelu "
    "Threshold MaxPool2DWithIndices MaxPool1D AvgPool2D AdaptiveAvgPool2D Mean Add Sub Sum Cat Slice Select Neg "
    "ConstantPadNd NativeBatchNorm CudnnBatchNorm Squeeze Unsqueeze Clone IndexSelect Index AsStrided Expand Split "
    "SplitWithSizes Alias ToCopy".split()
)
# linear as long as only one factor is more than a parameter
BILINEAR = frozenset({"Convolution", "Addmm", "Mm", "Mul", "Div", "Bmm"})


@dataclass(frozen=True)
class Curvature:
    """A diagonal by parameter name, with what it is, how sure it is and what it cost."""

    diagonal: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor]  # of it; 0 where nothing was drawn, an upper bound where one column was
    kind: str  # "exact Hessian diagonal", "Gauss-Newton diagonal" or "Hutchinson estimate"
    trace: Float[Tensor, "groups"] | None = None  # summed over each group, when groups were given
    trace_stderr: Float[Tensor, "groups"] | None = None
    drawn: float = 0.0  # share of the whole trace that was drawn at random
    samples: int = 0
    forwards: int = 0  # passes over each sample; one backward costs about two forwards
    backwards: int = 0


def exact(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    groups: Groups | None = None,
    *,
    columns: int | None = None,
    rng: torch.Generator | None = None,
    chunk: int = 64,
) -> Curvature:
    """The diagonal for the weights of all convolutions and linear layers, without a probe.

    `columns`: None for the whole sum over classes; k for the k likeliest classes of each sample and one drawn from
    the rest by `rng`. `chunk`: samples in one pass. The model runs in eval mode and is left as it was found.
    """
    tally = _Tally(groups)
    with _ready(model) as layers:
        for inputs, targets in _chunks(batches, chunk):
            outputs, seen = _forward(model, loss, inputs, layers)
            if outputs.dim() != 2:
                raise HapError(f"curvature: outputs [batch, classes] expected, found shape {tuple(outputs.shape)}")
            vectors = loss.columns(outputs.detach(), targets, columns, rng)
            tally.begin(targets, float(loss.mass(targets)), len(vectors), piecewise_linear(outputs))
            edges = [edge for _, edge in seen.values()]
            grads = [torch.autograd.grad(outputs, edges, v, retain_graph=True) for v in vectors]
            sampled = columns is not None and len(vectors) == columns + 1 < outputs.shape[1]
            for (name, (x, _)), column in zip(seen.items(), zip(*grads, strict=True), strict=True):
                if len(x) != len(targets):
                    raise HapError(f"curvature: {name} reads {len(x)} samples where the batch has {len(targets)}")
                tally.add(name, squared_gradients(layers[name], x, torch.stack(column)), sampled)
            tally.end()
    return tally.result()


def hutchinson(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    groups: Groups | None = None,
    *,
    probes: int,
    rng: torch.Generator,
) -> Curvature:
    """The mean of v * Hv over Rademacher probes v, with its standard error over them [Hutchinson90].

    Each probe touches all weights at once, so the estimate of one weight carries the noise of all others. H is that
    of each batch; batches are averaged by their mass, and memory does not grow with their number or the probes'.
    """
    if probes < 2:
        raise HapError(f"hutchinson: at least 2 probes expected, for a standard error needs them, found {probes}")
    weights: list[_Moments] = []
    traces: list[_Moments] = []
    masses, samples = [], 0
    with _ready(model) as layers:
        names = [f"{name}.weight" for name in layers]
        params = [model.get_parameter(name) for name in names]
        for batch in batches:
            masses.append(float(loss.mass(batch[1])))
            samples += len(batch[1])
            weights.append(_Moments())
            traces.append(_Moments())
            slopes = torch.autograd.grad(loss(model, batch), params, create_graph=True)
            for _ in range(probes):
                probe = [_rademacher(p, rng) for p in params]
                products = torch.autograd.grad(slopes, params, probe, retain_graph=True, materialize_grads=True)
                found = {n: v * hv for n, v, hv in zip(names, probe, products, strict=True)}
                weights[-1].add(found)
                traces[-1].add({} if groups is None else {"": groups.reduce(found)})
            del slopes
    if not masses:
        raise HapError("curvature: calibration batches expected, found none")
    mean, stderr = _pooled(weights, masses)
    trace, trace_stderr = _pooled(traces, masses)
    return Curvature(
        mean, stderr, "Hutchinson estimate", trace.get(""), trace_stderr.get(""), 1.0, samples, 1, 1 + 2 * probes
    )


def piecewise_linear(outputs: Tensor) -> bool:
    """Whether autograd's record shows only ops that are piecewise linear in each single weight."""
    stack, known = [outputs.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in known:
            continue
        known.add(node)
        op = node.name().rstrip("0123456789").removesuffix("Backward").rpartition("::")[2]
        following = [f for f, _ in node.next_functions if f is not None]
        curved = [f for f in following if not _is_parameter(f)]
        divided_by = node.next_functions[1][0] if op == "Div" else None
        batch_statistics = getattr(node, "_saved_training", False)  # of a BatchNorm without its own, an InstanceNorm
        straight = op in PIECEWISE_LINEAR or (op in BILINEAR and len(curved) <= 1 and divided_by not in curved)
        if not straight or batch_statistics:
            return False
        stack += following
    return True


def _is_parameter(node: Node) -> bool:
    """Whether the node is a parameter, or a view of one."""
    while len(node.next_functions) == 1 and (following := node.next_functions[0][0]) is not None:
        node = following
    return "AccumulateGrad" in node.name()


class _Tally:
    """Sums over samples of what `exact` needs for the diagonal and its error."""

    def __init__(self, groups: Groups | None) -> None:
        self.groups, self.linear = groups, True
        self.sums: dict[str, Tensor] = {}
        self.fourths: dict[str, Tensor] = {}
        self.mass, self.drawn, self.samples, self.columns = 0.0, 0.0, 0, 0
        self.variance = torch.zeros(0 if groups is None else len(groups), dtype=torch.float64)

    def begin(self, targets: Tensor, mass: float, columns: int, linear: bool) -> None:
        self.samples, self.mass, self.columns = self.samples + len(targets), self.mass + mass, columns
        self.linear &= linear
        self.by_group = torch.zeros(len(targets), len(self.variance), dtype=torch.float64)

    def add(self, layer: str, squares: Squares, sampled: bool) -> None:
        name = f"{layer}.weight"
        self.sums[name] = self.sums[name] + squares.total if name in self.sums else squares.total
        fourth = squares.last_squared * sampled
        self.fourths[name] = self.fourths[name] + fourth if name in self.fourths else fourth
        if sampled:
            self.drawn += float(squares.last.sum())
        if sampled and self.groups is not None:
            shape = self.groups.shapes[layer]
            of = self.groups.row_group[shape.first_row : shape.first_row + shape.rows]
            self.by_group.index_add_(1, of[of >= 0], squares.last[:, of >= 0].double().cpu())

    def end(self) -> None:
        # the variance of a sample's draw is at most its second moment, of which its square is an unbiased estimate
        self.variance += self.by_group.square().sum(0)

    def result(self) -> Curvature:
        if not self.sums:
            raise HapError("curvature: calibration batches expected, found none")
        diagonal = {name: value / self.mass for name, value in self.sums.items()}
        return Curvature(
            diagonal,
            {name: value.sqrt() / self.mass for name, value in self.fourths.items()},
            "exact Hessian diagonal" if self.linear else "Gauss-Newton diagonal",
            None if self.groups is None else self.groups.reduce(diagonal),
            None if self.groups is None else self.variance.sqrt() / self.mass,
            self.drawn / max(sum(float(v.sum()) for v in self.sums.values()), 1e-300),
            self.samples,
            1,
            self.columns,
        )


@dataclass
class _Moments:
    """Mean and sum of squared deviations, one at a time (Welford)."""

    n: int = 0
    mean: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        self.n += 1
        for name, value in values.items():
            mean = self.mean.setdefault(name, torch.zeros_like(value))
            delta = value - mean
            mean += delta / self.n
            self.squares.setdefault(name, torch.zeros_like(value)).add_(delta * (value - mean))


def _pooled(moments: list[_Moments], masses: list[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over batches by mass, and its standard error."""
    share = [m / sum(masses) for m in masses]
    mean = {
        n: sum((w * m.mean[n] for w, m in zip(share, moments, strict=True)), torch.zeros(())) for n in moments[0].mean
    }
    stderr = {}
    for name in mean:
        parts = [w**2 * m.squares[name] / (m.n * (m.n - 1)) for w, m in zip(share, moments, strict=True)]
        stderr[name] = sum(parts, torch.zeros(())).sqrt()
    return mean, stderr


@contextmanager
def _ready(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The convolutions and linear layers, their weights differentiable, the model in eval mode."""
    layers = {name: module for name, module in model.named_modules() if is_mixing(module)}
    weights = [(p, p.requires_grad) for p in (model.get_parameter(f"{name}.weight") for name in layers)]
    try:
        for p, _ in weights:
            p.requires_grad_(True)
        with torch.enable_grad(), evaluating(model):
            yield layers
    finally:
        for p, needed in weights:
            p.requires_grad_(needed)


def _forward(
    model: nn.Module, loss: Loss, inputs: Any, layers: dict[str, nn.Module]
) -> tuple[Tensor, dict[str, tuple[Tensor, GradientEdge]]]:
    """The outputs, and for each layer its input and the place of its output in the graph.

    An edge, not the tensor: a following op in place would put its own gradient there.
    """
    seen: dict[str, tuple[Tensor, GradientEdge]] = {}

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        if name in seen:
            raise HapError(f"curvature: {name} is called twice in one pass; per-sample gradients of shared weights mix")
        seen[name] = (x.detach(), get_gradient_edge(y))

    handles = [m.register_forward_hook(lambda _, x, y, n=n: keep(n, x[0], y)) for n, m in layers.items()]
    try:
        return loss.call(model, inputs), seen
    finally:
        for handle in handles:
            handle.remove()


def _chunks(batches: Iterable[Any], size: int) -> Iterator[tuple[Any, Tensor]]:
    for inputs, targets in batches:
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            yield tree_map(lambda t, part=part: t[part] if isinstance(t, Tensor) else t, inputs), targets[part]


def _rademacher(like: Tensor, rng: torch.Generator) -> Tensor:
    # drawn where the generator lives, so that a seed means the same on every device
    return torch.randint(0, 2, like.shape, generator=rng, device=rng.device).to(like).mul_(2).sub_(1)


__all__ = ["CrossEntropy", "Curvature", "Loss", "SquaredError", "exact", "hutchinson", "piecewise_linear"]
