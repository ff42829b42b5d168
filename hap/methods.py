"""Scores: one number a group, higher means keep. A stranger's score is a function of the same signature.

(model, loss, batches, groups, *, rng, **options) -> scores. Nothing here knows budgets or surgery.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hap import HapError
from hap.hessian.accumulate import Curvature
from hap.hessian.exact import exact
from hap.hessian.hooks import measuring, ordinary, refuse_unfinite, tracked
from hap.hessian.hutchinson import hutchinson
from hap.hessian.losses import Batches, Loss, refuse_loss
from hap.reconstruction import How, in_streams, ranks
from hap.structure.groups import Groups, describe_group
from hap.structure.heads import slot_groups
from hap.structure.layers import axis, evaluating, weight_of
from hap.surgery.masking import silence
from hap.updates import RIDGE

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
    normalise: bool = False,
    confidence: float | None = None,
    pruned: Pruned | None = None,
    halves: Callable[[Tensor], object] | None = None,
    merge: Callable[[Curvature], Curvature] | None = None,
) -> Scores:
    """The loss that dropping a group costs to second order, its block of H replaced by its mean curvature.

    s = Tr(H_pp) / (2 p) * ||w_p||^2, with p the number of weights of the group [Yu22, sec. 3]. `columns` and `share`
    as in `exact`; `probes` and `block` as in `hutchinson`. `normalise`: within each layer, as `michel` is, or a global
    order would empty the last layers of a transformer, of which one position counts. # paper: no word of it. `pruned`:
    what the chosen budget prunes by given scores; a warning where the even and the odd probes do not agree on it, and
    with `confidence` no more probes once they agree on this share. `halves`: takes the scores of either half instead of
    the warning. `merge`: makes the curvature of all batches of that of these, where others measure the rest.
    # upstream: 3 probes by default, and no 1/2, which changes no ranking.
    """
    scale = groups.reduce(_weights(model, groups, lambda w: w.square())).cpu() / (2 * _size(model, groups))
    # of heads the weights are few among all, and their columns count; of channels all are measured
    names, per = (None, "row") if groups.slot_group is None else (groups.weights(), "weight")
    within = partial(_within_layers, groups) if normalise else _as_it_is
    seen = None if pruned is None else lambda scores: pruned(within(scores))
    if curvature == "exact":
        how: dict[str, Any] = {"columns": columns, "share": share, "of": names or "weights", "per": per}
        found = exact(model, loss, batches, groups, rng=rng, **how)
    elif curvature == "hutchinson":
        until = _agreeing(scale, seen, confidence)
        found = hutchinson(model, loss, batches, groups, probes=probes, rng=rng, names=names, block=block, until=until)
    else:
        raise HapError(f"hessian_trace: curvature 'exact' or 'hutchinson' expected, found {curvature!r}")
    found = found if merge is None else merge(found)
    assert found.trace is not None
    if found.halves is not None and halves is not None:
        halves(torch.stack([within(half * scale) for half in found.halves]))
    elif found.halves is not None and seen is not None:
        agreed = agree(*(seen(half * scale) for half in found.halves))
        if agreed < (confidence or DETERMINED):
            warnings.warn(
                f"hessian_trace: {found.probes} probes do not determine what is pruned: their halves agree on "
                f"{agreed:.0%} of it",
                stacklevel=2,
            )
    return within(found.trace * scale)


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


@torch.inference_mode(mode=False)
def taylor(model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator) -> Scores:
    """The squared first-order loss change when a group goes, (sum g w)^2, averaged over batches [Molchanov19]."""
    refuse_loss(loss, "taylor", "mass")
    names = list(_weights(model, groups, lambda w: w))
    params = [model.get_parameter(name) for name in names]
    scores = []
    with measuring(model):
        for batch in batches:
            if not float(loss.mass(batch[1])):
                continue  # all of its targets are ignored
            slopes = torch.autograd.grad(loss(model, ordinary(batch)), params, materialize_grads=True)
            refuse_unfinite("taylor, gradient", dict(zip(names, slopes, strict=True)))
            scores.append(groups.reduce({n: g * p for n, g, p in zip(names, slopes, params, strict=True)}).square())
    if not scores:
        raise HapError("taylor: calibration batches expected, found none with a target that counts")
    return torch.stack(scores).mean(0).cpu()


@torch.inference_mode(mode=False)
def michel(
    model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator, normalise: bool = True
) -> Scores:
    """The gradient of the loss by a head's gate, in absolute value: mean over positions of |<c, dL/dc>| [Michel19].

    c is what the head writes at a position, before the output projection. With `normalise`, divided by the root of the
    sum of squares over the heads of a layer. The mean is over the positions that the loss depends on at all.
    # upstream: divides by the number of tokens, and in the last layer by that of sentences, of which one token counts:
    the same positions. # upstream: of the mean loss of a batch, where samples of a smaller batch weigh more.
    """
    refuse_loss(loss, "michel", "call", "total")
    of, total, count = slot_groups(groups), torch.zeros(len(groups)), torch.zeros(len(groups))
    readers = {
        name: of[s.slots_at] for name, s in groups.shapes.items() if s.mixing and bool((of[s.slots_at] >= 0).any())
    }
    for inputs, targets in batches if readers else ():
        outputs, reads = tracked(model, loss.call, ordinary(inputs), readers)
        with torch.enable_grad():  # the caller may have turned it off
            total_loss = loss.total(outputs, targets)
        slopes = torch.autograd.grad(total_loss, list(reads.values()), materialize_grads=True)
        refuse_unfinite("michel, gradient by what is read", dict(zip(reads, slopes, strict=True)))
        for (name, c), slope in zip(reads.items(), slopes, strict=True):
            along, group = axis(model.get_submodule(name)), readers[name]
            effect = (c * slope).detach().movedim(along, -1).flatten(0, -2)[:, group >= 0]
            by_group = effect.new_zeros(len(effect), len(groups))
            by_group.index_add_(1, group[group >= 0].to(effect.device), effect)
            total += by_group.abs().sum(0).cpu()
            reached = (slope.movedim(along, -1).flatten(0, -2) != 0).any(1).sum().cpu()
            count[torch.unique(group[group >= 0])] += reached
    if not count.any():
        raise HapError("michel: calibration batches expected, and a group that is read alone, found none")
    scores = total / count.clamp_min(1)
    return _within_layers(groups, scores) if normalise else scores


def ablation(model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator) -> Scores:
    """The loss that removing each group alone adds, measured: what the other scores estimate [Michel19, sec. 3.2]."""
    refuse_loss(loss, "ablation", "call", "total", "mass")
    batches = list(batches)
    if not batches:
        raise HapError("ablation: calibration batches expected, found none")
    refuse_unfinite("ablation", dict(model.named_parameters()))

    def measured(what: str) -> Tensor:
        pairs = [(loss.total(loss.call(model, x), y).double(), loss.mass(y).double()) for x, y in batches]
        total, mass = (torch.stack(each).sum() for each in zip(*pairs, strict=True))
        if not bool((total / mass).isfinite()):
            found = f"found {float(total):g} over targets of mass {float(mass):g}"
            raise HapError(f"ablation: a finite loss of the model {what} expected, {found}")
        return total / mass

    scores = []
    with torch.no_grad(), evaluating(model):
        dense = measured("as it is")
        for group in range(len(groups)):
            handles = silence(model, groups, groups.gone(torch.arange(len(groups)) == group))
            try:
                scores.append(measured(f"without {describe_group(groups, group)}") - dense)
            finally:
                for handle in handles:
                    handle.remove()
    return torch.stack(scores).float().cpu()


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
    places = torch.zeros_like(scores)
    for layer in _by_layer(groups):
        places[layer] = (scores[layer].argsort().argsort() + 0.5).to(places) / len(layer)
    return places


def obs(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    groups: Groups,
    *,
    rng: torch.Generator,
    allocation: str = "uniform",
    ridge: float = RIDGE,
    inner: bool = False,
) -> Scores:
    """Within a layer, the order in which channels cost least when the readers' other weights make up for them.

    Greedy removal by the rise of the readers' squared error, their inverse covariances and weights brought up to date
    after each [Hassibi93; Kurtic23]. How many go of each layer is the `allocation`'s: the same share of each, or as
    many as the exact trace, or magnitude, would take. What no reader can make up for comes after all others; with
    `inner` also the channels of residual streams, by the allocation alone.
    """
    return _reconstructing(model, loss, batches, groups, "removal", allocation, ridge, inner, rng)


def cap(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    groups: Groups,
    *,
    rng: torch.Generator,
    allocation: str = "uniform",
    ridge: float = RIDGE,
    inner: bool = False,
) -> Scores:
    """As `obs`, but channels are chosen to stay, one after another, by how much of the readers' outputs they explain.

    The ranking of [Xie21]. # upstream: has no ridge, and skips a channel where a Cholesky factor fails.
    """
    return _reconstructing(model, loss, batches, groups, "selection", allocation, ridge, inner, rng)


def _reconstructing(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    groups: Groups,
    how: How,
    allocation: str,
    ridge: float,
    inner: bool,
    rng: torch.Generator,
) -> Scores:
    inputs = [inputs for inputs, _ in batches]
    streams = in_streams(groups) if inner else torch.zeros(len(groups), dtype=torch.bool)
    place = ranks(model, groups, inputs, loss.call, how=how, ridge=ridge, only=~streams)
    if allocation == "uniform":
        amounts = uniform(model, loss, batches, groups, rng=rng)
    elif allocation == "trace":
        amounts = hessian_trace(model, loss, batches, groups, rng=rng)
    elif allocation == "magnitude":
        amounts = magnitude(model, loss, batches, groups, rng=rng)
    else:
        raise HapError(f"obs: allocation 'uniform', 'trace' or 'magnitude' expected, found {allocation!r}")
    scores = amounts.clone()
    for layer in _by_layer(groups):
        made_up = layer[place[layer] >= 0]
        scores[made_up[place[made_up].argsort()]] = amounts[made_up].sort().values
    last = place < 0
    if bool(last.any()) and not bool(last.all()):
        scores[last] += scores.max() - amounts[last].min() + 1
    return scores


def _by_layer(groups: Groups) -> list[Tensor]:
    """The groups of each layer; one of several layers is in the first of them."""
    row = torch.full((len(groups),), len(groups.row_group))
    of = groups.row_group
    row.scatter_reduce_(0, of[of >= 0], (of >= 0).nonzero()[:, 0], "amin")
    shapes = groups.shapes.values()
    found = [((row >= s.first_row) & (row < s.first_row + s.rows)).nonzero()[:, 0] for s in shapes]
    return [layer for layer in found if len(layer)]


def _within_layers(groups: Groups, scores: Scores) -> Scores:
    """Divided by the root of the sum of squares over the groups of a layer, the first that reads them alone."""
    of, layer = slot_groups(groups), torch.full((len(groups),), len(groups.shapes))
    for i, s in reversed(list(enumerate(groups.shapes.values()))):
        reads = of[s.slots_at]
        layer[reads[reads >= 0]] = i
    squares = torch.zeros(len(groups.shapes) + 1, dtype=scores.dtype).index_add_(0, layer, scores.square())
    return scores / (squares.sqrt() + 1e-20)[layer]


def _as_it_is(scores: Scores) -> Scores:
    return scores


def _weights(model: nn.Module, groups: Groups, function: Any) -> dict[str, Tensor]:
    """A function of each weight that the groups are made of, by parameter name."""
    names = [weight_of(name) for name, shape in groups.shapes.items() if shape.mixing]
    names = names if groups.slot_group is None else groups.weights()
    weights = {name: model.get_parameter(name).detach() for name in names}
    refuse_unfinite("score", weights)
    return {name: function(weight) for name, weight in weights.items()}


def _size(model: nn.Module, groups: Groups) -> Scores:
    """The number of weights of each group."""
    return groups.reduce(_weights(model, groups, torch.ones_like)).cpu()
