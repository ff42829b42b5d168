"""Which rows of a model feed which slots, measured with NaNs that are sent through it.

A row is an output channel of a mixing module (convolution, linear layer) or a channelwise one (batch normalisation);
a slot is an input channel. Elementwise ops, sums, concatenation, pooling and reshapes keep a NaN, so the slots where a
NaN arrives are the slots that its row feeds. This file knows no architecture and no attention. Three things can go
wrong: ops that drop NaNs (finite noise, sent beside each NaN, detects most of them); weights that are read without a
call of their module (refused where the module is never called); and widths that are constants in a forward pass (a
reshape to a fixed number of heads, a channel shuffle). So call `hap.testing.check_groups` once for every new model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hap import HapError
from hap.structure.diagnosis import cause, refuse_random
from hap.structure.layers import Call, evaluating, forward, plain_kernels, sort, starts, uncompiled
from hap.structure.taps import Taps

SAMPLES = 64  # per pass: enough that the time of Python is small, few enough to bound the memory


@dataclass(frozen=True, eq=False)
class Feeds:
    """The relation row -> slot of one model as integer arrays; rows and slots are numbered over all its modules."""

    modules: tuple[str, ...]  # names of the sliced modules
    rows: tuple[int, ...]  # number of rows of each module
    slots: tuple[int, ...]  # number of slots of each module
    positions: tuple[int, ...]  # output positions per sample of each module, over all its calls, to count MACs
    edges: Int[Tensor, "2 edges"]  # one column (row, slot) for each pair
    frozen_rows: Bool[Tensor, "rows"]  # rows that reach the output or a module that is not sliced
    frozen_slots: Bool[Tensor, "slots"]  # slots that the input, an embedding or a bare parameter feeds
    follows: dict[str, str]  # mixing module -> the channelwise module that reads its output unchanged, if any
    padded_slots: Bool[Tensor, "slots"]  # slots that read a channel of padding, which no plan removes


@torch.inference_mode(mode=False)
@torch.no_grad()
def trace(model: nn.Module, example: Any, *, call: Call = forward, opaque: Sequence[str] = ()) -> Feeds:
    """The relation row -> slot of a model: which output channels feed which input channels.

    `example`: input of the model, tensors with the batch on their first axis, of which the first sample is used.
    `call(model, example)` gives the output. `opaque`: names of modules to leave whole; rows that feed them and slots
    that they feed are frozen. The model runs in eval mode and is restored afterwards. HapError, with the module's name
    and advice, where a model cannot be traced.

    >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    >>> feeds = trace(model, torch.zeros(1, 3, 2, 2))
    >>> feeds.modules, feeds.rows, feeds.slots
    (('0', '3'), (2, 5), (3, 8))
    >>> feeds.edges.T.tolist()  # channel 0 feeds slots 3 to 6, channel 1 slots 7 to 10
    [[0, 3], [0, 4], [0, 5], [0, 6], [1, 7], [1, 8], [1, 9], [1, 10]]
    """
    sliced, barriers = sort(model, opaque)
    with plain_kernels(), uncompiled(model), evaluating(model):
        taps = Taps(model, sliced, barriers, call)
        taps.record(example)
        _refuse_uncalled(taps)
        outside, padded = _outside(taps), taps.send(1, {}, padding=True).nans[0]
        reach = _reach(taps)
        edges = [_decode(taps, reach, colour) for colour in _colours(reach)]
    return _assemble(taps, torch.cat([torch.empty(2, 0, dtype=torch.long), *edges], dim=1), outside, padded)


@torch.inference_mode(mode=False)
@torch.no_grad()
def declare(
    model: nn.Module,
    example: Any,
    table: Sequence[tuple[str, str, Sequence[int], Sequence[int]]],
    *,
    frozen: Sequence[str],
    call: Call = forward,
) -> Feeds:
    """Feeds from a table, for a model that `trace` refuses.

    `table`: (writer, reader, rows, slots), where rows[i] of the module `writer` feeds slots[i] of the module `reader`,
    numbered within their modules. Frozen are all rows of the modules in `frozen`, and the slots that are not in the
    table. `example` and `call` as for `trace`. HapError for unknown names, numbers out of range and lists of unequal
    length; whether the table is true, `hap.testing.check_groups` checks.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    >>> feeds = declare(model, torch.zeros(1, 4), [("0", "2", [0, 1], [0, 1])], frozen=["2"])
    >>> len(couple(model, feeds))
    2
    """
    sliced, barriers = sort(model, ())
    with plain_kernels(), uncompiled(model), evaluating(model):
        taps = Taps(model, sliced, barriers, call)
        taps.record(example)
        padded = taps.send(1, {}, padding=True).nans[0]
    index = {name: i for i, name in enumerate(taps.names)}
    if unknown := ({name for pair in table for name in pair[:2]} | set(frozen)) - set(index):
        raise HapError(f"declared table: {min(unknown)} is not a convolution, linear or BatchNorm layer of the model")
    pairs = [_declared(taps, index[w], index[r], list(rows), list(slots)) for w, r, rows, slots in table]
    edges = torch.cat([torch.empty(2, 0, dtype=torch.long), *pairs], dim=1)
    unnamed = torch.ones(taps.slot_starts[-1], dtype=torch.bool).index_fill_(0, edges[1], False)
    feeds = _assemble(taps, edges, unnamed, padded)
    for name in frozen:
        first, last = list(pairwise(starts(feeds.rows)))[index[name]]
        feeds.frozen_rows[first:last] = True
    return feeds


def _declared(taps: Taps, writer: int, reader: int, rows: list[int], slots: list[int]) -> Tensor:
    for picked, width, kind in ((rows, taps.rows[writer], "row"), (slots, taps.slots[reader], "slot")):
        wrong = [i for i in picked if not 0 <= i < width]
        if wrong or len(rows) != len(slots):
            found = f"{kind} {wrong[0]} of {width}" if wrong else f"{len(rows)} rows for {len(slots)} slots"
            raise HapError(f"declared table: {taps.names[writer]} -> {taps.names[reader]}: found {found}")
    return torch.tensor([rows, slots]) + torch.tensor([[starts(taps.rows)[writer]], [taps.slot_starts[reader]]])


def _refuse_uncalled(taps: Taps) -> None:
    for module, name in taps.tapped.items():
        if module in taps.index and not taps.outputs[module]:
            why = "not called by the model; put nn.Identity there if it is unused, else pass opaque=[its reader]"
            raise HapError(f"{name} ({type(module).__name__}): {why}")


def _outside(taps: Taps) -> Tensor:
    """Mask of the slots that something else than a row feeds: the input, an embedding, a bare parameter or buffer."""
    others = [m for m in taps.model.modules() if m not in taps.index]
    bare = [t for m in others for t in [*m.parameters(False), *m.buffers(False)]]
    # a single number is broadcast over all channels that remain, so it freezes none
    bare = [t for t in bare if t.is_floating_point() and t.numel() > 1]
    kept = [t.data for t in bare]
    try:
        for t in bare:
            t.data = torch.full_like(t, torch.nan)
        return taps.send(1, {}, outside=True).nans[0]
    finally:
        for t, value in zip(bare, kept, strict=True):
            t.data = value


def _reach(taps: Taps) -> Tensor:
    """[modules, slots]: whether any row of the module feeds the slot."""
    parts = []
    for first in range(0, len(taps.modules), SAMPLES // 2):
        part = range(len(taps.modules))[first : first + SAMPLES // 2]
        n = len(part)
        writes = {i: (torch.arange(2 * n + 1) == i - first)[:, None].expand(-1, taps.rows[i]) for i in part}
        seen = taps.send(2 * n + 1, writes, shaken=n)
        if seen.nans[2 * n].any():  # the clean sample
            raise HapError("trace: the model gives NaN for the example as it is, or lets one sample change another")
        _refuse_swallowed(taps, part, seen.nans[:n], seen.moved[:n])
        parts.append(seen.nans[:n])
    return torch.cat(parts) if parts else torch.zeros(0, taps.slot_starts[-1], dtype=torch.bool)


def _refuse_swallowed(taps: Taps, part: range, nans: Tensor, moved: Tensor) -> None:
    for i, lost, arrived in zip(part, moved & ~nans, nans, strict=True):
        if not lost.any() and arrived.any():
            continue
        refuse_random(taps.model, taps.example, taps.call)
        slot = int(lost.nonzero()[0]) if lost.any() else -1
        reader = sum(slot >= first for first in taps.slot_starts) - 1
        where = taps.names[reader] if 0 <= reader < len(taps.names) else "a normalisation or the output"
        symptom = (
            f"changes {where} but a NaN sent through it does not arrive there" if lost.any() else "reaches nothing"
        )
        raise HapError(f"{taps.names[i]}: its output {symptom}; {cause(taps, i)}")


def _colours(reach: Tensor) -> list[list[int]]:
    """Sets of modules that can be probed in one pass, because no two of a set feed one slot."""
    conflict = (reach.float() @ reach.float().T) > 0
    colours: list[list[int]] = []
    for i in range(len(reach)):
        colour = next((c for c in colours if not conflict[i, c].any()), [])
        if not colour:
            colours.append(colour)
        colour.append(i)
    return colours


def _decode(taps: Taps, reach: Tensor, colour: list[int]) -> Tensor:
    """Edges [2, edges] of the modules of one colour: the samples are the bits of a row's number (1: NaN)."""
    bits = max(1, (max(taps.rows[i] for i in colour) - 1).bit_length())
    writes = {}
    for i in colour:
        code = (torch.arange(taps.rows[i]) >> torch.arange(bits)[:, None]) & 1
        writes[i] = torch.cat([code, 1 - code]).bool()
    ones, zeros = taps.send(2 * bits, writes).nans.reshape(2, bits, -1)
    writer = torch.tensor(colour)[reach[colour].int().argmax(0)]
    clear = (ones ^ zeros).all(0)
    number = (ones.int() << torch.arange(bits)[:, None]).sum(0) + torch.tensor(starts(taps.rows))[writer]
    edges = torch.stack([number, torch.arange(len(number))])[:, clear]
    unclear = (ones & zeros).any(0)  # a bit that is both 0 and 1: several rows feed the slot
    return torch.cat([edges, *_row_by_row(taps, [i for i in colour if (reach[i] & unclear).any()], reach, unclear)], 1)


