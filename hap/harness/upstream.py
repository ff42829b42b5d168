"""What the published code [HAP-code] makes of scores, slips included: a method that a spec can name.

Each switch of `published` is one place where that code does what neither its paper nor plain sense would; as given
they follow the code. It knows the planning only: which images the Hessian sees, and which epoch is reported, are
options of the tasks and numbers of the records.
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn

from hap import HapError
from hap.harness.spec.functions import Function, Ref, resolve
from hap.harness.task import Task
from hap.plan import Budget, Fate, Plan, cost
from hap.structure.groups import Groups
from hap.surgery.apply import apply

DROP, IMPLANT, KEEP = (torch.tensor(int(fate), dtype=torch.int8) for fate in sorted(Fate))
BLOCK = 256  # ratios looked at together: [256, groups] bytes are held


class Layer(NamedTuple):
    """A layer whose rows are ranked."""

    group: Int[Tensor, "rows"]  # of each row; -1 where it stays whatever its score
    scores: Float[Tensor, "rows"]


class Slips(NamedTuple):
    """The switches of the planning, as in `published`."""

    inverted_guard: bool = True
    sorted_guard: bool = True
    floor_first: bool = True


def published(
    task: Task,
    groups: Groups,
    budget: Budget,
    *,
    rng: torch.Generator,
    score: Function = "hap.methods:hessian_trace",
    curvature: Literal["hutchinson", "exact"] = "hutchinson",
    probes: int = 3,
    implant: Function = "hap.implants:zero",
    from_ratio: float = 0.0,
    inverted_guard: bool = True,
    sorted_guard: bool = True,
    floor_first: bool = True,
    reset_pointwise: bool = True,
    biased_implants: bool = False,
) -> tuple[nn.Module, Plan]:
    """The model as [HAP-code] prunes it in one pass, and the plan, whose budget records the `ratio`.

    `budget`: groups is the code's --ratio, implant its --ni-ratio, layer_limit its --prune-ratio-limit. For params or
    macs, the least ratio that meets it, in steps of one channel, and not below `from_ratio`: with the guard inverted a
    ratio near 0 cuts every layer to its top 5 %. `curvature` and `probes` go to scores that take them. Needs union
    coupling. Raises HapError where no ratio meets the budget, and for implants of biased convolutions unless
    `biased_implants`.
    """
    implants = budget.implant > 0
    rows = int((groups.row_group >= 0).sum())
    if not rows or len(groups) != rows:
        raise HapError(f"published: union coupling expected, a row a group, found {len(groups)} groups of {rows} rows")
    # upstream: with implants a convolution with a bias ends in a NameError, so its VGG16 cannot have any
    if implants and not biased_implants and (biased := _biased(task.model, groups)):
        raise HapError(
            f"published: convolutions without bias expected where there are implants, found one at {biased}; the "
            "published code crashes there; set biased_implants = true to go on"
        )
    resolve("method.implant", "implant", Ref(use=implant))
    resolve("method.score", "score", Ref(use=score))
    offered = {"curvature": curvature, "probes": probes}
    layers = _layers(task.model, groups, implants, partial(_scores, task, score=score, offered=offered, rng=rng))
    slips = Slips(inverted_guard, sorted_guard, floor_first)
    ratios = steps(sum(len(layer.scores) for layer in layers))
    ratios = ratios[ratios >= from_ratio]
    ratio, found = _chosen(groups, budget, ratios, partial(fates, groups, layers, budget, slips=slips))
    asked = {name: value for name, value in asdict(budget).items() if value is not None}
    chosen = Plan.of(groups, found, {**asked, "ratio": ratio})
    inputs = [inputs for inputs, _ in task.batches]
    small = apply(task.model, groups, chosen, Ref(use=implant).load(), batches=inputs, call=task.loss.call)
    # upstream: a 1x1 convolution has its channels of moderate sensitivity replaced too, by 1x1 implants of zeros: the
    # trained weights are lost and nothing is saved; switched off, they stay as they are
    if reset_pointwise:
        _reset(task.model, small, chosen)
    return small, chosen


def fates(
    groups: Groups, layers: list[Layer], budget: Budget, ratios: Float[Tensor, "ratios"], slips: Slips
) -> Int8[Tensor, "ratios groups"]:
    """The fate of each group at each ratio: one threshold for all layers, and what guards a layer against it.

    # upstream: a threshold is the score at place int(ratio * N), and only scores above it are kept, so that one more
    # goes than the ratio says; scores are taken as they are, so those that noise made negative go first
    """
    pooled = torch.cat([layer.scores for layer in layers]).sort().values
    lower = (1 - budget.implant) * ratios
    found = KEEP.repeat(len(ratios), len(groups))
    for layer in layers:
        fate = _cut(layer.scores, _at(pooled, ratios), _at(pooled, lower), slips)
        fate = _guarded(layer.scores, fate, lower, budget, slips)
        free = layer.group >= 0
        found[:, layer.group[free]] = fate[:, free]
    return found


def _cut(scores: Tensor, high: Tensor, low: Tensor, slips: Slips) -> Int8[Tensor, "ratios rows"]:
    """Keep what is above `high`, implant what is above `low`, drop the rest; one row is kept."""
    fate = torch.where(scores > high[:, None], KEEP, torch.where(scores > low[:, None], IMPLANT, DROP))
    few = (fate == KEEP).sum(1, keepdim=True) <= 1
    if slips.floor_first:
        # upstream: where at most one is left, that one goes and channel 0 is kept, the most sensitive or not (with
        # implants, and channel 0 the one left, it crashes; here that is kept)
        floor = torch.where(fate == KEEP, DROP, fate).index_fill(1, torch.tensor(0), int(Fate.KEEP))
    else:
        floor = fate.index_fill(1, scores.argmax(), int(Fate.KEEP))
    return torch.where(few, floor, fate)


def _guarded(scores: Tensor, fate: Tensor, lower: Tensor, budget: Budget, slips: Slips) -> Int8[Tensor, "ratios rows"]:
    """A layer that loses more than the limit is cut at thresholds of its own instead, at the limit."""
    left, own, limit = (fate != DROP).sum(1).double() / len(scores), scores.sort().values, budget.layer_limit
    fires, low = 1 - left > limit, lower.new_tensor([(1 - budget.implant) * limit])
    again = scores
    if budget.implant and slips.inverted_guard:
        # upstream: with implants the comparison is the wrong way round: the guard fires where almost all is left, and
        # cuts the layer to its top 5 %; what loses too much is not guarded. The share of implants is the network's
        fires, low = left > limit, lower
        # upstream: it sorts the scores first, and takes places among the sorted for channel numbers: the last
        # channels are kept, whatever their scores
        again = own if slips.sorted_guard else scores
    return torch.where(fires[:, None], _cut(again, _at(own, lower.new_tensor([limit])), _at(own, low), slips), fate)


def _at(ascending: Tensor, share: Tensor) -> Tensor:
    """The score at this share of the way; the arithmetic in the order of the published code, to the last bit."""
    return ascending[(share * len(ascending)).long().clamp(max=len(ascending) - 1)]


def _chosen(
    groups: Groups, budget: Budget, ratios: Tensor, fates_at: Callable[[Tensor], Tensor]
) -> tuple[float, Int[Tensor, "groups"]]:
    """The ratio and the fates that a budget comes to."""
    if budget.groups is not None:
        return budget.groups, fates_at(torch.tensor([budget.groups], dtype=torch.double))[0].long()
    whole = getattr(cost(groups, torch.full((len(groups),), int(Fate.KEEP))), budget.unit)

    def enough(fate: Tensor) -> bool:
        return 1 - float(getattr(cost(groups, fate.long()), budget.unit) / whole) + 1e-12 >= budget.target

    for block in torch.split(ratios, BLOCK):
        table = fates_at(block)
        if (at := first(table, enough)) is not None:
            return float(block[at]), table[at].long()
    raise HapError(f"budget.{budget.unit}: {budget.target} is removed at no ratio by the rules of the published code")


def steps(n: int) -> Float[Tensor, "ratios"]:
    """The least ratio for each number of `n` channels: int(ratio * n) is 0, 1, ..., n - 1."""
    count = torch.arange(n)
    ratios = count.double() / n
    short = (ratios * n).long() < count
    return torch.where(short, torch.nextafter(ratios, torch.ones_like(ratios)), ratios)


def first(table: Int8[Tensor, "ratios groups"], enough: Callable[[Tensor], bool]) -> int | None:
    """The first line that is enough, where lower fates are never less; the lines need no order.

    The guards make what goes rise and fall with the ratio, so halving alone could miss the least. But what the lowest
    fate of each group in a stretch does not reach, no line of the stretch reaches: so whole stretches are passed over.
    """
    if not len(table) or not enough(table.amin(0)):
        return None
    if len(table) == 1:
        return 0
    half = len(table) // 2
    if (at := first(table[:half], enough)) is not None:
        return at
    at = first(table[half:], enough)
    return None if at is None else half + at


def _layers(model: nn.Module, groups: Groups, implants: bool, scored: Callable[[Groups], Tensor]) -> list[Layer]:
    # upstream: without implants the rows of the last Linear are ranked with all others and count in every threshold,
    # though they are kept; with implants only convolutions are ranked (and probed: ours probe the Linear as well, and
    # so carry its share of noise)
    ranked = (nn.Conv2d,) if implants else (nn.Conv2d, nn.Linear)
    shapes = [s for name, s in groups.shapes.items() if isinstance(model.get_submodule(name), ranked)]
    row_group, n = torch.full_like(groups.row_group, -1), 0
    for s in shapes:
        row_group[s.rows_at], n = torch.arange(n, n + s.rows), n + s.rows
    scores = scored(replace(groups, row_group=row_group, _count=n))
    if scores.shape != (n,) or not bool(scores.isfinite().all()):
        raise HapError(f"scores: {n} finite numbers expected, found {int(scores.isfinite().sum())} of {scores.numel()}")
    each = torch.split(scores.detach().cpu().double(), [s.rows for s in shapes])
    return [Layer(groups.row_group[s.rows_at], part) for s, part in zip(shapes, each, strict=True)]


def _scores(task: Task, groups: Groups, *, score: str, offered: dict[str, Any], rng: torch.Generator) -> Tensor:
    function = Ref(use=score).load()
    given = {name: value for name, value in offered.items() if name in inspect.signature(function).parameters}
    found: Tensor = function(task.model, task.loss, task.batches, groups, rng=rng, **given)
    return found


def _biased(model: nn.Module, groups: Groups) -> str | None:
    modules = {name: model.get_submodule(name) for name in groups.shapes}
    return next((name for name, m in modules.items() if isinstance(m, nn.Conv2d) and m.bias is not None), None)


@torch.no_grad()
def _reset(model: nn.Module, small: nn.Module, chosen: Plan) -> None:
    for name, line in chosen.rows.items():
        dense = model.get_submodule(name)
        if isinstance(dense, nn.Conv2d) and dense.kernel_size == (1, 1):
            moderate: Bool[Tensor, "rows"] = torch.tensor([letter == "o" for letter in line if letter != "-"])
            for p in small.get_submodule(name).parameters():  # its own or, in a Patch, those of the only part
                p[moderate.to(p.device)] = 0
