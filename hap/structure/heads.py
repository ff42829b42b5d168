"""Groups whose rows no slot can tell apart, as queries, keys and values of one attention head; knows no attention.

What an attention head computes is a mixture over all its queries and keys, so each slot behind it is fed by many rows
of one module: that, and no name or shape, is what makes a group a head here.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hap import HapError
from hap.structure.bypass import Lender
from hap.structure.groups import Groups, ambiguous
from hap.structure.layers import starts
from hap.structure.tracing import Feeds


class Around(NamedTuple):
    """The two layers that a head lies between: it reads what `source` reads, and `reader` reads what it writes."""

    source: str
    reader: str


# what modules around such layers call the number of their heads, and the width that these have together
COUNTERS = (
    *("num_heads", "num_attention_heads", "n_heads", "num_kv_heads", "num_key_value_heads"),
    *("attn_dim", "all_head_size", "kv_dim"),
)


def heads(groups: Groups) -> Groups:
    """The attention heads among the groups, alone, each with the columns that read it.

    The rows of queries, keys and values, and the columns of the output projection, so that [Yu22]'s p counts all of a
    head's weights. Our choice: the head pruning of [Yu22] is not published. HapError where there is no head.
    """
    readers = slot_groups(groups)
    of = torch.unique(readers[_mixed(groups.feeds) & (readers >= 0)])
    if not len(of):
        raise HapError("heads: a model with attention expected, found no group whose rows act together")
    number = torch.full((len(groups) + 1,), -1)  # the last is what is in no group
    number[of] = torch.arange(len(of))
    return replace(groups, row_group=number[groups.row_group], slot_group=number[readers], _count=len(of))


def _mixed(feeds: Feeds) -> Bool[Tensor, "slots"]:
    """Slots that several rows of a module feed, one of them another slot of the same reader too.

    As queries and keys do; the two halves of a gated linear unit feed one slot each.
    """
    row, slot = feeds.edges
    reader = torch.repeat_interleave(torch.arange(len(feeds.slots)), torch.tensor(feeds.slots, dtype=torch.long))
    _, which, count = torch.unique(row * len(feeds.slots) + reader[slot], return_inverse=True, return_counts=True)
    return ambiguous(feeds) & torch.zeros_like(feeds.frozen_slots).index_fill_(0, slot[count[which] > 1], True)


def around(groups: Groups, head: int) -> Around:
    """The layers that a head lies between; HapError where it is between others than two linear layers' positions.

    The source is the first of its layers that has as many positions as the reader: that of the queries.
    """
    assert groups.slot_group is not None
    linear = {name: s for name, s in groups.shapes.items() if s.linear}
    readers = [name for name, s in linear.items() if bool((groups.slot_group[s.slots_at] == head).any())]
    sources = [
        name
        for name, s in linear.items()
        if bool((groups.row_group[s.rows_at] == head).any()) and s.positions == groups.shapes[readers[0]].positions
    ]
    if len(readers) != 1 or not sources:
        found = f"{len(readers)} readers and {len(sources)} layers of as many positions as they"
        raise HapError(f"heads: for an implant a head with one reader, and a layer before it, expected; found {found}")
    return Around(sources[0], readers[0])


def slot_groups(groups: Groups) -> Int[Tensor, "slots"]:
    """The group that feeds each slot of a mixing module, where one alone does; else -1."""
    row, slot = groups.feeds.edges
    of = groups.row_group[row]
    low, high = (torch.full((len(groups.feeds.frozen_slots),), start) for start in (len(groups), -1))
    low, high = low.scatter_reduce(0, slot, of, "amin"), high.scatter_reduce(0, slot, of, "amax")
    mixing = torch.zeros_like(groups.feeds.frozen_slots)
    for shape in groups.shapes.values():
        mixing[shape.slots_at] = shape.mixing
    return torch.where((low == high) & mixing & ~groups.feeds.frozen_slots, low, -1)


def recount(small: nn.Module, dense: nn.Module, feeds: Feeds, left: Mapping[str, int]) -> None:
    """Brings COUNTERS of the modules around heads to what is left, in place: some forward passes read them.

    `left`: of each layer that was cut, how many rows stay. Only layers whose rows act together are looked at.
    """
    row, slot = feeds.edges
    joint = torch.zeros_like(feeds.frozen_rows).index_fill_(0, row[ambiguous(feeds)[slot]], True)
    for name, (first, last) in zip(feeds.modules, pairwise(starts(feeds.rows)), strict=True):
        if name not in left or not bool(joint[first:last].any()):
            continue
        parent = name.rpartition(".")[0]
        if isinstance(dense.get_submodule(parent), Lender):  # in a model that was pruned before
            parent = parent.rpartition(".")[0]
        for counter in COUNTERS:
            whole = getattr(dense.get_submodule(parent), counter, None)
            if isinstance(whole, int) and whole * left[name] % (last - first) == 0:
                setattr(small.get_submodule(parent), counter, whole * left[name] // (last - first))
