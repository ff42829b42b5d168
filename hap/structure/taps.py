"""Stand-ins for the modules of a model: each hands out what it gave in one clean run, and notes what it is handed.

A pass through a tapped model costs only what lies between the modules, which is all that decides where a NaN goes.
This file knows which modules have rows and slots; what the NaNs mean is the business of `hap.structure.tracing`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hap import HapError
from hap.structure.layers import (
    BARRIERS,
    Call,
    axis,
    batched,
    failure,
    first_tensor,
    is_channelwise,
    is_mixing,
    starts,
    widths,
)


class Seen(NamedTuple):
    """What each sample of a pass did to each slot, the slots of the sinks after those of the sliced modules."""

    nans: Bool[Tensor, "batch slots"]
    moved: Bool[Tensor, "batch slots"]


class Taps:
    """A model whose sliced modules can be replaced by stand-ins for one pass at a time."""

    def __init__(
        self, model: nn.Module, sliced: dict[str, nn.Module], barriers: dict[str, nn.Module], call: Call
    ) -> None:
        """Tap the `sliced` modules, whose channels are told apart, and the `barriers`, whose are not."""
        self.model, self.call = model, call
        self.names, self.modules = tuple(sliced), tuple(sliced.values())
        self.index = {module: i for i, module in enumerate(self.modules)}
        self.tapped = {module: name for name, module in [*sliced.items(), *barriers.items()]}
        self.rows = tuple(widths(m)[0] for m in self.modules)
        self.slots = tuple(widths(m)[1] for m in self.modules)
        self.slot_starts = starts(self.slots)
        self.inputs: dict[nn.Module, list[torch.Size]] = {m: [] for m in self.tapped}
        self.outputs: dict[nn.Module, list[Any]] = {m: [] for m in self.tapped}
        self.follows: dict[str, str] = {}  # the channelwise module that reads a mixing module's output as it is

    def record(self, example: Any) -> None:
        """Run one sample as it is, and keep what each module gave."""
        self.example = tree_map(lambda leaf: leaf[:1] if batched(leaf) else leaf, example)
        handles = [module.register_forward_hook(self._keep, with_kwargs=True) for module in self.tapped]
        try:
            self.call(self.model, self.example)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = first_tensor(args, kwargs)
        self.inputs[module].append(x.shape)
        # cloned, for the next op may work in place
        self.outputs[module].append(tree_map(lambda leaf: leaf.clone() if batched(leaf) else leaf, output))
        if is_mixing(module):
            self.last = module
        elif is_channelwise(module) and hasattr(self, "last") and torch.equal(x, self.outputs[self.last][-1]):
            self.follows[self.tapped[self.last]] = self.tapped[module]

    def positions(self) -> tuple[int, ...]:
        """Output positions per sample of each sliced module, over all its calls."""
        return tuple(sum(y.numel() // r for y in self.outputs[m]) for m, r in zip(self.modules, self.rows, strict=True))

    def send(
        self, batch: int, writes: dict[int, Tensor], *, outside: bool = False, padding: bool = False, shaken: int = 0
    ) -> Seen:
        """One pass of `batch` samples; HapError, with the module and the cause, where the model raises.

        `writes[i]`: [batch, rows of module i], where its output becomes NaN. `outside`: what enters from outside the
        sliced modules is NaN. `padding`: so is what the model pads with, and only slots that are NaN throughout count,
        which are padded channels and not padded borders. `shaken` = n: samples n to 2n repeat the first n with finite
        noise for the NaN, sample 2n is clean, and `moved` compares them.
        """
        try:
            return self._send(batch, writes, outside, padding, shaken)
        except HapError:
            raise
        except Exception as error:  # whatever a stranger's forward raises
            says = failure(error, self.model)
            if writes or outside or padding:
                self.send(batch, {})  # raises, where it is the number of samples that the model cannot take
                do = "make the module around the check opaque=[...], or give the relation with declare()"
                raise HapError(f"trace: the model fails on NaN, by which rows are followed ({says}); {do}") from error
            do = "leave the batch free, as by reshape(len(x), ...)"
            raise HapError(f"trace: the model takes 1 sample but not {batch} ({says}); {do}") from error

    def _send(self, batch: int, writes: dict[int, Tensor], outside: bool, padding: bool, shaken: int) -> Seen:
        self.batch, self.writes, self.outside, self.padding, self.shaken = batch, writes, outside, padding, shaken
        self.calls = dict.fromkeys(self.tapped, 0)
        self.seen = Seen(*torch.zeros(2, batch, self.slot_starts[-1], dtype=torch.bool))
        self.sinks: list[Seen] = []
        own = {module: vars(module)["forward"] for module in self.tapped if "forward" in vars(module)}
        for module in self.tapped:
            module.forward = self._stand_in(module)
        try:
            with _Padding() if padding else nullcontext():  # type: ignore[no-untyped-call]
                output = self.call(self.model, self._repeat(self.example))
        finally:
            for module in self.tapped:
                del module.forward
                vars(module).update({"forward": own[module]} if module in own else {})
        if not any(batched(leaf) and leaf.is_floating_point() for leaf in tree_leaves(output)):
            raise HapError(f"trace: no floating-point tensor in the output, a {type(output).__name__}; pass call=")
        self._sink("the output", output, None)
        return Seen(*(torch.cat(parts, 1) for parts in zip(self.seen, *self.sinks, strict=True)))

    def _stand_in(self, module: nn.Module) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            call = self.calls[module]
            self.calls[module] += 1
            if module in self.index:
                return self._sliced(module, call, first_tensor(args, kwargs))
            self._sink(self.tapped[module], (args, kwargs), axis(module) if isinstance(module, BARRIERS) else None)
            return self._repeat(self.outputs[module][call])

        return stand_in

    def _sliced(self, module: nn.Module, call: int, x: Tensor) -> Tensor:
        index, clean = self.index[module], self.outputs[module][call]
        first, *rest = self.inputs[module][call]
        if x.shape != (self.batch * first, *rest):
            raise HapError(
                f"{self.tapped[module]}: the batch must lead what a traced module reads, found {tuple(x.shape)} "
                f"for {self.batch} samples where one gives {(first, *rest)}; pass opaque=[...] to leave it whole"
            )
        where = slice(self.slot_starts[index], self.slot_starts[index + 1])
        for noted, found in zip(self.seen, self._look(x, axis(module)), strict=True):
            noted[:, where] |= found
        y = clean.repeat(self.batch, *[1] * (clean.dim() - 1))
        return self._write(y, self.writes[index], axis(module) % y.dim(), index) if index in self.writes else y

    def _repeat(self, value: Any) -> Any:
        """The clean value for each sample of the pass; NaN when the outside is probed."""

        def repeat(leaf: Any) -> Any:
            if not batched(leaf):
                return leaf
            wide = leaf.repeat(self.batch, *[1] * (leaf.dim() - 1))
            return wide.fill_(torch.nan) if self.outside and wide.is_floating_point() else wide

        return tree_map(repeat, value)

    def _look(self, x: Tensor, feature: int) -> Seen:
        x = x.movedim(feature, -1).reshape(self.batch, -1, x.shape[feature])
        nans = x.isnan().all(1) if self.padding else x.sum(1).isnan()
        moved = torch.zeros_like(nans)
        if n := self.shaken:
            still = x[2 * n]
            moved[:n] = (x[n : 2 * n] - still).abs().amax(1) > 1e-3 * still.abs().amax()
        return Seen(nans.cpu(), moved.cpu())

    def _sink(self, name: str, value: Any, feature: int | None) -> None:
        """What reaches a barrier or the output: a row that does is frozen, whichever feature it reaches."""
        for leaf in tree_leaves(value):
            if not batched(leaf) or not leaf.is_floating_point():
                continue
            if leaf.shape[0] % self.batch:
                raise HapError(f"{name}: the batch must lead, found {tuple(leaf.shape)} for a batch of {self.batch}")
            flat = leaf if feature is not None else leaf.reshape(self.batch, -1)
            self.sinks.append(self._look(flat, 1 if feature is None else feature))

    def _write(self, y: Tensor, where: Tensor, feature: int, seed: int) -> Tensor:
        blocks = y.reshape(self.batch, -1, *y.shape[1:])
        shape = [self.batch, *[1] * y.dim()]
        shape[feature + 1] = y.shape[feature]
        mask = where.to(y.device).reshape(shape)
        if n := self.shaken:
            noise = torch.rand(blocks[:n].shape, generator=torch.Generator().manual_seed(seed)).to(y)
            blocks[n : 2 * n] += mask[:n] * (0.5 + noise) * (1 + blocks[:n].abs())
        return blocks.masked_fill(mask, torch.nan).reshape(y.shape)


class _Padding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Pads with NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.constant_pad_nd.default:
            args = (*args[:2], torch.nan)
        return func(*args, **(kwargs or {}))
