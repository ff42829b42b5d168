"""A fate for each group, from scores and a budget; the cost of a plan is computed exactly."""

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from fnmatch import fnmatchcase
from math import floor
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hap import HapError
from hap.budget import ROUNDING
from hap.budget import Budget as Budget
from hap.structure.groups import Groups, Shape, describe_group
from hap.structure.heads import around


class Fate(IntEnum):
    """What happens to a group: its rows are removed, replaced by an implant, or kept."""

    DROP = 0
    IMPLANT = 1
    KEEP = 2


LETTER = {Fate.DROP: "-", Fate.IMPLANT: "o", Fate.KEEP: "#"}


class Cost(NamedTuple):
    """What remains of a model: parameters, MACs per sample of its sliced layers, and the number of groups kept."""

    params: int
    macs: int
    groups: int


@dataclass(frozen=True)
class Plan:
    """The fate of every row, and what the plan removes.

    `rows`: module -> one letter for each row, `#` keep, `o` implant, `-` drop. `removed`: unit -> the fraction removed.
    `budget`: the fields of the budget. `added`: module -> number of new parameters of the pruned model, as biases of an
    update or layers of a method, which `removed` does not count.
    """

    rows: Mapping[str, str]
    removed: Mapping[str, float] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)  # before and after, by unit

    @staticmethod
    def of(groups: Groups, fates: Int[Tensor, "groups"], budget: Mapping[str, Any] | None = None) -> "Plan":
        """The plan in which group i has the fate fates[i]."""
        letters = [LETTER[Fate(fate)] for fate in by_row(groups, fates).tolist()]
        rows = {n: "".join(letters[s.rows_at]) for n, s in groups.shapes.items() if s.mixing}
        rank = (budget or {}).get("rank")
        whole, left = cost(groups, torch.full_like(fates, int(Fate.KEEP))), cost(groups, fates, rank)
        removed = {k: 1 - getattr(left, k) / max(1, getattr(whole, k)) for k in Cost._fields}
        if "prunable" in (budget or {}):
            least = cost(groups, torch.full_like(fates, int(Fate.DROP))).params
            removed["prunable"] = (whole.params - left.params) / (whole.params - least)
        sizes = {"parameters": (whole.params, left.params), "MACs": (whole.macs, left.macs)}
        return Plan(rows, removed, budget or {}, sizes=sizes)

    def fates(self, groups: Groups) -> Int[Tensor, "groups"]:
        """The fate of each group; HapError where the rows of the plan are not those of `groups`."""
        wide = {name: s.rows for name, s in groups.shapes.items() if s.mixing}
        for name in [*wide, *self.rows]:
            found, expected = len(self.rows.get(name, "")), wide.get(name, 0)
            if found != expected:
                raise HapError(f"plan: {name} with {expected} rows expected, as in the model, found {found}")
        index = {letter: int(fate) for fate, letter in LETTER.items()}
        lines = "".join(self.rows.get(name, LETTER[Fate.KEEP] * s.rows) for name, s in groups.shapes.items())
        fate = torch.tensor([index[letter] for letter in lines], dtype=torch.long)
        of = groups.row_group
        fates = torch.full((len(groups),), int(Fate.KEEP)).index_copy(0, of[of >= 0], fate[of >= 0])
        if not torch.equal(by_row(groups, fates), fate):
            raise HapError("plan: rows that must share a fate do not, or a frozen row is pruned")
        return fates

    @property
    def rank(self) -> int | None:
        """Rank of the maps that replace implanted heads; None where implants are pointwise convolutions."""
        return self.budget.get("rank")

    def __str__(self) -> str:
        """A table of the sizes before and after, where known, and of the layers that lose rows."""
        lines = [f"{'':14}{'before':>16}{'after':>16}{'left':>8}"] if self.sizes else []
        for unit, (before, after) in self.sizes.items():
            numbers = [f"{each:,d}" if isinstance(each, int) else f"{each:.4g}" for each in (before, after)]
            lines.append(f"{unit:14}{numbers[0]:>16}{numbers[1]:>16}{after / max(before, 1e-300):8.1%}")
        cut = {name: line for name, line in self.rows.items() if set(line) - {LETTER[Fate.KEEP]}}
        lines.append(f"{len(cut)} of {len(self.rows)} layers lose rows" + ":" * bool(cut))
        wide = max(map(len, cut), default=0)
        for name, line in cut.items():
            kept, implants = (line.count(LETTER[fate]) for fate in (Fate.KEEP, Fate.IMPLANT))
            lines.append(f"  {name:{wide}} {kept:5} of {len(line):5}" + f", {implants} implants" * bool(implants))
        lines += [f"  {name:{wide}} {count:5} parameters more" for name, count in self.added.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A dict for JSON, with one line for each module, so that a reader can compare two plans."""
        told = {"budget": dict(self.budget), "removed": dict(self.removed), "rows": dict(self.rows)}
        return told | ({"added": dict(self.added)} if self.added else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Plan":
        """The plan from the dict that `to_json` gives; HapError where its entries are not of the right kind."""
        rows = data.get("rows")
        if not isinstance(rows, Mapping) or any(set(str(line)) - set(LETTER.values()) for line in rows.values()):
            raise HapError(f"plan: rows as a string of '#', 'o' and '-' for each module expected, found {rows!r:.80}")
        parts = [dict(data.get(name, {})) for name in ("removed", "budget", "added")]
        if any(not isinstance(n, int) or n < 0 for n in parts[2].values()):
            raise HapError(f"plan: numbers of added parameters by module expected, found {parts[2]!r:.80}")
        return Plan(dict(rows), *parts)


def plan(groups: Groups, scores: Float[Tensor, "groups"], budget: Budget) -> Plan:
    """The plan that prunes the groups of lowest score until the budget is met, and no more.

    A group that would bring a layer over its limit is left out, so the most sensitive rows of a layer stay. Of the
    pruned groups, the share `budget.implant` with the highest scores become implants. With `budget.multiple`, both the
    rows that are kept and those that remain, implants included, are a multiple in each layer, or all of its rows: the
    implants are a separate convolution, and layers that take none (1x1, linear) keep their rows. A residual stream of
    the union coupling is as wide as its layers together, which is not rounded. HapError where scores are not finite,
    no group may be pruned, or the budget cannot be met.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> groups = couple(model, trace(model, torch.zeros(1, 3)))
    >>> plan(groups, torch.tensor([0.3, 0.1, 0.2, 0.4]), Budget(groups=0.5)).rows
    {'0': '#--#', '2': '##'}
    """
    if not len(groups):
        raise HapError("plan: no group may be pruned; every row reaches the output or a module that cannot be sliced")
    if scores.shape != (len(groups),):
        raise HapError(f"scores: one number for each of {len(groups)} groups expected, found shape {[*scores.shape]}")
    if not bool(scores.isfinite().all()):
        wrong = (~scores.isfinite()).nonzero()[:, 0].tolist()
        first = describe_group(groups, wrong[0])
        raise HapError(f"scores: finite numbers expected, found {len(wrong)} that are not, the first that of {first}")
    order, ends = _order(groups, scores, budget)

    def fates(pruned: int) -> Int[Tensor, "groups"]:
        found = torch.full((len(groups),), int(Fate.KEEP))
        dropped = ends[bisect_left(ends, (1 - budget.implant) * pruned - 1e-9)]
        found[order[:dropped]], found[order[dropped:pruned]] = int(Fate.DROP), int(Fate.IMPLANT)
        return found

    pruned = ends[-1] if budget.ratios is not None else _enough(groups, budget, ends, fates)
    return Plan.of(groups, fates(pruned), {k: v for k, v in asdict(budget).items() if v is not None})


def _enough(groups: Groups, budget: Budget, ends: list[int], fates: Callable[[int], Tensor]) -> int:
    """The smallest of `ends`, numbers of groups that may be pruned together, that meets the budget."""
    unit = "params" if budget.unit == "prunable" else budget.unit
    whole, least = (
        getattr(cost(groups, torch.full((len(groups),), int(fate))), unit) for fate in (Fate.KEEP, Fate.DROP)
    )
    whole -= least if budget.unit == "prunable" else 0

    def removed(pruned: int) -> float:
        left = getattr(cost(groups, fates(pruned), budget.rank), unit) - (least if budget.unit == "prunable" else 0)
        return 1 - float(left / whole) + 1e-12 if whole else 0.0  # 1 - 0.9 is less than 0.1

    if (most := removed(ends[-1])) < budget.target:
        limits = ["layer_limit"] + [name for name in ("only", "except_") if getattr(budget, name) is not None]
        limits += [f"multiples of {budget.multiple}"] * bool(budget.multiple)
        limit = " and ".join(limits)
        raise HapError(f"budget.{budget.unit}: {budget.target} cannot be removed, at most {most:.4f} within {limit}")
    return ends[bisect_left(ends, budget.target, key=removed)]


def dropped(groups: Groups, fates: Int[Tensor, "groups"], rank: int | None) -> Bool[Tensor, "groups"]:
    """Mask of the groups whose rows are removed: those to drop, and with a rank those that an implant replaces."""
    if rank is not None and groups.slot_group is None:
        raise HapError(
            f"plan: heads expected for implants of rank {rank}, found groups of rows; see hap.structure.heads.heads"
        )
    return (fates != Fate.KEEP) if rank is not None else fates == Fate.DROP


def cost(groups: Groups, fates: Int[Tensor, "groups"], rank: int | None = None) -> Cost:
    """The cost of the model that remains with these fates.

    A pointwise implant has one weight for each slot that it reads. An implant of a head has `rank` weights for each
    input of the head and for each row of the layer behind it.
    """
    gone = groups.gone(dropped(groups, fates, rank))
    implant = by_row(groups, fates) == Fate.IMPLANT
    params, macs = groups.params, 0
    for head in (fates == Fate.IMPLANT).nonzero()[:, 0].tolist() if rank else ():
        source, reader = (groups.shapes[name] for name in around(groups, head))
        weights = (rank or 0) * (source.slots + reader.rows)
        params, macs = params + weights, macs + weights * reader.positions
    for s in groups.shapes.values():
        left, read = int((~gone.rows[s.rows_at]).sum()), int((~gone.slots[s.slots_at]).sum())
        small = int(implant[s.rows_at].sum()) if s.implantable else 0
        # a grouped convolution loses whole groups, so each row keeps its number of inputs
        read = read if s.conv_groups == 1 else s.slots // s.conv_groups
        weights = ((left - small) * s.kernel + small) * read
        params += weights + left * s.extras - s.rows * (s.slots // s.conv_groups * s.kernel + s.extras)
        macs += weights * s.positions
    return Cost(params, macs, int((fates == Fate.KEEP).sum()))


def by_row(groups: Groups, fates: Tensor) -> Int[Tensor, "rows"]:
    """The fate of each row; a row in no group is kept."""
    row = torch.full_like(groups.row_group, int(Fate.KEEP))
    row[groups.row_group >= 0] = fates[groups.row_group[groups.row_group >= 0]]
    return row


def _order(groups: Groups, scores: Tensor, budget: Budget) -> tuple[list[int], list[int]]:
    """The groups that may be pruned, lowest score first, within the limits of layers; and the numbers that are allowed.

    With a multiple, a group waits until enough others can go with it, so that only some numbers of groups are allowed;
    groups that still wait at the end are kept.
    """
    need = _need(groups)
    free, room = _room(groups, need, budget)
    left = Counter({layer: s.rows for layer, s in groups.shapes.items()})
    waiting = defaultdict[str, list[int]](list)

    def lump(group: int) -> list[int]:
        """The group, with as many waiting ones as leave a multiple in each layer; empty where there are too few."""
        found = [group]
        while torn := {
            layer
            for layer, rows in sum((need[each] for each in found), Counter[str]()).items()
            if (left[layer] - rows) % (budget.multiple or 1)
        }:
            more = [each for layer in sorted(torn) for each in waiting[layer] if each not in found]
            if not more:
                return []
            # groups that change no complete layer and help many others come first, then those of lowest score
            found.append(min(more, key=lambda each: (len(need[each].keys() - torn), -len(need[each].keys() & torn))))
        return found

    order, ends = list[int](), [0]
    for group in scores.argsort(stable=True).tolist():
        if free[group] and need[group] <= room:
            room.subtract(need[group])
            for layer in need[group]:
                waiting[layer].append(group)
            for each in (going := lump(group)):
                left.subtract(need[each])
                for layer in need[each]:
                    waiting[layer].remove(each)
            order += going
            ends += [len(order)] * bool(going)
    return order, ends


def _need(groups: Groups) -> list[Counter[str]]:
    """For each group, the number of its rows in each layer."""
    need: list[Counter[str]] = [Counter() for _ in range(len(groups) + 1)]  # the last: of no group
    for layer, s in groups.shapes.items():
        for group in groups.row_group[s.rows_at].tolist():
            need[group][layer] += 1
    return need[:-1]


def _room(groups: Groups, need: list[Counter[str]], budget: Budget) -> tuple[list[bool], Counter[str]]:
    """Whether each group may be pruned, and the largest number of rows that each layer may lose."""
    room = Counter[str]()
    for layer, s in groups.shapes.items():
        least = 0 if budget.layer_limit == 1 and s.linear else 1
        limit = budget.layer_limit if budget.ratios is None else 1.0
        room[layer] = min(floor(limit * s.rows + 1e-9), s.rows - least)
    # the rows of a depthwise layer are removed with their inputs, so they decide nothing
    bound = [[layer for layer in each if not _is_depthwise(groups.shapes[layer])] for each in need]
    free = [True] * len(need)
    if budget.only is not None:
        chosen = {layer for _, layers in _matches(groups, budget.only, "only") for layer in layers}
        free = [all(layer in chosen for layer in layers) for layers in bound]
    if budget.except_ is not None:
        spared = {layer for _, layers in _matches(groups, budget.except_, "except") for layer in layers}
        free = [ok and not spared & each.keys() for ok, each in zip(free, need, strict=True)]
    if budget.ratios is None:
        return free, room
    ratios = _by_layer(groups, budget.ratios)
    free = [ok and _agreed(layers, ratios) for ok, layers in zip(free, bound, strict=True)]
    for layer, ratio in ratios.items():
        sizes = [each[layer] for each, ok in zip(need, free, strict=True) if ok and layer in each]
        of = math.gcd(*sizes) or 1  # a head is removed as a whole
        wanted = min(ROUNDING[budget.rounding or "ceil"](ratio * groups.shapes[layer].rows / of) * of, room[layer])
        if sum(sizes) < wanted:
            raise HapError(f"budget.ratios: {layer}: {wanted} rows to prune, found {sum(sizes)} that may be")
        room[layer] = wanted
    return free, room


def _is_depthwise(shape: Shape) -> bool:
    return shape.conv_groups == shape.slots > 1


def _matches(groups: Groups, globs: Iterable[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Each glob with the layers that it matches, among those with rows in groups; HapError where it matches none."""
    able = [n for n, s in groups.shapes.items() if s.mixing and bool((groups.row_group[s.rows_at] >= 0).any())]
    for glob in globs:
        if not (found := [layer for layer in able if fnmatchcase(layer, glob)]):
            raise HapError(f"budget.{name}: a glob of layers whose rows may be pruned expected, found {glob!r}")
        yield glob, found


def _by_layer(groups: Groups, ratios: Mapping[str, float]) -> dict[str, float]:
    """Layer -> its ratio, for layers that a glob matches; HapError where two globs give different ratios."""
    found = dict[str, float]()
    for glob, layers in _matches(groups, ratios, "ratios"):
        for layer in layers:
            if found.setdefault(layer, ratios[glob]) != ratios[glob]:
                raise HapError(f"budget.ratios: {layer}: one ratio expected, found {found[layer]} and {ratios[glob]}")
    return found


def _agreed(layers: list[str], ratios: Mapping[str, float]) -> bool:
    """Whether the layers of a group have a ratio; HapError where their ratios differ."""
    given = {ratios.get(layer): layer for layer in reversed(layers)}
    if len(given) > 1:
        found = " and ".join(f"{'none' if ratio is None else ratio} for {layer}" for ratio, layer in given.items())
        raise HapError(f"budget.ratios: one ratio for layers whose rows go together expected, found {found}")
    return None not in given
