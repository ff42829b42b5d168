"""Groups of rows that share one fate, and what a fate removes; made from the relation of `hap.structure.tracing`.

One rule serves every architecture and both couplings: a slot is removed when every row that feeds it is removed; a row
that is removed while its slot stays is written as zero. `tied`: rows that feed one slot are in one group (one decision
for all producers of a residual stream). `union`: each row is decided alone, as in [HAP-code]; only rows that one slot
cannot tell apart (the queries, keys and values of a head, the inputs of a convolution group) are in one group.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hap import HapError
from hap.structure.layers import is_mixing, starts, weight_of
from hap.structure.tracing import Feeds


class Shape(NamedTuple):
    """The rows and slots of a sliced module, numbered within the whole model, and the numbers that give its cost."""

    first_row: int
    rows: int
    first_slot: int
    slots: int
    mixing: bool
    conv_groups: int  # of a grouped convolution; 1 for all others
    kernel: int  # weights per row and slot that it reads: the product of the kernel's sides
    extras: int  # other parameters per row: bias; scale and shift
    positions: int  # output positions per sample, summed over its calls
    implantable: bool
    linear: bool  # an nn.Linear, which may lose all of its rows

    @property
    def rows_at(self) -> slice:
        """Its rows, as a slice of all rows of the model."""
        return slice(self.first_row, self.first_row + self.rows)

    @property
    def slots_at(self) -> slice:
        """Its slots, as a slice of all slots of the model."""
        return slice(self.first_slot, self.first_slot + self.slots)


class Gone(NamedTuple):
    """Masks of the rows and slots that a plan removes, over all rows and slots of the model."""

    rows: Bool[Tensor, "rows"]
    slots: Bool[Tensor, "slots"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of one model: sets of rows of mixing modules that share one fate; for heads, sets of slots as well.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> groups = couple(model, trace(model, torch.zeros(1, 4)))
    >>> weight = torch.tensor([[1.0, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    >>> groups.reduce({"0.weight": weight})
    tensor([ 4.,  8., 12.])
    """

    feeds: Feeds
    shapes: dict[str, Shape]
    row_group: Int[Tensor, "rows"]  # the group of each row; -1 where it is frozen, or not of a mixing module
    params: int  # number of parameters of the whole model
    _count: int
    slot_group: Int[Tensor, "slots"] | None = None  # for heads, the group of each slot, or -1; None for other groups

    def __len__(self) -> int:
        """The number of groups."""
        return self._count

    def reduce(self, values: Mapping[str, Tensor]) -> Float[Tensor, "groups"]:
        """Sum of `values` over the rows of each group; `values`: parameter name -> tensor whose first axis is rows.

        Where slots belong to groups, also over the columns, so that each tensor has the shape of its weight. Missing
        parameters count as zero; parameters that are in no group are ignored. The result has the device of the values
        and at least float32; it is computed without a wait for the device.
        """
        dtype = reduce(torch.promote_types, (value.dtype for value in values.values()), torch.float32)
        total = torch.zeros(len(self), dtype=dtype, device=next((value.device for value in values.values()), None))
        for name, value in values.items():
            shape = self.shapes.get(name.rpartition(".")[0])
            if shape is None or not shape.mixing:
                continue
            of = self.row_group[shape.rows_at]
            rows = (of >= 0).nonzero()[:, 0]
            sums = value.detach().reshape(shape.rows, -1).sum(1).to(total)
            total.index_add_(0, of[rows].to(total.device), sums[rows.to(total.device)])
            of_slots = None if name.endswith("bias") else self.slot_group
            reads = of[:0] if of_slots is None else of_slots[shape.slots_at]
            if shape.conv_groups == 1 and bool((reads >= 0).any()):  # else the rows hold the columns
                columns = (reads >= 0).nonzero()[:, 0]
                # a weight in a row and in a column of one group counts once
                other = (of[:, None] != reads[columns]).to(total.device)
                whole = (
                    value.detach().reshape(shape.rows, shape.slots, -1).sum(2).to(total)[:, columns.to(other.device)]
                )
                total.index_add_(0, reads[columns].to(other.device), (whole * other).sum(0))
        return total

    def weights(self) -> list[str]:
        """Names of the weights of which at least one row or column belongs to a group."""
        members = {n: self.row_group[s.rows_at] for n, s in self.shapes.items() if s.mixing}
        if self.slot_group is not None:
            members = {n: torch.cat([of, self.slot_group[self.shapes[n].slots_at]]) for n, of in members.items()}
        return [weight_of(name) for name, of in members.items() if bool((of >= 0).any())]

    def gone(self, dropped: Bool[Tensor, "groups"]) -> Gone:
        """The rows and slots that are removed when the groups in the mask `dropped` are."""
        rows = torch.zeros_like(self.feeds.frozen_rows)
        rows[self.row_group >= 0] = dropped[self.row_group[self.row_group >= 0]]
        row, slot = self.feeds.edges
        twin_row, twin_slot = _twins(self.shapes)
        while True:
            slots = torch.zeros_like(self.feeds.frozen_slots)
            slots[slot] = True  # a slot that nothing feeds stays
            slots[slot[~rows[row]]] = False
            slots &= ~self.feeds.frozen_slots
            if torch.equal(rows[twin_row], slots[twin_slot]):
                return Gone(rows, slots)
            rows[twin_row] = slots[twin_slot]

    def norm_behind(self, name: str, rows: Int[Tensor, "some"]) -> tuple[str, Int[Tensor, "read"]]:
        """Name and slots of the normalisation that alone reads these rows of module `name`, unchanged.

        `rows` count within the module, the slots within the normalisation; one slot for each row, by increasing row.
        Where there is no such normalisation: "" and no slots.
        """
        norm = self.feeds.follows.get(name, "")
        row, slot = self.feeds.edges
        mine = torch.isin(row, rows + self.shapes[name].first_row)
        read = slot[mine]
        if not norm or len(read) != len(rows) or int(torch.isin(slot, read).sum()) != len(rows):
            return "", read[:0]
        return norm, read[row[mine].argsort()] - self.shapes[norm].first_slot


