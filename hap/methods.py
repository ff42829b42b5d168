"""Scores: one number for each group; groups of high score are kept.

A score is a function (model, loss, batches, groups, *, rng, **options) -> Float[Tensor, "groups"]; users can write one.
`batches`: pairs (inputs, targets); `rng` draws all random numbers. Nothing here knows budgets or surgery.
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
Pruned = Callable[[Tensor], Tensor]  # scores -> mask of the groups that the budget prunes
DETERMINED = 0.95  # share of the pruned groups on which two halves of the probes must agree


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
    """The increase of the loss, to second order, when a group is removed, with the mean curvature for its block of H.

    s = Tr(H_pp) / (2 p) * ||w_p||^2, with p the number of weights of the group [Yu22, sec. 3]; in units of the loss.
    `columns` and `share` as in `exact`; `probes` and `block` as in `hutchinson`. `normalise`: divide by the norm of a
    layer's scores, as `michel`; else the last layers of a transformer, where one position counts, can go whole.
    # paper: does not mention it. `pruned`: scores -> mask of groups that the budget prunes; a warning if odd and even
    probes disagree. `confidence`: stop the probes when they agree on this share. `halves`: called with the scores
    of both halves, instead of the warning. `merge`: the curvature of these batches -> that of all, where others measure
    the rest. HapError for another `curvature`. # upstream: 3 probes by default, and no 1/2, which changes no ranking.

    >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.eye(4)
    >>> _ = model[1].weight.data[:, 0].zero_()  # row 0 of the first layer has no effect
    >>> batches, rng = [(x, torch.tensor([0, 1, 0, 1]))], torch.Generator()
    >>> (hessian_trace(model, CrossEntropy(), batches, couple(model, trace(model, x)), rng=rng) > 0).tolist()
    [False, True, True]
    """
    scale = groups.reduce(_weights(model, groups, lambda w: w.square())).cpu() / (2 * _size(model, groups))
    # heads are made of few weights, and need columns; for channels, the weights of all layers are measured by row
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
    """The share, 0 to 1, of the larger of two sets of groups that is also in the other.

    >>> agree(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
    0.5
    """
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

    HapError for another order. # paper: [Li17] sums within one layer; a mean makes layers of unequal width comparable.

    >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[-1.0], [2.0], [3.0]]))
    >>> groups = couple(model, trace(model, torch.zeros(1, 1)))
    >>> magnitude(model, CrossEntropy(), [], groups, rng=torch.Generator())
    tensor([1., 2., 3.])
    """
    if order not in (1, 2):
        raise HapError(f"magnitude: order 1 or 2 expected, found {order!r}")
    powers = groups.reduce(_weights(model, groups, lambda w: w.abs() ** order)).cpu()
    return (powers / _size(model, groups)) ** (1 / order)


@torch.inference_mode(mode=False)
def taylor(model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator) -> Scores:
    """The squared first-order change of the loss when a group is removed, (sum g w)^2, mean over batches [Molchanov19].

    g: the gradient of the mean loss of a batch. HapError where no batch has a target that counts.

    >>> model, rng = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.Generator().manual_seed(0)
    >>> _ = model[1].weight.data[:, 0].zero_()  # row 0 of the first layer has no effect
    >>> x = torch.rand(8, 4, generator=rng)
    >>> batches, groups = [(x, torch.arange(8) % 2)], couple(model, trace(model, x))
    >>> (taylor(model, CrossEntropy(), batches, groups, rng=rng) > 0).tolist()
    [False, True, True]
    """
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
    """The absolute gradient of the loss with respect to a gate on each head, mean of |<c, dL/dc>| [Michel19].

    c: output of the head at a position, before the output projection; L: the loss summed over samples. The mean is over
    the positions that the loss depends on. `normalise`: divide by the root of the sum of squares over the heads of a
    layer. HapError where no group is read alone, or without batches. # upstream: divides by the number of tokens, and
    in the last layer by that of sentences, of which one token counts: the same positions. # upstream: L is the mean
    loss of a batch, so that samples of smaller batches weigh more.

    >>> model, rng = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.Generator().manual_seed(0)
    >>> _ = model[1].weight.data[:, 0].zero_()  # row 0 of the first layer has no effect
    >>> x = torch.rand(8, 4, generator=rng)
    >>> batches, groups = [(x, torch.arange(8) % 2)], couple(model, trace(model, x))
    >>> (michel(model, CrossEntropy(), batches, groups, rng=rng) > 0).tolist()
    [False, True, True]
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
    """The measured increase of the mean loss without one group, which other scores estimate [Michel19, sec. 3.2].

    A forward pass of all batches for each group. HapError without batches, and where a loss is not finite.

    >>> model, rng = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.Generator().manual_seed(0)
    >>> _ = model[1].weight.data[:, 0].zero_()  # row 0 of the first layer has no effect
    >>> x = torch.rand(8, 4, generator=rng)
    >>> batches, groups = [(x, torch.arange(8) % 2)], couple(model, trace(model, x))
    >>> ablation(model, CrossEntropy(), batches, groups, rng=rng)[0]
    tensor(0.)
    """
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
    """Random numbers from 0 to 1: the baseline without any information about the model.

    >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.zeros(1, 4)
    >>> random(model, CrossEntropy(), [], couple(model, trace(model, x)), rng=torch.Generator().manual_seed(0))
    tensor([0.4963, 0.7682, 0.0885])
    """
    return torch.rand(len(groups), generator=rng)


def uniform(
    model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator, order: int = 1
) -> Scores:
    """The rank by `magnitude` within the layer, from 0 to 1, so that a plan prunes the same share of every layer.

    A group of several layers counts in the first of them.

    >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[-1.0], [2.0], [3.0]]))
    >>> groups = couple(model, trace(model, torch.zeros(1, 1)))
    >>> uniform(model, CrossEntropy(), [], groups, rng=torch.Generator())
    tensor([0.1667, 0.5000, 0.8333])
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
    """Within a layer, the order in which channels can be removed if the readers' other weights compensate for them.

    Greedy: the next channel is the one whose removal increases the squared error of the readers' outputs least; after
    each removal the inverse covariances and weights are updated [Hassibi93; Kurtic23]. `allocation` decides how many
    go in each layer: "uniform" for the same share, "trace" or "magnitude" for as many as these scores take. `ridge`: in
    units of the mean variance of a reader's inputs. Groups for which no reader can compensate have the highest scores;
    with `inner`, also those of residual streams, which the
    allocation alone orders. HapError for another `allocation`.

    >>> model, rng = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.Generator().manual_seed(0)
    >>> _ = model[1].weight.data[:, 0].zero_()  # row 0 of the first layer has no effect
    >>> x = torch.rand(8, 4, generator=rng)
    >>> batches, groups = [(x, torch.arange(8) % 2)], couple(model, trace(model, x))
    >>> obs(model, CrossEntropy(), batches, groups, rng=rng).argmin().item()
    0
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
    """As `obs`, but greedy selection: the next channel to keep explains most of what is left of the readers' outputs.

    The ranking of [Xie21]. # upstream: has no ridge, and skips a channel where a Cholesky factor fails.

    >>> model, rng = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.Generator().manual_seed(0)
    >>> _ = nn.init.eye_(model[0].weight), model[1].weight.data[:, 0].zero_()  # row 0 is input 0, and has no effect
    >>> x = torch.randn(64, 3, generator=rng)
    >>> groups = couple(model, trace(model, x))
    >>> cap(model, CrossEntropy(), [(x, torch.arange(64) % 2)], groups, rng=rng).argmin().item()
    0
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
    """The groups of each layer; a group of several layers is in the first of them."""
    row = torch.full((len(groups),), len(groups.row_group))
    of = groups.row_group
    row.scatter_reduce_(0, of[of >= 0], (of >= 0).nonzero()[:, 0], "amin")
    shapes = groups.shapes.values()
    found = [((row >= s.first_row) & (row < s.first_row + s.rows)).nonzero()[:, 0] for s in shapes]
    return [layer for layer in found if len(layer)]


