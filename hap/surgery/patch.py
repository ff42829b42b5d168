"""The one module that surgery adds to a model: parts that write rows, put in their places among zeros."""

import torch
from torch import Tensor, nn


class Patch(nn.Module):
    """Modules that together write one output: each its rows, the rest zero, of the input channels `take`."""

    places: Tensor
    take: Tensor
    # what tracing says of a module that has this attribute
    unsliceable = "a Patch, so the model was pruned before; prune the dense one by as much as both"

    def __init__(self, parts: list[nn.Module], places: Tensor, take: Tensor, axis: int, given: int, width: int) -> None:
        """`places`: of the rows that the parts compute, one after another; `given`, `width`: of input and output."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.axis, self.given, self.width = axis, given, width
        self.register_buffer("places", places)
        self.register_buffer("take", take)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of all parts in their places, in the memory format in which they come."""
        if len(self.take) < self.given:
            input = self._taken(input)
        rows = [part(input) for part in self.parts]
        shape = list(rows[0].shape)
        if self._beside(input, *rows):  # of a single channel one cannot tell
            made = (torch.cat(rows, self.axis) if len(rows) > 1 else rows[0]).movedim(self.axis, -1)
            blank = made.new_zeros(*made.shape[:-1], self.width)
            return blank.scatter_(-1, self.places.expand_as(made), made).movedim(-1, self.axis)
        made, shape[self.axis] = len(self.places), 1
        order = self.places.new_full((self.width,), made)
        order = order.index_copy(0, self.places, torch.arange(made, device=order.device))
        return torch.cat([*rows, rows[0].new_zeros(shape)], self.axis).index_select(self.axis, order)

    def _taken(self, input: Tensor) -> Tensor:
        if not self._beside(input):
            return input.index_select(self.axis, self.take)
        beside = input.movedim(self.axis, -1)
        return beside.gather(-1, self.take.expand(*beside.shape[:-1], -1)).movedim(-1, self.axis)

    def _beside(self, *seen: Tensor) -> bool:
        """Whether the channels of a position lie side by side: channels_last, tokens; gather and scatter are fast.

        index_select is slow then and loses the format; but a compiler fuses it, and it is the Gather of ONNX.
        """
        return any(x.stride(self.axis) == 1 for x in seen) and not torch.compiler.is_compiling()
