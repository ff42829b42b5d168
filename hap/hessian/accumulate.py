"""The diagonal of the loss Hessian with its standard error: sums over samples, and the combination of shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hap import HapError
from hap.hessian.persample import Squares
from hap.structure.groups import Groups
from hap.structure.layers import weight_of

EXACT, GAUSS_NEWTON, ESTIMATE = "exact Hessian diagonal", "Gauss-Newton diagonal", "Hutchinson estimate"


@dataclass(frozen=True)
class Curvature:
    """The diagonal of the Hessian of a mean loss, by parameter name, with its kind, its standard error and its cost.

    Units: those of the loss per square of the parameter.

    >>> model = nn.Linear(2, 1)
    >>> curvature = exact(model, SquaredError(), [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))])
    >>> curvature.kind, curvature.diagonal["weight"].round(decimals=3).tolist()  # 2 x^2
    ('exact Hessian diagonal', [[2.0, 8.0]])
    """

    diagonal: Mapping[str, Tensor]  # one number per element of the parameter, or its sum over each row
    stderr: Mapping[str, Tensor]  # its standard error: 0 where nothing was drawn, a bound for drawn columns
    kind: str  # "exact Hessian diagonal", "Gauss-Newton diagonal" or "Hutchinson estimate"
    trace: Float[Tensor, "groups"] | None = None  # the sum over the weights of each group, if there are groups
    trace_stderr: Float[Tensor, "groups"] | None = None
    drawn: float = 0.0  # share of the whole trace that was drawn at random, 0 to 1
    drawn_stderr: float = 0.0  # upper bound of the standard error of that share
    mass: float = 1.0  # the divisor of the mean loss over all samples, see Loss.mass
    samples: int = 0
    forwards: int = 0  # passes over each sample; a backward pass costs about two forward passes
    backwards: int = 0
    probes: int = 0
    halves: Float[Tensor, "2 groups"] | None = None  # the trace from the odd and from the even probes, to compare them
    estimated: Sequence[str] = ()  # parameters of modules that `exact` does not know, estimated by probes


class Tally:
    """Sums over samples from which `exact` computes a Curvature; they stay on the device of the outputs."""

    def __init__(self, groups: Groups | None) -> None:
        """All sums are 0."""
        self.groups, self.linear = groups, True
        self.sums, self.fourths = dict[str, Tensor](), dict[str, Tensor]()
        self.mass, self.drawn, self.drawn2 = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.samples, self.columns, self.widest = 0, 0, 0
        self.variance = torch.zeros(0 if groups is None else len(groups), dtype=torch.float64)
        self.members = dict[str, tuple[Tensor, ...]]()  # layer -> grouped rows, their groups; columns, their groups

    def begin(self, outputs: Tensor, mass: Tensor, columns: int, linear: bool) -> None:
        """Start a chunk: outputs and mass of its samples, number of columns, whether the model is piecewise linear."""
        device, n = outputs.device, len(outputs)
        for name in ("mass", "drawn", "drawn2", "variance"):
            setattr(self, name, getattr(self, name).to(device))
        self.mass += mass.detach().to(device)
        self.samples, self.columns, self.linear = self.samples + n, self.columns + n * columns, self.linear and linear
        self.by_group = torch.zeros(n, len(self.variance), dtype=torch.float64, device=device)
        self.by_sample = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, layer: str, name: str, squares: Squares) -> None:
        """Add the squared gradients of the parameter `name` of `layer` over the chunk."""
        self.sums[name] = self.sums[name] + squares.total if name in self.sums else squares.total
        if name not in self.fourths:
            self.fourths[name] = torch.zeros_like(squares.total)
        if squares.last is None or squares.last_squared is None:
            return
        self.fourths[name] += squares.last_squared
        self.by_sample += squares.last.sum(1)
        if self.groups is not None and name == weight_of(layer):
            rows, of, columns, read_by = self._members(layer, squares.last.device)
            self.by_group.index_add_(1, of, squares.last[:, rows].double())
            if len(columns):
                if squares.across is None:
                    raise HapError(
                        f"exact: all classes expected as columns where {layer} reads heads, found some drawn"
                    )
                self.by_group.index_add_(1, read_by, squares.across[:, columns].double())

    def end(self) -> None:
        """Finish the chunk: add what its samples have drawn, and the variance of it."""
        # the variance of a sample's draw is at most its second moment, of which its square is an unbiased estimate
        self.variance += self.by_group.square().sum(0)
        self.drawn += self.by_sample.sum()
        self.drawn2 += self.by_sample.square().sum()

    def result(self) -> Curvature:
        """The sums divided by the mass of all samples; HapError where there are no samples or their mass is 0."""
        if not self.sums:
            raise HapError("curvature: calibration batches expected, found none")
        if not (mass := float(self.mass)):
            raise HapError(f"curvature: targets that count expected, found {self.samples} that are ignored or weigh 0")
        diagonal = {name: value / mass for name, value in self.sums.items()}
        whole = max(sum(float(v.sum(dtype=torch.float64)) for v in self.sums.values()), 1e-300)
        traces = None if self.groups is None else self.groups.reduce(_weights(diagonal, self.groups)).cpu()
        return Curvature(
            diagonal,
            {name: value.sqrt() / mass for name, value in self.fourths.items()},
            EXACT if self.linear else GAUSS_NEWTON,
            traces,
            None if self.groups is None else (self.variance.sqrt() / mass).cpu(),
            float(self.drawn) / whole,
            float(self.drawn2) ** 0.5 / whole,
            mass,
            self.samples,
            1,
            -(-self.columns // self.samples),
        )

    def _members(self, layer: str, device: torch.device) -> tuple[Tensor, ...]:
        if layer not in self.members:
            assert self.groups is not None
            shape, of = self.groups.shapes.get(layer), self.groups.slot_group
            none = torch.empty(0, dtype=torch.long)  # of a layer inside an opaque module
            owners = (self.groups.row_group[shape.rows_at] if shape else none, none)
            if shape and of is not None and shape.kernel == 1 and shape.conv_groups == 1:
                owners = (owners[0], of[shape.slots_at])
            pairs = [((owner >= 0).nonzero()[:, 0], owner[owner >= 0]) for owner in owners]
            self.members[layer] = tuple(t.to(device) for pair in pairs for t in pair)
        return self.members[layer]


def merge(parts: Sequence[Curvature]) -> Curvature:
    """The Curvature of all samples from those of shards of them.

    Means are weighted by mass; standard errors add in squares, as of independent draws. HapError where the shards hold
    different parameters, different kinds or, in part only, a trace of groups.
    """
    names = {tuple(part.diagonal) for part in parts}
    kinds = {part.kind for part in parts}
    if len(names) != 1 or (ESTIMATE in kinds and len(kinds) > 1) or len({p.trace is None for p in parts}) > 1:
        raise HapError(f"merge: shards of one measurement expected, found {len(names)} sets of names, {sorted(kinds)}")
    mass = sum(part.mass for part in parts)
    shares = [part.mass / mass for part in parts]

    def mean(values: list[Tensor]) -> Tensor:
        return sum((share * value for share, value in zip(shares, values, strict=True)), torch.zeros_like(values[0]))

    def error(values: list[Tensor]) -> Tensor:
        squares = [(share * value).square() for share, value in zip(shares, values, strict=True)]
        return sum(squares, torch.zeros_like(values[0])).sqrt()

    traces = [part.trace for part in parts if part.trace is not None]
    errors = [part.trace_stderr for part in parts if part.trace_stderr is not None]
    halves = [part.halves for part in parts if part.halves is not None]
    wholes = [s * sum(float(v.sum()) for v in p.diagonal.values()) for s, p in zip(shares, parts, strict=True)]
    whole = sum(wholes) or 1e-300
    return Curvature(
        {name: mean([part.diagonal[name] for part in parts]) for name in parts[0].diagonal},
        {name: error([part.stderr[name] for part in parts]) for name in parts[0].diagonal},
        GAUSS_NEWTON if GAUSS_NEWTON in kinds else kinds.pop(),
        mean(traces) if traces else None,
        error(errors) if errors else None,
        sum(w * part.drawn for w, part in zip(wholes, parts, strict=True)) / whole,
        sum((w * part.drawn_stderr) ** 2 for w, part in zip(wholes, parts, strict=True)) ** 0.5 / whole,
        mass,
        sum(part.samples for part in parts),
        max(part.forwards for part in parts),
        max(part.backwards for part in parts),
        min(part.probes for part in parts),
        mean(halves) if halves else None,
        parts[0].estimated,
    )


def join(known: Curvature, rest: Curvature, per: str) -> Curvature:
    """The Curvature of a model from `known` parameters, and the `rest`, by probes over the same samples.

    `per`: as for `known`; with "row", `rest`, which has a number per weight, is summed over rows.
    """
    diagonal = {name: v.flatten(1).sum(1) if per == "row" else v for name, v in rest.diagonal.items()}
    # as if the estimates of the weights of a row were independent
    errors = {n: v.square().flatten(1).sum(1).sqrt() if per == "row" else v for n, v in rest.stderr.items()}
    traces = None if known.trace is None or rest.trace is None else known.trace + rest.trace
    bars = [part.trace_stderr for part in (known, rest) if part.trace_stderr is not None]
    whole = [sum(float(v.sum()) for v in part.values()) for part in (known.diagonal, diagonal)]
    left = whole[0] / sum(whole)
    return replace(
        known,
        diagonal={**known.diagonal, **diagonal},
        stderr={**known.stderr, **errors},
        trace=traces,
        trace_stderr=torch.stack(bars).square().sum(0).sqrt() if bars else None,
        drawn=known.drawn * left,
        drawn_stderr=known.drawn_stderr * left,
        backwards=known.backwards + rest.backwards,
        estimated=tuple(diagonal),
    )


def _weights(diagonal: Mapping[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """The part of a diagonal that belongs to weights of layers, of which groups are made: no biases."""
    return {name: diagonal[name] for layer in groups.shapes if (name := weight_of(layer)) in diagonal}