def _row_by_row(taps: Taps, colour: list[int], reach: Tensor, unclear: Tensor) -> Iterator[Tensor]:
    columns = {i: (reach[i] & unclear).nonzero()[:, 0] for i in colour}  # only these slots, which are few
    for first in range(0, max((taps.rows[i] for i in colour), default=0), SAMPLES):
        rows = torch.arange(first, first + SAMPLES)
        writes = {i: rows[:, None] == torch.arange(taps.rows[i]) for i in colour}
        nans = taps.send(len(rows), writes).nans
        for i in colour:
            sample, slot = nans[:, columns[i]].nonzero(as_tuple=True)
            yield torch.stack([rows[sample] + starts(taps.rows)[i], columns[i][slot]])


def _assemble(taps: Taps, edges: Tensor, outside: Tensor, padded: Tensor) -> Feeds:
    slots = taps.slot_starts[-1]
    sunk = edges[1] >= slots
    frozen_rows = torch.zeros(sum(taps.rows), dtype=torch.bool).index_fill_(0, edges[0][sunk], True)
    frozen_slots = outside[:slots].clone()
    for i in _sharing(taps):
        frozen_rows[starts(taps.rows)[i] : starts(taps.rows)[i + 1]] = True
        frozen_slots[taps.slot_starts[i] : taps.slot_starts[i + 1]] = True
    fed, positions = edges[:, ~sunk], taps.positions()
    return Feeds(
        taps.names, taps.rows, taps.slots, positions, fed, frozen_rows, frozen_slots, taps.follows, padded[:slots]
    )


def _sharing(taps: Taps) -> list[int]:
    """Indices of the modules that share a parameter with another module: a cut for one would cut the other."""
    owners = Counter(id(p) for m in taps.model.modules() for p in m.parameters(False))
    return [i for i, m in enumerate(taps.modules) if any(owners[id(p)] > 1 for p in m.parameters(False))]
