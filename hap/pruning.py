"""Trace, score, plan, apply, update and check in one call, with defaults that need no labels."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hap import HapError
from hap.cost import latency, macs, params
from hap.hessian.losses import CrossEntropy, Loss
from hap.methods import obs
from hap.plan import Budget, Plan, plan
from hap.structure.groups import couple
from hap.structure.layers import Call, batched, forward
from hap.structure.tracing import trace
from hap.surgery.apply import added, apply
from hap.surgery.refit import Update
from hap.testing import check_groups
from hap.updates import least_squares


class Pruned(NamedTuple):
    """The smaller model and its plan; `print(plan)` shows the cost and the layers that lost rows."""

    model: nn.Module
    plan: Plan


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    budget: Budget | float,
    *,
    loss: Loss | None = None,
    update: Update | None = least_squares,
    call: Call = forward,
    opaque: tuple[str, ...] = (),
    rng: torch.Generator | None = None,
) -> Pruned:
    """A smaller copy of the model, whose remaining weights compensate for those removed; without training.

    `batches`: a few hundred samples like those of training; a batch is the input of the model: a tensor, a tuple of
    positional arguments or a dict of keywords. `budget`: a Budget, or the share of the parameters to remove. `loss`: if
    given, batches are pairs (inputs, targets), with inputs as `loss.call` takes them, and the exact curvature decides
    how much of each layer is removed; else all layers lose the same share. `update`: new weights for layers that lost
    inputs, None for none. `call(model, batch)`: the output. `opaque`: modules to leave whole. `rng`: draws random
    numbers, by default seeded with 0. Channels that a single layer reads, as inside residual blocks, are removed before
    those of a residual stream. HapError without batches, where the model cannot be traced, or the pruned model does not
    compute what the masked one does.

    >>> model, rng = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)), torch.Generator().manual_seed(0)
    >>> small = prune(model, [torch.rand(200, 8, generator=rng)], 0.5).model
    >>> small[0].out_features  # of 32; the bias of the output stays
    15
    """
    batches = list(batches)
    if not batches:
        raise HapError("prune: calibration batches expected, found none")
    call = call if loss is None else loss.call
    inputs = batches if loss is None else [each for each, _ in batches]
    pairs = [(each, None) for each in inputs] if loss is None else batches
    example = tree_map(lambda leaf: leaf[:1] if batched(leaf) else leaf, inputs[0])
    groups = couple(model, trace(model, example, call=call, opaque=opaque))
    check_groups(model, example, groups, call=call, trials=2)
    scores = obs(
        model, loss or CrossEntropy(call), pairs, groups, rng=rng or torch.Generator().manual_seed(0),
        allocation="uniform" if loss is None else "trace", inner=True,
    )  # fmt: skip
    chosen = plan(groups, scores, Budget(params=budget) if isinstance(budget, float) else budget)
    small = apply(model, groups, chosen, None, update, batches=inputs, call=call, loss=loss)
    sizes = {
        "parameters": (params(model), params(small)),
        "MACs": (macs(model, example, call=call), macs(small, example, call=call)),
        "seconds": tuple(latency(each, example, (1,), call=call)[1] for each in (model, small)),
    }
    return Pruned(small, replace(chosen, added=added(model, small), sizes=sizes))
