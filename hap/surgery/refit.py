"""New weights for what is left, layer by layer in the order of the forward pass: each layer that reads something else
than in the dense model gets those that an update makes.

A layer should write what it wrote in the dense model. Where something is added to it, as in a residual branch, it
should write what makes the sum that of the dense model: what is added may differ by now. Only sums are seen whose
terms are what the layer, or a BatchNorm right behind it, wrote.

Batches go through both models side by side, and all stand still at a layer until it has its weights. As many are held
there as `memory` bytes allow; the others begin anew for each layer. So a model that keeps what it computes in its
modules between calls needs memory=0, or batches would see each other's.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from hap import HapError
from hap.hessian.losses import Loss
from hap.hessian.outputs import output_curvature
from hap.hessian.persample import is_known
from hap.structure.bypass import Borrower, Lender
from hap.structure.groups import Groups
from hap.structure.layers import Call, axis, evaluating, first_tensor, widths
from hap.surgery.cut import Cut, norm_behind, resize
from hap.surgery.moments import WIDEST, Moments, Sums
from hap.surgery.patch import Patch
from hap.surgery.walks import ANY, Walk, here

Update = Callable[..., tuple[Tensor, Tensor]]  # (reader, kept, moments), and `weighted` where it takes that
Stop = tuple[str, str]  # "wrote" or "added", and the reader
MEMORY = 2**30  # bytes of passes that stand still
LIVE = 4  # tensors that a pass holds at a layer, each like the largest: a stream, a branch, what is read and written
ADDS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
TINY = 1e-3  # a row that a BatchNorm scales by less than this share of the largest scale can mend no sum


class Seen(NamedTuple):
    """What a pass has at a layer."""

    x: Tensor
    y: Tensor  # written by it
    other: Tensor | None = None  # what is added to it, or to what the BatchNorm behind it makes of it
    lent: Tensor | None = None  # what an implant beside it reads


class Part(NamedTuple):
    """A convolution or linear layer, alone or within a Patch, and the rows of the dense layer that it writes."""

    layer: nn.Module
    rows: Int[Tensor, "rows"]


@dataclass(frozen=True)
class Watched:
    """A model whose readers are watched by hooks, which halt the pass that runs."""

    model: nn.Module
    norms: Mapping[str, str]  # reader -> the BatchNorm right behind it, or ""
    call: Call
    joins: frozenset[str] | None = None  # the readers whose sums are looked for; None for all

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The hooks, and eval mode."""
        handles = []
        for module in self.model.modules():
            if isinstance(module, Lender | Borrower):  # passes that stand still share its relay
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
        """A pass of this batch, from the beginning."""

        def run() -> None:
            with torch.no_grad(), _Adding(self):
                self.call(self.model, batch)

        return Walk(run)

    def added(self, one: Any, other: Any) -> None:
        """Two tensors are about to be added."""
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
        """What the reader writes by now, in place of what it wrote, and what the BatchNorm makes of it."""
        out = again(self.model.get_submodule(name), seen)
        seen.y.copy_(out)
        if branch is not seen.y:
            branch.copy_(self.model.get_submodule(self.norms[name]).forward(out))


class _Adding(TorchFunctionMode):
    """Tells a watched model of each sum of two tensors."""

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
    """What a reader writes with the weights that it has now."""
    if isinstance(module, Borrower):
        module.relay.held = seen.lent
    return module.forward(seen.x)  # type: ignore[no-any-return]


