"""The one convolution whose kernel for CPUs writes past its memory, and the way around it; prunes nothing.

oneDNN 3.13, which torch 2.15 brings, takes the gradient of the weight of a 1x1 convolution with a stride by copying the
pixels that count into scratch memory first. Where the channels lie last in memory and a group has fewer of them than a
register holds (8 with AVX2, 16 with AVX512), the copy ends behind that memory: the process dies, hangs, or goes on with
a wrong gradient (github.com/uxlfoundation/oneDNN/issues/6035). One thread or two make no difference. A pruned network
has such channels as a rule. `benchmarks/bench_convolutions.py` maps what is wrong on a machine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
        return self._along(self.stride)

    @property
    def faulty(self) -> bool:
        """Whether oneDNN may take the gradient of its weight wrongly."""
        padded = self.padding != "valid" and any(self._along(self.padding))
        here = self.input.device.type == "cpu" and self.groups == 1
        return here and not padded and max(self.steps) > 1 and is_narrow(self.weight)

    def _along(self, value: Any) -> tuple[int, ...]:
        axes = self.weight.dim() - 2
        return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))


def is_narrow(weight: object) -> bool:
    """Whether it can be the weight of such a convolution: of a signal or an image, 1x1, of few input channels."""
    known = isinstance(weight, Tensor) and weight.dim() in (3, 4)
    return known and weight.shape[1] < NARROW and weight.shape[2:].numel() == 1


@contextmanager
def sound(model: nn.Module) -> Iterator[None]:
    """Inside, on CPUs, a narrow 1x1 convolution with a stride s reads every s-th pixel, and strides by 1.

    The same sums by another kernel, whatever the memory format, so that channels last may stay everywhere. The rule is
    for each module that has such a weight, also where it calls the function itself; other modules pay nothing. To put
    the channels first instead, as is the other way out, makes a training step take 1.24 times as long on the digits
    and 1.32 times on ResNet-20 (AVX512, one thread). A function of torch that is given a weight from elsewhere is not
    seen, nor is what torch.jit.script has compiled.
    """
    # the method that convolves, and not the whole forward pass, for curvature knows layers by the latter
    found = [
        (vars(module), name, getattr(module, name))
        for module in model.modules()
        if any(map(is_narrow, (*module.parameters(recurse=False), getattr(module, "weight", None))))
        for name in ["_conv_forward" if type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward) else "forward"]
    ]
    before = [own.get(name) for own, name, _ in found]
    for own, name, method in found:
        own[name] = partial(_aside, method)
    try:
        yield
    finally:
        for (own, name, _), method in zip(found, before, strict=True):
            own.pop(name) if method is None else own.update({name: method})


def _aside(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _BySlices():
        return method(*args, **kwargs)


class _BySlices(TorchFunctionMode):
    """Computes a faulty convolution on the pixels that it reads."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.conv1d, torch.conv2d):
            called = Convolution(*args, **(kwargs or {}))
            if called.faulty:
                pixels = called.input[(..., *(slice(None, None, step) for step in called.steps))]
                return func(pixels, called.weight, called.bias)
        return func(*args, **(kwargs or {}))
