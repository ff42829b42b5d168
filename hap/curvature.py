"""The diagonal of the loss Hessian, weight by weight: `exact` in closed form, `hutchinson` by random probes.

For a loss whose Hessian in the outputs is sum_c s_c s_c^T, the generalised Gauss-Newton matrix has the diagonal
sum_c (d (s_c . f) / dw)^2 [Schraudolph02]: one backward pass a column c, with per-sample gradients squared. Where the
network is piecewise linear in each single weight, that *is* the diagonal of the Hessian. This file knows layers and
losses; of groups it knows only how to sum over them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from hap import HapError
from hap.graph import piecewise_linear, refuse_shared
from hap.groups import Groups
from hap.layers import evaluating, first_tensor, is_mixing, plain_kernels, weight_of
from hap.losses import Batches, Loss
from hap.persample import refuse_unknown, squared_gradients
from hap.tally import Curvature, Probes, Tally

TRACE = "trace per group"  # beside the names of parameters


def exact(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
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
    if chunk < 1:
        raise HapError(f"exact: a chunk of at least 1 sample expected, found {chunk}")
    tally = Tally(groups)
    with measuring(model) as layers:
        for name, layer in layers.items():
            refuse_unknown(name, layer)
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise HapError(f"curvature: {name} takes the statistics of the batch, which couples its samples")
        for inputs, targets in _chunks(batches, chunk):
            outputs, seen = _forward(model, loss, inputs, layers)
            vectors = loss.columns(outputs, targets, columns, rng).detach()
            refuse_shared(outputs, layers)
            tally.begin(targets, float(loss.mass(targets)), len(vectors), piecewise_linear(outputs))
            edges = [edge for _, edge in seen.values()]
            grads = [torch.autograd.grad(outputs, edges, v, retain_graph=True, materialize_grads=True) for v in vectors]
            sampled = columns is not None and len(vectors) == columns + 1 < outputs.shape[1]
            for (name, (x, _)), column in zip(seen.items(), zip(*grads, strict=True), strict=True):
                if len(x) != len(targets):
                    raise HapError(f"curvature: {name} reads {len(x)} samples where the batch has {len(targets)}")
                tally.add(name, squared_gradients(layers[name], x, torch.stack(column)), sampled)
            tally.end()
    return tally.result()


def hutchinson(
    model: nn.Module, loss: Loss, batches: Batches, groups: Groups | None = None, *, probes: int, rng: torch.Generator
) -> Curvature:
    """The mean of v * Hv over Rademacher probes v, with its standard error over them [Hutchinson90].

    Each probe touches all weights at once, so the estimate of one weight carries the noise of all others. H is that
    of each batch; batches are averaged by their mass, and memory does not grow with their number or the probes'.
    """
    if probes < 2:
        raise HapError(f"hutchinson: at least 2 probes expected, for a standard error needs them, found {probes}")
    sums, samples = Probes(), 0
    with plain_kernels(), measuring(model) as layers:
        params = {weight_of(name): layer.get_parameter("weight") for name, layer in layers.items()}
        weights = list(params.values())

        def estimates(slopes: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
            for _ in range(probes):
                probe = [_rademacher(p, rng) for p in weights]
                products = torch.autograd.grad(slopes, weights, probe, retain_graph=True, materialize_grads=True)
                found = {name: v * hv for name, v, hv in zip(params, probe, products, strict=True)}
                yield found if groups is None else {**found, TRACE: groups.reduce(found)}

        for batch in batches:
            samples += len(batch[1])
            slopes = torch.autograd.grad(loss(model, batch), weights, create_graph=True, materialize_grads=True)
            sums.add(estimates(slopes), float(loss.mass(batch[1])))
    mean, stderr = sums.result()
    trace, trace_stderr = mean.pop(TRACE, None), stderr.pop(TRACE, None)
    return Curvature(mean, stderr, "Hutchinson estimate", trace, trace_stderr, 1.0, samples, 1, 1 + 2 * probes)


@contextmanager
def measuring(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The convolutions and linear layers, their weights differentiable, the model in eval mode."""
    layers = {name: module for name, module in model.named_modules() if is_mixing(module)}
    if not layers:
        raise HapError(f"curvature: {type(model).__name__} has no convolution and no linear layer")
    for name, module in layers.items():
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise HapError(f"curvature: the weight of {name} is computed from others; make it a parameter first")
    weights = [(p, p.requires_grad) for p in (model.get_parameter(weight_of(name)) for name in layers)]
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

    def keep(name: str, _: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        if name in seen:
            raise HapError(f"curvature: {name} is called twice in one pass; per-sample gradients of shared weights mix")
        seen[name] = (first_tensor(args, kwargs).detach(), get_gradient_edge(y))

    handles = [m.register_forward_hook(partial(keep, name), with_kwargs=True) for name, m in layers.items()]
    try:
        return loss.call(model, inputs), seen
    finally:
        for handle in handles:
            handle.remove()


def _chunks(batches: Batches, size: int) -> Iterator[tuple[Any, Tensor]]:
    for inputs, targets in batches:
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            yield tree_map(lambda t, part=part: t[part] if isinstance(t, Tensor) else t, inputs), targets[part]


def _rademacher(like: Tensor, rng: torch.Generator) -> Tensor:
    # drawn where the generator lives, so that a seed means the same on every device
    return torch.randint(0, 2, like.shape, generator=rng, device=rng.device).to(like).mul_(2).sub_(1)
