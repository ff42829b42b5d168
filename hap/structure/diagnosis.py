"""Why the rows of a module cannot be followed: random ops, Python branches on data, or ops that drop NaN.

These functions run only after a trace or a check has failed, so they need not be fast. They know ops of torch and
frames of Python, but no layers.
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
    """An op that draws random numbers, or that gives a number to Python, as `bool` and `item` do."""

    op: str
    where: str  # the module whose forward runs it, with file and line
    number: bool | float | complex | None  # the number that Python gets; None for a random op


def cause(taps: Taps, index: int) -> str:
    """The end of an error message: why a NaN in the rows of module `index` is lost, and what the user can do."""
    do = "make the module around it opaque=[...], or give the relation with declare()"
    if place := _branch(taps, index):
        return f"an `if`, a loop or item() depends on its numbers in {place}, which cannot be followed: {do}"
    return f"an op after it swallows NaN (nan_to_num, where, comparison, argmax) or drops it: {do}"


@torch.no_grad()
def refuse_random(model: nn.Module, example: Any, call: Call) -> None:
    """Run the model twice on the example; HapError, with the random op and its module, where the outputs differ."""
    passes = []
    for _ in range(2):
        watch = _Watch(model)
        with watch:
            output = call(model, example)
        passes.append([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
    if all(torch.allclose(a.double(), b.double(), 1e-4, 1e-6, equal_nan=True) for a, b in zip(*passes, strict=True)):
        return  # kernels of a GPU may differ by rounding
    first = next((note for note in watch.notes if note.number is None), None)
    reason = f"{first.op} draws random numbers in {first.where}" if first else "no op of torch draws random numbers"
    do = "leave no randomness on in eval mode: F.dropout takes training=self.training"
    raise HapError(f"{type(model).__name__}: two passes over one example differ ({reason}); {do}")


def _branch(taps: Taps, index: int) -> str:
    """Where Python first gets a number that changes when the rows of the module are NaN; "" where none does."""
    passes = []
    for writes in ({}, {index: torch.ones(1, taps.rows[index], dtype=torch.bool)}):
        watch = _Watch(taps.model)
        with watch:
            taps.send(1, writes)
        passes.append([note for note in watch.notes if note.number is not None])
    clean, spoilt = passes
    for one, other in zip(clean, spoilt, strict=False):
        if one.number != other.number:  # NaN differs from every number
            return other.where
    longer = max(passes, key=len)
    return longer[min(map(len, passes))].where if len(clean) != len(spoilt) else ""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes a Note of each op that draws random numbers or gives a number to Python."""

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
    """Name and class of the innermost module that is running, with the file and line of its forward."""
    frames = list(_running(sys._getframe(1)))
    module, frame = innermost(reversed(frames), model)
    place = f", {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
    return f"{module}{place}"


def _running(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