@torch.inference_mode(mode=False)
def couple(model: nn.Module, feeds: Feeds, how: Literal["tied", "union"] = "tied") -> Groups:
    """The groups of a model, from the relation row -> slot that `trace` or `declare` gives.

    `how`: "tied" or "union", see the head of this file; HapError for any other. Rows that are frozen, or share a slot
    with what is frozen, are in no group. # paper: says nothing of residual streams. # upstream: `union` (a channel of
    the stream disappears only when all its producers dropped it).

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> groups = couple(model, trace(model, torch.zeros(1, 4)))
    >>> len(groups), groups.row_group.tolist()  # the last two rows are the output of the model
    (3, [0, 1, 2, -1, -1])
    """
    if how not in ("tied", "union"):
        raise HapError(f"coupling: 'tied' or 'union' expected, found {how!r}")
    shapes = _shapes(model, feeds)
    twins, grouped = torch.stack(_twins(shapes)), _conv_groups(shapes)
    n = len(feeds.frozen_rows)
    unfed = torch.ones_like(feeds.frozen_slots).index_fill_(0, feeds.edges[1], False)
    fixed, tying = feeds.frozen_slots.clone(), torch.ones_like(unfed)
    fixed[twins[1][feeds.frozen_rows[twins[0]]]] = True  # what freezes a norm's rows freezes the rows that feed it
    if how == "union":
        tying = _upstream_of(feeds, twins, ambiguous(feeds).index_fill_(0, grouped[1], True))
        fixed |= unfed & tying
        fixed = _upstream_of(feeds, twins, fixed)
    else:
        fixed |= unfed
    kept = [pairs[:, tying[pairs[1]]] for pairs in (feeds.edges, twins)]
    pairs = torch.cat([*kept, grouped], dim=1)
    label = components(n + len(unfed), pairs[0], pairs[1] + n)
    frozen = torch.zeros(n + len(unfed), dtype=torch.bool)
    frozen[label[:n][feeds.frozen_rows]] = True
    frozen[label[:n][feeds.edges[0][fixed[feeds.edges[1]]]]] = True
    frozen[label[n:][fixed & tying]] = True
    return _number(model, feeds, shapes, label[:n], frozen)


def describe_group(groups: Groups, group: int) -> str:
    """The first row of a group and its module, as text for an error message: "row 3 of conv1"."""
    row = int((groups.row_group == group).nonzero()[0])
    name, s = next((name, s) for name, s in groups.shapes.items() if s.rows_at.start <= row < s.rows_at.stop)
    return f"row {row - s.first_row} of {name}"


def components(n: int, a: Tensor, b: Tensor) -> Int[Tensor, "nodes"]:
    """For each of `n` nodes, the smallest node of its connected component; node a[i] is linked to node b[i]."""
    label = torch.arange(n)
    while True:
        low = torch.minimum(label[a], label[b])
        lower = label.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        lower = lower.scatter_reduce(0, label, lower, "amin")  # the old root follows, so that chains collapse
        lower = lower[lower]
        if torch.equal(lower, label):
            return label
        label = lower


