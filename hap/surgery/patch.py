"""The module that replaces a layer in surgery: its parts compute rows, which are put in their places among zeros."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

SIZES = {"in_channels": "given", "in_features": "given"}
SIZES |= dict.fromkeys(("out_channels", "out_features", "num_features"), "width")


class Patch(nn.Module):
    """Parts that read the input channels `take` and compute some rows of the output; the other rows are zero.

    It has the attributes of one layer of its size, `in_channels`, `stride`, `weight` and so on, for forward passes that
    read them. Its tensors are computed from those of the parts: gradients pass through them, but writes have no effect.

    >>> pick = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(pick.weight)
    >>> patch = Patch([pick], places=torch.tensor([1]), take=torch.tensor([0, 2]), axis=-1, given=3, width=2)
    >>> patch(torch.tensor([[1.0, 10.0, 100.0]])).tolist()  # row 1 is the sum of channels 0 and 2
    [[0.0, 101.0]]
    """

    places: Tensor
    take: Tensor
    # `trace` refuses a module that has this attribute, with this text
    unsliceable = "a Patch, so the model was pruned before; prune the dense one by as much as both"

    def __init__(self, parts: list[nn.Module], places: Tensor, take: Tensor, axis: int, given: int, width: int) -> None:
        """`places`: of the parts' rows in the output; `given`, `width`: channels of input and output."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.axis, self.given, self.width = axis, given, width
        self.register_buffer("places", places)
        self.register_buffer("take", take)

    def __getattr__(self, name: str) -> Any:
        """The attribute `name` of one layer of this size; AttributeError if the part of the largest kernel lacks it."""
        if name in ("parts", "places", "take") or name.startswith("_") or not self.parts:
            return super().__getattr__(name)
        layer = max(self.parts, key=_taps)
        if name in SIZES and name in vars(layer):
            return getattr(self, SIZES[name])
        if name in layer._parameters or name in layer._buffers:
            return _equivalent(self, layer, name)
        if name == "groups" and isinstance(layer, _ConvNd):
            return _conv_groups(self, layer)
        return vars(layer)[name] if name in vars(layer) else super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of all parts in their places, zeros elsewhere, in the memory format of the input."""
        if len(self.take) < self.given:
            input = self._taken(input)
        rows = [part(input) for part in self.parts]
        shape = list(rows[0].shape)
        if self._beside(input, *rows):  # rows too: a single channel has no memory format
            written = (torch.cat(rows, self.axis) if len(rows) > 1 else rows[0]).movedim(self.axis, -1)
            blank = written.new_zeros(*written.shape[:-1], self.width)
            return blank.scatter_(-1, self.places.expand_as(written), written).movedim(-1, self.axis)
        count, shape[self.axis] = len(self.places), 1
        order = self.places.new_full((self.width,), count)
        order = order.index_copy(0, self.places, torch.arange(count, device=order.device))
        return torch.cat([*rows, rows[0].new_zeros(shape)], self.axis).index_select(self.axis, order)

    def _taken(self, input: Tensor) -> Tensor:
        if not self._beside(input):
            return input.index_select(self.axis, self.take)
        beside = input.movedim(self.axis, -1)
        return beside.gather(-1, self.take.expand(*beside.shape[:-1], -1)).movedim(-1, self.axis)

    def _beside(self, *seen: Tensor) -> bool:
        """Whether the channels of a position are adjacent in memory (channels_last, tokens): use gather and scatter.

        There, index_select is slow and loses the format. Compilers get it all the same: they fuse it, ONNX has it.
        """
        return any(x.stride(self.axis) == 1 for x in seen) and not torch.compiler.is_compiling()


def _taps(part: nn.Module) -> int:
    return math.prod(getattr(part, "kernel_size", ()))


def _equivalent(patch: Patch, layer: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer `name` of one layer that computes what the patch does; None where no part has it."""
    owns = [{**part._parameters, **part._buffers} for part in patch.parts]
    like = next((own[name] for own in owns if own.get(name) is not None), None)
    if like is None or like.dim() == 0:
        return like  # num_batches_tracked
    widths = [getattr(part, "out_channels", getattr(part, "out_features", None)) for part in patch.parts]
    left = len(patch.places) - sum(width for width in widths if width is not None)
    counts = [left if width is None else width for width in widths]
    rows = torch.cat([_rows(patch, layer, part, name, n) for part, n in zip(patch.parts, counts, strict=True)])
    blank = rows.new_full((patch.width, *rows.shape[1:]), float(name == "running_var"))
    return blank.index_copy(0, patch.places, rows)


def _rows(patch: Patch, layer: nn.Module, part: nn.Module, name: str, count: int) -> Tensor:
    """The rows of `_equivalent` that `part` computes; NaN where no layer like `layer` computes them."""
    value = {**part._parameters, **part._buffers}.get(name)
    weight = layer.get_parameter("weight") if isinstance(layer, nn.Linear | _ConvNd) else None
    like = next(t for t in (value, weight, *patch.parameters(), *patch.buffers()) if t is not None)
    shape: tuple[int, ...] = (count,)
    if name == "weight" and weight is not None:
        shape = (count, patch.given // patch.groups if isinstance(layer, _ConvNd) else patch.given, *weight.shape[2:])
    if not _is_like(part, layer):
        return like.new_full(shape, torch.nan)
    if value is None:
        return like.new_zeros(shape)
    return value if value.shape == shape else _spread(patch, part, value, shape)


def _spread(patch: Patch, part: nn.Module, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of a part in a tensor of zeros: at the channels that the part reads, its kernel in the middle."""
    sides = [(w - k) // 2 for w, k in zip(shape[:1:-1], weight.shape[:1:-1], strict=True) for _ in "01"]
    weight, conv_groups = nn.functional.pad(weight, sides), getattr(part, "groups", 1)
    reads = patch.take.view(conv_groups, -1).repeat_interleave(shape[0] // conv_groups, 0)
    reads = reads.reshape(*reads.shape, *[1] * (weight.dim() - 2)).expand_as(weight)
    return weight.new_zeros(shape).scatter(1, reads, weight)


def _is_like(part: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer of the class and stride of `layer`, its kernel padded with zeros, can replace the part."""
    if not isinstance(part, _ConvNd) or not isinstance(layer, _ConvNd):
        return isinstance(part, nn.Linear) if isinstance(layer, nn.Linear) else part is layer
    alike = _taps(part) == 1 or part.dilation == layer.dilation
    return alike and part.stride == layer.stride and _centre(part) == _centre(layer)


def _centre(conv: _ConvNd) -> list[float]:
    """Where the middle of the kernel is for the first output position, in input positions along each axis."""
    if conv.padding == "same":
        return [0.0] * len(conv.kernel_size)
    pads = [0] * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    return [d * (k - 1) / 2 - p for d, k, p in zip(conv.dilation, conv.kernel_size, pads, strict=True)]


def _conv_groups(patch: Patch, conv: _ConvNd) -> int:
    """`groups` of one convolution of this size that computes what `conv` does; 1 if parts of groups are missing."""
    if conv.groups == 1:
        return 1
    takes, places = (t.view(conv.groups, -1) for t in (patch.take, patch.places))
    slots, rows = takes.shape[1], places.shape[1]
    first = takes[:, :1] // slots
    whole = patch.given % slots == 0 and patch.given // slots * rows == patch.width
    aligned = torch.equal(takes, first * slots + torch.arange(slots, device=takes.device))
    aligned = aligned and torch.equal(places, first * rows + torch.arange(rows, device=takes.device))
    return patch.given // slots if whole and aligned else 1
