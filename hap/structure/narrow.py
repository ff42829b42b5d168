"""The one convolution whose kernel for CPUs writes past its memory, and the way around it; prunes nothing.

oneDNN 3.13, which torch 2.15 brings, takes the gradient of the weight of a 1x1 convolution with a stride by copying the
pixels that count into scratch memory first. Where the channels lie last in memory and a group has fewer of them than a
register holds (8 with AVX2, 16 with AVX512), the copy ends behind that memory: the process dies, hangs, or goes on with
a wrong gradient (github.com/uxlfoundation/oneDNN/issues/6035). One thread or two make no difference. A pruned network
has such channels as a rule. `benchmarks/bench_convolutions.py` maps what is wrong on a machine.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NARROW = 16  # input channels from which on no kernel is wrong: the floats of the widest register


class Convolution(NamedTuple):
    """What a convolution is called with, by the names and the defaults of torch."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def steps(self) -> tuple[int, ...]:
        """The stride along each axis of the image."""
        return _each(self.stride, self.weight.dim() - 2)

    @property
    def faulty(self) -> bool:
        """Whether oneDNN may take the gradient of its weight wrongly."""
        point = self.groups == 1 and self.weight.shape[2:].numel() == 1 and is_narrow(self.weight)
        padded = self.padding != "valid" and any(_each(self.padding, 1))
        return point and not padded and max(self.steps) > 1 and self.input.device.type == "cpu"


def is_narrow(weight: Tensor) -> bool:
    """Whether it can be the weight of such a convolution: of an image or a signal, 1x1, of few input channels."""
    return weight.dim() in (3, 4) and weight.shape[1] < NARROW and weight.shape[2:].numel() == 1


def sound(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, on CPUs, a narrow 1x1 convolution with a stride s reads every s-th pixel and has a stride of 1.

    The same sums, by another kernel: true for channels last or not, whatever layer or function calls the convolution,
    on the model itself and on what computes with it. Weights, layers and hooks stay as they are. The alternatives cost
    more: with the channels first, a training step took 1.24 times as long on the digits and 1.32 times on ResNet-20,
    where this takes 1.09 and 1.01 times (AVX512, one thread). A model without a narrow 1x1 kernel pays nothing.
    """
    return _BySlices() if any(map(is_narrow, model.parameters())) else nullcontext()


class _BySlices(TorchFunctionMode):
    """Computes each faulty convolution of the ranges of one or two axes on the pixels that count."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.conv1d, torch.conv2d):
            called = Convolution(*args, **(kwargs or {}))
            if called.faulty:
                pixels = called.input[(..., *(slice(None, None, step) for step in called.steps))]
                return func(pixels, called.weight, called.bias)
        return func(*args, **(kwargs or {}))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))