def _number(model: nn.Module, feeds: Feeds, shapes: dict[str, Shape], label: Tensor, frozen: Tensor) -> Groups:
    mixing = torch.zeros(len(label), dtype=torch.bool)
    for shape in shapes.values():
        mixing[shape.rows_at] = shape.mixing
    free = mixing & ~frozen[label]
    roots, number = torch.unique(label[free], return_inverse=True)
    row_group = torch.full_like(label, -1)
    row_group[free] = number
    params = sum(p.numel() for p in model.parameters())
    return Groups(feeds, shapes, row_group, params, len(roots))


def ambiguous(feeds: Feeds) -> Bool[Tensor, "slots"]:
    """Mask of the slots that several rows of one module feed: all queries of a head feed each output of the head."""
    module = torch.repeat_interleave(torch.arange(len(feeds.rows)), torch.tensor(feeds.rows, dtype=torch.long))
    row, slot = feeds.edges
    key, count = torch.unique(module[row] * len(feeds.frozen_slots) + slot, return_counts=True)
    return torch.zeros_like(feeds.frozen_slots).index_fill_(0, key[count > 1] % len(feeds.frozen_slots), True)


def _upstream_of(feeds: Feeds, twins: Tensor, slots: Tensor) -> Bool[Tensor, "slots"]:
    """The mask `slots`, and with it the slots of channelwise modules whose rows feed slots of the mask."""
    while True:
        feeding = torch.zeros_like(feeds.frozen_rows).index_fill_(0, feeds.edges[0][slots[feeds.edges[1]]], True)
        more = slots.index_fill(0, twins[1][feeding[twins[0]]], True)
        if torch.equal(more, slots):
            return slots
        slots = more


def _shapes(model: nn.Module, feeds: Feeds) -> dict[str, Shape]:
    rows, slots, shapes = starts(feeds.rows), starts(feeds.slots), {}
    for i, name in enumerate(feeds.modules):
        module, mixing = model.get_submodule(name), is_mixing(model.get_submodule(name))
        own = {key: p.numel() for key, p in module.named_parameters(recurse=False)}
        weight = own.pop("weight", 0) if mixing else 0
        conv_groups = getattr(module, "groups", 1)
        kernel = weight * conv_groups // (feeds.rows[i] * feeds.slots[i]) if mixing else 0
        shapes[name] = Shape(
            rows[i], feeds.rows[i], slots[i], feeds.slots[i], mixing, conv_groups, kernel,
            sum(own.values()) // feeds.rows[i], feeds.positions[i], implantable(module), isinstance(module, nn.Linear),
        )  # fmt: skip
    return shapes


def implantable(module: nn.Module) -> bool:
    """Whether a 1x1 convolution of the same stride can replace rows of the module, with fewer weights."""
    if not isinstance(module, _ConvNd) or module.groups > 1 or math.prod(module.kernel_size) == 1:
        return False
    if any(k % 2 == 0 for k in module.kernel_size):  # no tap at the centre
        return False
    centre = tuple(d * (k - 1) / 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding == "same" or centre == tuple(module.padding)


def _twins(shapes: dict[str, Shape]) -> tuple[Tensor, Tensor]:
    """The row and the slot of each channel of all channelwise modules: such a pair is removed together."""
    alike = [s for s in shapes.values() if not s.mixing]
    rows = [torch.arange(s.rows) + s.first_row for s in alike]
    slots = [torch.arange(s.slots) + s.first_slot for s in alike]
    none = torch.empty(0, dtype=torch.long)
    return torch.cat([none, *rows]), torch.cat([none, *slots])


def _conv_groups(shapes: dict[str, Shape]) -> Int[Tensor, "2 links"]:
    """Links row - slot that tie the rows and slots of each group of a grouped convolution."""
    links = [torch.empty(2, 0, dtype=torch.long)]
    for s in shapes.values():
        if s.conv_groups > 1:
            rows = torch.arange(s.rows).reshape(s.conv_groups, -1) + s.first_row
            slots = torch.arange(s.slots).reshape(s.conv_groups, -1) + s.first_slot
            links += [torch.stack([rows, slots[:, :1].expand_as(rows)]).flatten(1)]
            links += [torch.stack([rows[:, :1].expand_as(slots), slots]).flatten(1)]
    return torch.cat(links, dim=1)
