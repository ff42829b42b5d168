"""Scores: one number a group, higher means keep. A stranger's score is a function of the same signature.

(model, loss, batches, groups, *, rng, **options) -> scores. Nothing here knows budgets or surgery.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hap import HapError
from hap.curvature import exact
from hap.groups import Groups
from hap.layers import weight_of
from hap.losses import Batches, Loss
from hap.measuring import measuring
from hap.probes import hutchinson
from hap.tally import Curvature

Scores = Float[Tensor, "groups"]
Pruned = Callable[[Tensor], Tensor]  # which groups the budget would prune by these scores
DETERMINED = 0.95  # of what is pruned, on which two halves of the probes must agree


def hessian_trace(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    groups: Groups,
    *,
    rng: torch.Generator,
    curvature: Literal["exact", "hutchinson"] = "exact",
    columns: int | None = None,
    share: float | None = None,
    probes: int = 300,
    block: bool = False,
    confidence: float | None = None,
    pruned: Pruned | None = None,
    halves: Callable[[Tensor], object] | None = None,
) -> Scores:
    """The loss that dropping a group costs to second order, its block of H replaced by its mean curvature.

    s = Tr(H_pp) / (2 p) * ||w_p||^2, with p the number of weights of the group [Yu22, sec. 3]. `columns` and `share`
    as in `exact`; `probes` and `block` as in `hutchinson`. `pruned`: what the chosen budget prunes by given scores; a
    warning where the even and the odd probes do not agree on it, and with `confidence` no more probes once they agree
    on this share. `halves`: takes the scores of either half instead of the warning. # upstream: 3 probes by default,
    and no 1/2, which changes no ranking.
    """
    scale = groups.reduce(_weights(model, groups, lambda w: w.square())).cpu() / (2 * _size(model, groups))
    if curvature == "exact":
        found = exact(model, loss, batches, groups, columns=columns, share=share, rng=rng, per="row")
    elif curvature == "hutchinson":
        until = _agreeing(scale, pruned, confidence)
        found = hutchinson(model, loss, batches, groups, probes=probes, rng=rng, block=block, until=until)
    else:
        raise HapError(f"hessian_trace: curvature 'exact' or 'hutchinson' expected, found {curvature!r}")
    assert found.trace is not None
    if found.halves is not None and halves is not None:
        halves(found.halves * scale)
    elif found.halves is not None and pruned is not None:
        agreed = agree(*(pruned(half * scale) for half in found.halves))
        if agreed < (confidence or DETERMINED):
            warnings.warn(
                f"hessian_trace: {found.probes} probes do not determine what is pruned: their halves agree on "
                f"{agreed:.0%} of it",
                stacklevel=2,
            )
    return found.trace * scale


def agree(one: Bool[Tensor, "groups"], other: Bool[Tensor, "groups"]) -> float:
    """The share of the larger of two sets that is in the other too."""
    return float((one & other).sum() / torch.maximum(one.sum(), other.sum()).clamp_min(1))


def _agreeing(scale: Scores, pruned: Pruned | None, confidence: float | None) -> Callable[[Curvature], bool] | None:
    if confidence is None:
        return None
    if not 0 < confidence < 1 or pruned is None:
        raise HapError(f"hessian_trace: confidence in 0 to 1 and what is pruned expected, found {confidence}, {pruned}")

    def enough(found: Curvature) -> bool:
        return found.halves is not None and agree(*(pruned(half * scale) for half in found.halves)) >= confidence

    return enough


def magnitude(
    model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator, order: int = 1
) -> Scores:
    """Mean absolute weight (order 1) or root mean square weight (order 2), comparable across layers.

    # paper: [Li17] sums within one layer; the mean is what makes layers of different width comparable.
    """
    if order not in (1, 2):
        raise HapError(f"magnitude: order 1 or 2 expected, found {order!r}")
    powers = groups.reduce(_weights(model, groups, lambda w: w.abs() ** order)).cpu()
    return (powers / _size(model, groups)) ** (1 / order)


def taylor(model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator) -> Scores:
    """The squared first-order loss change when a group goes, (sum g w)^2, averaged over batches [Molchanov19]."""
    names = list(_weights(model, groups, lambda w: w))
    params = [model.get_parameter(name) for name in names]
    scores = []
    with measuring(model):
        for batch in batches:
            slopes = torch.autograd.grad(loss(model, batch), params, materialize_grads=True)
            scores.append(groups.reduce({n: g * p for n, g, p in zip(names, slopes, params, strict=True)}).square())
    if not scores:
        raise HapError("taylor: calibration batches expected, found none")
    return torch.stack(scores).mean(0).cpu()


def random(model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator) -> Scores:
    """A score without information: the floor every method must beat."""
    return torch.rand(len(groups), generator=rng)


def uniform(
    model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator, order: int = 1
) -> Scores:
    """The same fraction of every layer, its groups of smallest magnitude first.

    A group of several layers counts in the first of them.
    """
    scores = magnitude(model, loss, batches, groups, rng=rng, order=order)
    row = torch.full((len(groups),), len(groups.row_group))
    of = groups.row_group
    row.scatter_reduce_(0, of[of >= 0], (of >= 0).nonzero()[:, 0], "amin")
    ranks = torch.zeros_like(scores)
    for s in groups.shapes.values():
        layer = ((row >= s.first_row) & (row < s.first_row + s.rows)).nonzero()[:, 0]
        ranks[layer] = (scores[layer].argsort().argsort() + 0.5).to(ranks) / max(1, len(layer))
    return ranks


def _weights(model: nn.Module, groups: Groups, function: Any) -> dict[str, Tensor]:
    """A function of each weight that the groups are made of, by parameter name."""
    names = [weight_of(name) for name, shape in groups.shapes.items() if shape.mixing]
    return {name: function(model.get_parameter(name).detach()) for name in names}


def _size(model: nn.Module, groups: Groups) -> Scores:
    """The number of weights of each group."""
    return groups.reduce(_weights(model, groups, torch.ones_like)).cpu()
