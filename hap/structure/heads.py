"""Attention heads among the groups: rows that no slot can tell apart, as the queries, keys and values of one head.

The output of an attention head depends on all its queries and keys, so each slot behind it is fed by many rows of one
module. A group is a head here by this property, not by a name or a shape; this file knows no attention layer.
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
    """Names of the layers before and behind a head: it reads the input of `source`, and `reader` reads its output."""

    source: str
    reader: str


# attributes of the parent module of such layers: the number of heads, and the width of all heads together
COUNTERS = (
    *("num_heads", "num_attention_heads", "n_heads", "num_kv_heads", "num_key_value_heads"),
    *("attn_dim", "all_head_size", "kv_dim"),
)


def heads(groups: Groups) -> Groups:
    """The attention heads among `groups`, as groups of rows and slots; all other groups are left out.

    A head has the rows of its queries, keys and values and the columns of the output projection that read it, so that
    p of [Yu22, sec. 3] counts all of its weights. Our choice: [Yu22] does not publish its head pruning. HapError where
    no group is a head.

    >>> mix = nn.Unflatten(-1, (-1, 2)), nn.Softmax(-1), nn.Flatten(-2)  # mixes two rows, as attention mixes a head's
    >>> model = nn.Sequential(nn.Linear(4, 4), *mix, nn.Linear(4, 3))
    >>> pairs = heads(couple(model, trace(model, torch.zeros(1, 4))))
    >>> pairs.row_group.tolist(), pairs.slot_group.tolist()  # rows and slots of the first and the last layer
    ([0, 0, 1, 1, -1, -1, -1], [-1, -1, -1, -1, 0, 0, 1, 1])
    """
    readers = slot_groups(groups)
    of = torch.unique(readers[_mixed(groups.feeds) & (readers >= 0)])
    if not len(of):
        raise HapError("heads: a model with attention expected, found no group whose rows act together")
    number = torch.full((len(groups) + 1,), -1)  # index -1, the last, stands for rows and slots in no group
    number[of] = torch.arange(len(of))
    return replace(groups, row_group=number[groups.row_group], slot_group=number[readers], _count=len(of))


def _mixed(feeds: Feeds) -> Bool[Tensor, "slots"]:
    """Mask of the slots that several rows of a module feed, at least one of which feeds two slots of the same reader.

    Queries and keys do; in a gated linear unit, each row feeds one slot only.
    """
    row, slot = feeds.edges
    reader = torch.repeat_interleave(torch.arange(len(feeds.slots)), torch.tensor(feeds.slots, dtype=torch.long))
    _, which, count = torch.unique(row * len(feeds.slots) + reader[slot], return_inverse=True, return_counts=True)
    return ambiguous(feeds) & torch.zeros_like(feeds.frozen_slots).index_fill_(0, slot[count[which] > 1], True)


def around(groups: Groups, head: int) -> Around:
    """The layers before and behind group `head` of `heads`.

    `source` is the first layer with rows of the head that has as many positions as `reader`: that of the queries.
    HapError where the head has more than one reader, or no such source.

    >>> mix = nn.Unflatten(-1, (-1, 2)), nn.Softmax(-1), nn.Flatten(-2)  # mixes two rows, as attention mixes a head's
    >>> model = nn.Sequential(nn.Linear(4, 4), *mix, nn.Linear(4, 3))
    >>> around(heads(couple(model, trace(model, torch.zeros(1, 4)))), 0)
    Around(source='0', reader='4')
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
    """The group that feeds each slot of a mixing module; -1 where several groups do, or rows in no group.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> slot_groups(couple(model, trace(model, torch.zeros(1, 4)))).tolist()  # 4 slots of layer 0, 2 of layer 2
    [-1, -1, -1, -1, 0, 1]
    """
    row, slot = groups.feeds.edges
    of = groups.row_group[row]
    low, high = (torch.full((len(groups.feeds.frozen_slots),), start) for start in (len(groups), -1))
    low, high = low.scatter_reduce(0, slot, of, "amin"), high.scatter_reduce(0, slot, of, "amax")
    mixing = torch.zeros_like(groups.feeds.frozen_slots)
    for shape in groups.shapes.values():
        mixing[shape.slots_at] = shape.mixing
    return torch.where((low == high) & mixing & ~groups.feeds.frozen_slots, low, -1)


def recount(small: nn.Module, dense: nn.Module, feeds: Feeds, left: Mapping[str, int]) -> None:
    """Set the COUNTERS of the modules that contain heads to the numbers after pruning, in place.

    Some forward passes read these attributes. `dense`: the model before pruning; `left`: name of each pruned layer ->
    number of rows that remain. Only layers whose rows no slot can tell apart count.

    >>> mix = nn.Unflatten(-1, (-1, 2)), nn.Softmax(-1), nn.Flatten(-2)  # mixes two rows, as attention mixes a head's
    >>> model = nn.Sequential(nn.Linear(4, 4), *mix, nn.Linear(4, 3))
    >>> model.num_heads = 2
    >>> recount(model, model, trace(model, torch.zeros(1, 4)), {"0": 2})
    >>> model.num_heads
    1
    """
    row, slot = feeds.edges
    joint = torch.zeros_like(feeds.frozen_rows).index_fill_(0, row[ambiguous(feeds)[slot]], True)
    for name, (first, last) in zip(feeds.modules, pairwise(starts(feeds.rows)), strict=True):
        if name not in left or not bool(joint[first:last].any()):
            continue
        parent = name.rpartition(".")[0]
        if isinstance(dense.get_submodule(parent), Lender):  # `dense` was pruned before
            parent = parent.rpartition(".")[0]
        for counter in COUNTERS:
            whole = getattr(dense.get_submodule(parent), counter, None)
            if isinstance(whole, int) and whole * left[name] % (last - first) == 0:
                setattr(small.get_submodule(parent), counter, whole * left[name] // (last - first))
