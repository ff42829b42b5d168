"""The cost of a model: parameters, MACs and seconds.

MACs are those of convolutions and of matrix products with weights; 1 MAC is 2 FLOPs. Activations, normalisation and the
products inside attention are not counted.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from hap.structure.layers import Call, evaluating, forward

COUNTED = ("convolution", "addmm", "mm")


def params(model: nn.Module) -> int:
    """The number of parameters, frozen ones included; a shared parameter counts once.

    >>> params(nn.Linear(4, 3))
    15
    """
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def macs(model: nn.Module, example: Any, *, call: Call = forward) -> int:
    """MACs of one forward pass of `example`, all samples together; the model runs in eval mode.

    >>> macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 10))  # 3 * 8 * 3 * 3 * 10 * 10
    21600
    """
    with evaluating(model), FlopCounterMode(display=False) as counter:
        call(model, example)
    flops = counter.get_flop_counts().get("Global", {})
    return sum(int(n) for op, n in flops.items() if str(op).rpartition(".")[2] in COUNTED) // 2


@torch.no_grad()
def latency(
    model: nn.Module, example: Any, batches: Sequence[int] = (1, 64), *, repeats: int = 10, call: Call = forward
) -> dict[int, float]:
    """Batch size -> median seconds of a forward pass in eval mode, with the device synchronised.

    The batch repeats the first sample of `example`. Three passes warm up and `repeats` are counted; where these would
    take more than 3 seconds, one warms up and three are counted.

    >>> seconds = latency(nn.Linear(4, 3), torch.zeros(1, 4), batches=(1, 64), repeats=3)
    >>> list(seconds), min(seconds.values()) > 0
    ([1, 64], True)
    """
    medians = {}
    with evaluating(model):
        for batch in batches:
            inputs = tree_map(lambda t, b=batch: _repeated(t, b), example)
            long = _seconds(model, inputs, call) * (2 + repeats) > 3.0
            seconds = [_seconds(model, inputs, call) for _ in range(3 if long else 2 + repeats)]
            medians[batch] = median(seconds if long else seconds[2:])
    return medians


def _repeated(leaf: Any, batch: int) -> Any:
    return leaf[:1].repeat(batch, *[1] * (leaf.dim() - 1)) if isinstance(leaf, Tensor) else leaf


def _seconds(model: nn.Module, inputs: Any, call: Call) -> float:
    device = next((t.device for t in tree_leaves(inputs) if isinstance(t, Tensor)), torch.device("cpu"))
    _synchronise(device)
    start = time.perf_counter()
    call(model, inputs)
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