def refit(
    small: nn.Module,
    model: nn.Module,
    groups: Groups,
    cuts: Mapping[str, Cut],
    update: Update,
    batches: Sequence[Any],
    call: Call,
    *,
    loss: Loss | None = None,
    memory: int = MEMORY,
) -> None:
    """Gives the layers of `small` that read something else than in the dense model new weights, in place."""
    if not batches:
        raise HapError("update: calibration batches expected, found none; pass batches= to apply()")
    norms = {name: _norm(model, groups, name) for name in _readers(small, model, groups)}
    dense, pruned = (Watched(each, norms, call) for each in (model, small))
    with dense(), pruned():
        stops, live = _stops(dense, pruned, batches[0])
    if not stops:
        return
    joins = frozenset(name for kind, name in stops if kind == "added")
    norms = {name: norms[name] for _, name in stops}
    dense, pruned = (Watched(each, norms, call, joins) for each in (model, small))
    weights = _weights(model, loss, batches, list(norms)) if _asks(update, "weighted") else None
    step = Lockstep(dense, pruned, batches, memory // max(1, live))
    with dense(), pruned():
        try:
            for stop in stops:
                _Reader(small, model, groups, cuts, norms, stop).renew(update, step, weights)
        finally:
            step.end()


@dataclass
class Lockstep:
    """Passes of all batches through both models, brought to one stop after another; some held, some begun anew."""

    dense: Watched
    small: Watched
    batches: Sequence[Any]
    room: int  # how many may be held
    held: dict[int, tuple[Walk, Walk]] = field(default_factory=dict)

    def visit(self, stop: Stop) -> Iterator[tuple[int, Seen, Seen]]:
        """Of each batch its number, and what the dense and the pruned model have at the stop."""
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
        """Lets go of the passes of these batches, or of all."""
        for number in numbers or tuple(self.held):
            for walk in self.held.pop(number):
                walk.end()


def _readers(small: nn.Module, model: nn.Module, groups: Groups) -> Iterator[str]:
    """The layers whose weights an update can make: of known classes, with something to write."""
    for name, s in groups.shapes.items():
        if s.mixing and is_known(model.get_submodule(name)) and 0 not in widths(_inner(small.get_submodule(name))):
            yield name


def _norm(model: nn.Module, groups: Groups, name: str) -> str:
    """The BatchNorm with fixed statistics that reads what the layer writes, as it is and alone."""
    norm, _ = groups.norm_behind(name, torch.arange(groups.shapes[name].rows))
    fixed = norm and isinstance(each := model.get_submodule(norm), _BatchNorm) and each.running_var is not None
    return norm if fixed else ""


def _inner(module: nn.Module) -> nn.Module:
    """A layer, or one of those in a Patch, without what lends and borrows."""
    while isinstance(module, Lender | Borrower | Patch):
        module = module.parts[0] if isinstance(module, Patch) else module.layer
    return module


def _stops(dense: Watched, small: Watched, batch: Any) -> tuple[list[Stop], int]:
    """Where the passes must stand still, in order, and how many bytes both hold there at most.

    At a sum if one takes what the layer writes; of two layers with one sum the one that is called last has it.
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


def _asks(update: Update, name: str) -> bool:
    return name in inspect.signature(update).parameters


def _weights(
    model: nn.Module, loss: Loss | None, batches: Sequence[Any], names: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Of each batch and layer the curvature of the loss at each position of what the dense layer writes."""
    if loss is None:
        raise HapError("update: a loss expected, for it weighs positions by curvature; pass loss= to apply()")
    rng = torch.Generator().manual_seed(0)
    return [output_curvature(model, loss, batch, names, rng) for batch in batches]


@dataclass(frozen=True)
class _Reader:
    """One layer and the stop where it gets its weights."""

    small: nn.Module
    model: nn.Module
    groups: Groups
    cuts: Mapping[str, Cut]
    norms: Mapping[str, str]
    stop: Stop

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.stop[1]

    def renew(self, update: Update, step: Lockstep, weights: Sequence[Mapping[str, Tensor]] | None) -> None:
        """New weights for all its parts, in blocks of inputs where there are too many for their products."""
        parts = [part for part in self.parts() if is_known(part.layer)]
        blocks = self.blocks(parts[0].layer)
        if len(blocks) > 1:
            wide = parts[0].layer.get_parameter("weight")[0].numel()
            warnings.warn(f"update: {self.name}: its {wide} columns are solved in {len(blocks)} blocks", stacklevel=4)
        for block in blocks:
            pieces = [_Piece(part, block) for part in parts]
            for number, dense, small in step.visit(self.stop):
                x = self.read(small.x)
                wanted = self.wanted(dense, small)
                for piece in pieces:
                    piece.add(x, wanted, None if weights is None else weights[number][self.name])
            for piece in pieces:
                self.give(piece, update)

    def parts(self) -> list[Part]:
        """What writes rows of it, and which."""
        module, cut = self.small.get_submodule(self.name), self.cuts.get(self.name)
        while isinstance(module, Lender | Borrower):
            module = module.layer
        if cut is None:
            return [Part(module, torch.arange(self.groups.shapes[self.name].rows))]
        layers = list(module.parts) if isinstance(module, Patch) else [module]
        return [Part(*pair) for pair in zip(layers, [r for r in cut[:2] if len(r)], strict=True)]

    def blocks(self, layer: nn.Module) -> list[Tensor]:
        """The inputs that are solved for together."""
        weight = layer.get_parameter("weight")
        slots = torch.arange(weight.shape[1] * getattr(layer, "groups", 1), device=weight.device)
        if weight[0].numel() <= WIDEST or getattr(layer, "groups", 1) > 1:
            return [slots]
        return list(slots.tensor_split(-(-weight[0].numel() // WIDEST)))

    def read(self, x: Tensor) -> Tensor:
        """What the parts read of what the layer does."""
        module = self.small.get_submodule(self.name)
        while isinstance(module, Lender | Borrower):
            module = module.layer
        if isinstance(module, Patch) and len(module.take) < module.given:
            return x.index_select(module.axis, module.take)
        return x

    def wanted(self, dense: Seen, small: Seen) -> Tensor:
        """What the layer should write, all rows of the dense one; where it must mend a sum, the rows it can mend."""
        module, y = self.small.get_submodule(self.name), dense.y
        at = axis(self.model.get_submodule(self.name))
        rows = torch.arange(y.shape[at], device=y.device)
        cut = self.cuts.get(self.norms[self.name] or self.name)
        if dense.other is not None and small.other is not None:
            rows = rows if cut is None else cut.written.nonzero()[:, 0].to(y.device)
            gap = torch.zeros_like(y).index_copy(at, rows, dense.other.index_select(at, rows) - small.other)
            y = y + gap * self.unscale(y, at)
        if isinstance(module, Borrower) and small.lent is not None:
            y = y - module.implant(small.lent)
        return y

    def unscale(self, like: Tensor, at: int) -> Tensor:
        """By what a sum is divided to be one of what the layer writes: the scale of the BatchNorm between."""
        shape = [1] * like.dim()
        shape[at] = like.shape[at]
        if not self.norms[self.name]:
            return like.new_ones(shape)
        norm = self.model.get_submodule(self.norms[self.name])
        assert isinstance(norm, _BatchNorm)
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach())
        small = scale.abs() <= TINY * scale.abs().max()
        return torch.where(small, 0.0, 1 / scale.masked_fill(small, 1.0)).reshape(shape).to(like)

    @torch.no_grad()
    def give(self, piece: "_Piece", update: Update) -> None:
        """Puts what an update makes in place."""
        layer, rows = piece.part
        weight, bias = piece.updated(update, None if self.name not in self.cuts else self.cuts[self.name].slots)
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise HapError(f"update: {self.name}: finite weights expected, found some that are not")
        if weight.shape == layer.get_parameter("weight").shape:
            layer.get_parameter("weight").copy_(weight)
        else:
            layer.get_parameter("weight")[:, piece.slots] = weight
        found = norm_behind(self.small, self.groups, dict(self.cuts), self.name, rows)
        if isinstance(layer.bias, Tensor):
            layer.bias.copy_(bias)
        elif found is not None and self.norms[self.name]:
            norm, slots = found
            dense = self.model.get_submodule(self.norms[self.name]).get_buffer("running_mean")
            norm.get_buffer("running_mean")[slots] = dense[rows] - bias
        else:
            needed = layer.get_parameter("weight").requires_grad
            layer.bias = nn.Parameter(bias.clone(), requires_grad=needed)


class _Piece:
    """Some of the inputs of a part, as a smaller layer of its own, and their moments."""

    def __init__(self, part: Part, slots: Tensor) -> None:
        self.part, self.slots = part, slots
        self.whole = len(slots) == part.layer.get_parameter("weight").shape[1] * getattr(part.layer, "groups", 1)
        every = torch.arange(len(part.layer.get_parameter("weight")))
        self.layer = part.layer if self.whole else resize(copy.deepcopy(part.layer), every, slots)
        self.plain, self.weighted = Sums(self.layer), Sums(self.layer)

    def add(self, x: Tensor, wanted: Tensor, weights: Tensor | None) -> None:
        """Takes in a batch; what the other inputs give is taken from what is wanted."""
        at = axis(self.layer)
        y = wanted.index_select(at, self.part.rows.to(wanted.device))
        if not self.whole:
            mine = x.index_select(at, self.slots)
            y, x = y - self.part.layer.forward(x) + self.layer.forward(mine), mine
        self.plain.add(x, y)
        if weights is not None:
            self.weighted.add(x, y, weights)

    def updated(self, update: Update, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weight and the bias that an update makes."""
        slots = self.slots if kept is None else kept[self.slots.to(kept.device)]
        if not self.layer.get_parameter("weight").numel():
            return self.layer.get_parameter("weight"), self.plain.result().y.flatten()
        given: dict[str, Moments] = {"weighted": self.weighted.result()} if _asks(update, "weighted") else {}
        return update(self.layer, slots, self.plain.result(), **given)
