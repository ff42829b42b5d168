"""Kernels of torch that are wrong, or give other numbers at each call, and the replacement of each; prunes nothing.

**Wrong on CPUs.** oneDNN 3.13, which torch 2.15 brings, takes the gradient of the weight of a 1x1 convolution with a
stride by copying the pixels that count into scratch memory first. Where the channels lie last in memory and there are
fewer of them than a register holds (8 with AVX2, 16 with AVX512), the copy ends behind that memory: the process dies,
stops responding, or continues with a wrong gradient (github.com/uxlfoundation/oneDNN/issues/6035). The number of
threads makes no difference. Most pruned networks have such channels. `benchmarks/bench_convolutions.py` lists what is
wrong on a machine, `hap doctor` says whether anything is.

**Another sum at each call on GPUs**, because the order of atomic additions is random. NONDETERMINISTIC lists all such
ops of torch, with the measure against each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

NARROW = 16  # with this number of input channels or more no kernel is wrong: the floats of the widest register
SORTED = "torch sums in a fixed order under use_deterministic_algorithms, which `exactly` of the harness turns on"
AROUND = "computed by slices inside `sound`; to a size of 1 it is a mean, of which torch has a deterministic gradient"
RECORDED = "nothing here calls it; a user's network may, and its record then says so"
NONDETERMINISTIC = {  # op of torch on a GPU -> what is done about it
    "index_add, index_add_": f"sums by group, here in groups, methods and curvature: {SORTED}",
    "cumsum": f"of floats, in losses: {SORTED}",
    "scatter_add, index_put with accumulate, gather, index_select, indexing, embedding: gradients": SORTED,
    "convolution, attention": f"of several algorithms one is deterministic: {SORTED}",
    "matrix products": "cuBLAS with a fixed workspace: CUBLAS_WORKSPACE_CONFIG, which `exactly` sets",
    "_adaptive_avg_pool2d_backward": AROUND,
    "scatter_reduce": "of integers and by least and largest alone, whose order does not count; on the CPU",
    "adaptive_avg_pool3d, adaptive_max_pool2d, avg_pool3d, fractional_max_pool, max_unpool: gradients": RECORDED,
    "reflection_pad, grid_sample, upsample_linear, upsample_bilinear, upsample_bicubic: gradients": RECORDED,
    "nll_loss2d, ctc_loss, embedding_bag of mode max, put_, histc, bincount with weights, median": RECORDED,
}


class Convolution(NamedTuple):
    """The arguments of a convolution, with the names and the defaults of torch."""

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
        """Whether oneDNN may compute the gradient of its weight wrongly."""
        padded = self.padding != "valid" and any(self._along(self.padding))
        here = self.input.device.type == "cpu" and self.groups == 1
        return here and not padded and max(self.steps) > 1 and is_narrow(self.weight)

    def _along(self, value: Any) -> tuple[int, ...]:
        axes = self.weight.dim() - 2
        return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))


def is_narrow(weight: object) -> bool:
    """Whether it can be the weight of a faulty convolution: 1x1, 1- or 2-dimensional, with few input channels."""
    if not isinstance(weight, Tensor) or weight.dim() not in (3, 4):
        return False
    return weight.shape[1] < NARROW and weight.shape[2:].numel() == 1


@contextmanager
def sound(model: nn.Module) -> Iterator[None]:
    """Inside the block, narrow strided 1x1 convolutions on CPUs and adaptive average pooling on GPUs use other kernels.

    A convolution with stride s takes every s-th pixel of its input and has stride 1: the same sums in every memory
    format, so that channels_last can be used everywhere. It holds for every module with such a weight, also where its
    forward calls the function itself; other modules cost nothing. A training step takes 1.06 times as long on
    the digits and 1.00 times on a pruned network for CIFAR-10. Channels first, the alternative, takes 1.25 and 1.19
    times, and 1.41 times on ResNet-20 (AVX512, one thread). Not covered: functions of torch whose weight comes from
    another module, and modules compiled by torch.jit.script.
    """
    found = [(vars(module), name, getattr(module, name)) for module in model.modules() for name in _concerned(module)]
    before = [own.get(name) for own, name, _ in found]
    for own, name, method in found:
        own[name] = partial(_around, method)
    try:
        yield
    finally:
        for (own, name, _), method in zip(found, before, strict=True):
            own.pop(name) if method is None else own.update({name: method})


def _concerned(module: nn.Module) -> Iterator[str]:
    """The name of the method of a module that may call such a kernel, if there is one."""
    weights = (*module.parameters(recurse=False), vars(module).get("weight"))
    if type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        # not `forward`, because `is_known` compares it to that of the class
        yield from ["_conv_forward"] if is_narrow(module.weight) else []
    elif isinstance(module, nn.AdaptiveAvgPool2d) or any(map(is_narrow, weights)):
        yield "forward"


def _around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Around():
        return method(*args, **kwargs)


class _Around(TorchFunctionMode):
    """Replaces calls of faulty kernels by other ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.conv1d, torch.conv2d):
            called = Convolution(*args, **(kwargs or {}))
            if called.faulty:
                read: list[Any] = [slice(None, None, step) for step in called.steps]
                pixels = called.input[(..., *read)]
                return func(pixels, called.weight, called.bias)
        if func is F.adaptive_avg_pool2d and args[0].device.type == "cuda":
            return pooled(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def pooled(input: Tensor, output_size: Any) -> Tensor:
    """Adaptive average pooling of the last two axes, one after the other: the mean over each window.

    As in torch, window i of n is from floor(i size / n) to ceil((i + 1) size / n).
    """
    sizes = (output_size,) * 2 if output_size is None or isinstance(output_size, int) else output_size
    for axis, wanted in zip((-2, -1), sizes, strict=True):
        size = input.shape[axis]
        if wanted is not None and wanted != size:
            edges = [(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]
            input = torch.stack([input.narrow(axis, a, b - a).mean(axis) for a, b in edges], axis)
    return input
