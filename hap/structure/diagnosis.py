"""Why the rows of a module could not be followed: the model draws, decides by its data, or swallows NaN.

Only a trace or a check that has failed comes here, so that nothing in this file need be fast. It knows ops and frames
of Python, no layers.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hap import HapError
from hap.structure.layers import Call, innermost
from hap.structure.taps import Taps


class Note(NamedTuple):
    """An op that draws, or hands a number to Python, as `bool` and `item` do."""

    op: str
    where: str  # the module in whose forward it is, with file and line
    number: bool | float | complex | None  # what was handed to Python; None of a draw


def cause(taps: Taps, index: int) -> str:
    """What is true of a model in which a NaN from the rows of module `index` gets lost, and what to do."""
    do = "make the module around it opaque=[...], or give the relation with declare()"
    if decides := _decides(taps, index):
        return f"an `if`, a loop or item() depends on its numbers in {decides}, which cannot be followed: {do}"
    return f"an op after it swallows NaN (nan_to_num, where, comparison, argmax) or drops it: {do}"


@torch.no_grad()
def refuse_random(model: nn.Module, example: Any, call: Call) -> None:
    """HapError, with the op that draws and its module, where two passes over the example differ."""
    passes = []
    for _ in range(2):
        watch = _Watch(model)
        with watch:
            output = call(model, example)
        passes.append([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
    if all(torch.allclose(a.double(), b.double(), 1e-4, 1e-6, equal_nan=True) for a, b in zip(*passes, strict=True)):
        return  # kernels of a GPU may differ by rounding
    first = next((note for note in watch.notes if note.number is None), None)
    cause = f"{first.op} draws in {first.where}" if first else "no op of torch draws"
    do = "leave no randomness on in eval mode: F.dropout takes training=self.training"
    raise HapError(f"{type(model).__name__}: two passes over one example differ ({cause}); {do}")


def _decides(taps: Taps, index: int) -> str:
    """Where a number is handed to Python that is another one when the rows of the module are NaN; else nothing."""
    handed = []
    for writes in ({}, {index: torch.ones(1, taps.rows[index], dtype=torch.bool)}):
        watch = _Watch(taps.model)
        with watch:
            taps.send(1, writes)
        handed.append([note for note in watch.notes if note.number is not None])
    clean, spoilt = handed
    for one, other in zip(clean, spoilt, strict=False):
        if one.number != other.number:  # NaN differs from all
            return other.where
    longer = max(handed, key=len)
    return longer[min(map(len, handed))].where if len(clean) != len(spoilt) else ""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes ops that draw random numbers or hand a number to Python."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.notes = model, list[Note]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn or func is torch.ops.aten._local_scalar_dense.default:
            name = func.overloadpacket.__name__.strip("_")
            self.notes.append(Note(name, _where(self.model), None if drawn else result))
        return result


def _where(model: nn.Module) -> str:
    """The innermost module that is running, with the line of its forward."""
    frames = list(_running(sys._getframe(1)))
    module, frame = innermost(reversed(frames), model)
    place = f", {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
    return f"{module}{place}"


def _running(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