def _within_layers(groups: Groups, scores: Scores) -> Scores:
    """The scores, divided by the root of the sum of squares over groups that the same layer reads alone."""
    of, layer = slot_groups(groups), torch.full((len(groups),), len(groups.shapes))
    for i, s in reversed(list(enumerate(groups.shapes.values()))):
        reads = of[s.slots_at]
        layer[reads[reads >= 0]] = i
    squares = torch.zeros(len(groups.shapes) + 1, dtype=scores.dtype).index_add_(0, layer, scores.square())
    return scores / (squares.sqrt() + 1e-20)[layer]


def _as_it_is(scores: Scores) -> Scores:
    return scores


def _weights(model: nn.Module, groups: Groups, function: Any) -> dict[str, Tensor]:
    """Parameter name -> function(weight), for all weights of which the groups are made."""
    names = [weight_of(name) for name, shape in groups.shapes.items() if shape.mixing]
    names = names if groups.slot_group is None else groups.weights()
    weights = {name: model.get_parameter(name).detach() for name in names}
    refuse_unfinite("score", weights)
    return {name: function(weight) for name, weight in weights.items()}


def _size(model: nn.Module, groups: Groups) -> Scores:
    """The number of weights of each group."""
    return groups.reduce(_weights(model, groups, torch.ones_like)).cpu()
