"""The dense and the pruned model side by side: the stops where their passes pause, and the tensors there.

A pass pauses after a layer, or at the first sum that has the output of the layer, or of a BatchNorm directly behind it,
as a term, because there the other term is known. Sums behind any other op are not recognised.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hap import HapError
from hap.structure.bypass import Borrower, Lender
from hap.structure.layers import Call, evaluating, first_tensor
from hap.surgery.walks import ANY, Walk, here

Stop = tuple[str, str]  # "wrote" or "added", and the reader
LIVE = 4  # tensors of the largest size that a pass holds at a layer: a stream, a branch, an input and an output
ADDS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


class Seen(NamedTuple):
    """The tensors of a pass at a layer."""

    x: Tensor  # its input
    y: Tensor  # its output
    other: Tensor | None = None  # the other term of the sum with y, or with the BatchNorm of y
    lent: Tensor | None = None  # the input of an implant beside it


@dataclass(frozen=True)
class Watched:
    """A model with hooks on its readers, which pause the current pass."""

    model: nn.Module
    norms: Mapping[str, str]  # reader -> the BatchNorm right behind it, or ""
    call: Call
    joins: frozenset[str] | None = None  # the readers whose sums are stops; None for all

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the model has the hooks and is in eval mode."""
        handles = []
        for module in self.model.modules():
            if isinstance(module, Lender | Borrower):  # all paused passes share its relay
                handles.append(module.register_forward_pre_hook(_relayed))
        for name, norm in self.norms.items():
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(_read, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._wrote, name)))
            if norm:
                handles.append(self.model.get_submodule(norm).register_forward_hook(partial(_normed, name)))
        try:
            with evaluating(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def walk(self, batch: Any) -> Walk:
        """A new pass of this batch, paused before its first layer."""

        def run() -> None:
            with torch.no_grad(), _Adding(self):
                self.call(self.model, batch)

        return Walk(run)

    def added(self, one: Any, other: Any) -> None:
        """Called before two tensors are added: pause where one of them comes from a reader."""
        if not isinstance(other, Tensor) or one.shape != other.shape:
            return
        walk, names = here(), self.norms if self.joins is None else self.joins
        pairs = ((one, other), (other, one))
        found = [(n, *pair) for n in names for pair in pairs if walk.notes.get(f"branch {n}") is pair[0]]
        if self.joins is None and found:
            walk.halt(("sum", *(name for name, *_ in found)), ())
        for name, branch, term in found:
            del walk.notes[f"branch {name}"]
            seen = walk.notes.pop(f"wrote {name}")._replace(other=term)
            if walk.halt(("added", name), seen):
                self._mend(name, seen, branch)

    def _wrote(self, name: str, module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        walk = here()
        seen = Seen(walk.notes.pop(name), out, None, walk.notes.pop(f"lent {name}", None))
        mended = again(module, seen) if walk.halt(("wrote", name), seen) else None
        if self.joins is None or name in self.joins:
            out = out if mended is None else mended
            walk.notes |= {f"wrote {name}": seen._replace(y=out), f"branch {name}": out}
        return mended

    def _mend(self, name: str, seen: Seen, branch: Tensor) -> None:
        """Recompute the output of a reader and of its BatchNorm with the new weights, in place."""
        out = again(self.model.get_submodule(name), seen)
        seen.y.copy_(out)
        if branch is not seen.y:
            branch.copy_(self.model.get_submodule(self.norms[name]).forward(out))


class _Adding(TorchFunctionMode):
    """Calls `Watched.added` before every sum of two tensors."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDS and len(args) == 2 and not kwargs:
            self.watched.added(*args)
        return func(*args, **(kwargs or {}))


def _relayed(module: Lender | Borrower, args: Any) -> None:
    relay, notes = module.relay, here().notes
    if isinstance(module, Lender):
        notes[f"relay {relay.name}"] = args[0]
    else:
        relay.held = notes[f"relay {relay.name}"]


def _read(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    notes = here().notes
    notes[name] = first_tensor(args, kwargs)
    if isinstance(module, Borrower):
        notes[f"lent {name}"] = module.relay.held


def _normed(name: str, _: nn.Module, args: Any, out: Tensor) -> None:
    notes = here().notes
    if f"wrote {name}" in notes and notes[f"wrote {name}"].y is args[0]:
        notes[f"branch {name}"] = out


def again(module: nn.Module, seen: Seen) -> Tensor:
    """The output of a reader with its present weights."""
    if isinstance(module, Borrower):
        module.relay.held = seen.lent
    return module.forward(seen.x)  # type: ignore[no-any-return]


@dataclass
class Lockstep:
    """Passes of all batches through both models, run from stop to stop; some are kept, others start again."""

    dense: Watched
    small: Watched
    batches: Sequence[Any]
    room: int  # the largest number of batches whose passes are kept
    held: dict[int, tuple[Walk, Walk]] = field(default_factory=dict)

    def visit(self, stop: Stop) -> Iterator[tuple[int, Seen, Seen]]:
        """For each batch: its number, and the tensors of the dense and of the pruned model at the stop."""
        for number, batch in enumerate(self.batches):
            if number not in self.held:
                self.held[number] = self.dense.walk(batch), self.small.walk(batch)
            one, other = self.held[number]
            seen = [
                walk.seen if walk.at == stop else walk.to(stop, answer)
                for walk, answer in ((one, False), (other, True))
            ]
            if None in seen:
                raise HapError(f"update: {stop[1]}: every batch must reach it, found that batch {number} does not")
            yield number, *seen
            if len(self.held) > self.room:
                self.end(number)

    def end(self, *numbers: int) -> None:
        """End the passes of these batches, or of all."""
        for number in numbers or tuple(self.held):
            for walk in self.held.pop(number):
                walk.end()


def stops(dense: Watched, small: Watched, batch: Any) -> tuple[list[Stop], int]:
    """The stops of layers whose input differs in the pruned model, in order, and the most bytes that both passes hold.

    A layer whose output is a term of a sum stops at the sum; if both terms are outputs of layers, the last one does.
    HapError where a layer is called twice, or the pruned model does not call it.
    """
    walks, live = (dense.walk(batch), small.walk(batch)), 0
    wrote, found = list[str](), list[Stop]()
    try:
        while (seen := walks[0].to(ANY)) is not None:
            kind, *names = stop = walks[0].at
            other = walks[1].to(stop)
            if other is None:
                raise HapError(f"update: {names[0]}: it must be reached in the pruned model too, found that it is not")
            ours = [name for name in names if kind == "sum" and ("wrote", name) in found]
            if ours:
                last = max(ours, key=wrote.index)
                found.remove(("wrote", last))
                found.append(("added", last))
            if kind != "wrote":
                continue
            if names[0] in wrote:
                raise HapError(f"update: {names[0]}: a layer called once expected, found two calls in one pass")
            wrote += names
            live = max(live, LIVE * sum(t.nbytes for each in (seen, other) for t in each[:2]))
            if seen.x.shape != other.x.shape or not torch.equal(seen.x, other.x):
                found.append(("wrote", names[0]))
    finally:
        for walk in walks:
            walk.end()
    return found, live
