"""The one module that surgery adds to a model: parts that write rows, put in their places among zeros."""

import torch
from torch import Tensor, nn


class Patch(nn.Module):
    """Modules that together write one output: each its rows, the rest zero, of the input channels `take`."""

    order: Tensor
    take: Tensor

    def __init__(self, parts: list[nn.Module], order: Tensor, take: Tensor, axis: int, given: int, idle: bool) -> None:
        """`order`: place of each written row among those computed; `given`: input width; `idle`: some row is zero."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.axis, self.given, self.idle = axis, given, idle
        self.register_buffer("order", order)
        self.register_buffer("take", take)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of all parts in the order of the module that the patch replaces."""
        if len(self.take) < self.given:
            input = input.index_select(self.axis, self.take)
        rows = [part(input) for part in self.parts]
        if self.idle:
            shape = list(rows[0].shape)
            shape[self.axis] = 1
            rows.append(rows[0].new_zeros(shape))
        return torch.cat(rows, self.axis).index_select(self.axis, self.order)
