"""Stand-ins for the modules of a model: each returns its output of one recorded run, and records NaNs in its input.

A pass through a tapped model computes only the ops between the modules, and these alone decide where a NaN goes. This
file knows which modules have rows and slots; `hap.structure.tracing` knows what the NaNs mean.
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
    """What each sample of a pass brings to each slot: first the slots of the sliced modules, then those of the sinks.

    A sink is a barrier or the output of the model.
    """

    nans: Bool[Tensor, "batch slots"]  # it is NaN
    moved: Bool[Tensor, "batch slots"]  # finite noise has changed it


class Taps:
    """A model whose sliced modules can be replaced by stand-ins for one pass at a time."""

    def __init__(
        self, model: nn.Module, sliced: dict[str, nn.Module], barriers: dict[str, nn.Module], call: Call
    ) -> None:
        """`sliced`: modules by name whose slots are recorded one by one; `barriers`: those whose slots are one sink."""
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
        """Run the first sample of `example`; store the input shapes and the outputs of each module, by call."""
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
        """Output positions per sample of each sliced module, summed over its calls."""
        return tuple(sum(y.numel() // r for y in self.outputs[m]) for m, r in zip(self.modules, self.rows, strict=True))

    def send(
        self, batch: int, writes: dict[int, Tensor], *, outside: bool = False, padding: bool = False, shaken: int = 0
    ) -> Seen:
        """One pass of `batch` copies of the recorded sample, some values replaced by NaN.

        `writes[i]`: mask [batch, rows of module i] of the outputs that become NaN. `outside`: the input of the model
        and the outputs of barriers become NaN. `padding`: constants that the model pads with become NaN, and only
        slots that are NaN at all positions count: padded channels, not padded borders. `shaken` = n: samples n to 2n
        repeat the first n with finite noise in place of NaN; sample 2n is unchanged, and `moved` is the comparison
        with it. HapError, with the module and the cause, where the model raises.
        """
        try:
            return self._send(batch, writes, outside, padding, shaken)
        except HapError:
            raise
        except Exception as error:  # a model is foreign code and may raise anything
            reason = failure(error, self.model)
            if writes or outside or padding:
                self.send(batch, {})  # raises, where it is the number of samples that the model cannot take
                do = "make the module around the check opaque=[...], or give the relation with declare()"
                raise HapError(f"trace: the model fails on NaN, by which rows are followed ({reason}); {do}") from error
            do = "leave the batch free, as by reshape(len(x), ...)"
            raise HapError(f"trace: the model takes 1 sample but not {batch} ({reason}); {do}") from error

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
                f"{self.tapped[module]}: the batch must be the first axis of its input, found {tuple(x.shape)} for "
                f"{self.batch} samples and {(first, *rest)} for one; pass opaque=[...] to leave it whole"
            )
        where = slice(self.slot_starts[index], self.slot_starts[index + 1])
        for record, new in zip(self.seen, self._look(x, axis(module)), strict=True):
            record[:, where] |= new
        y = clean.repeat(self.batch, *[1] * (clean.dim() - 1))
        return self._write(y, self.writes[index], axis(module) % y.dim(), index) if index in self.writes else y

    def _repeat(self, value: Any) -> Any:
        """The recorded value, once for each sample of the pass; NaN where `outside` is set."""

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
        """Add the slots of a barrier or of the output: a row that reaches one of them is frozen."""
        for leaf in tree_leaves(value):
            if not batched(leaf) or not leaf.is_floating_point():
                continue
            if leaf.shape[0] % self.batch:
                found = f"{tuple(leaf.shape)} for {self.batch} samples"
                raise HapError(f"{name}: the batch must be the first axis, found {found}")
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
    """Replaces the constant of every padding by NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.constant_pad_nd.default:
            args = (*args[:2], torch.nan)
        return func(*args, **(kwargs or {}))
