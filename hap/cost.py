"""What a model costs: parameters, MACs and seconds. One convention: MACs of convolutions and matrix products by
weights, FLOPs = 2 MACs; activations, normalisation and the products inside attention are not counted."""

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
    """Numbers that are trained; a shared parameter counts once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def macs(model: nn.Module, example: Any, *, call: Call = forward) -> int:
    """MACs of one forward pass of the example."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        call(model, example)
    flops = counter.get_flop_counts().get("Global", {})
    return sum(int(n) for op, n in flops.items() if str(op).rpartition(".")[2] in COUNTED) // 2


@torch.no_grad()
def latency(
    model: nn.Module, example: Any, batches: Sequence[int] = (1, 64), *, repeats: int = 10, call: Call = forward
) -> dict[int, float]:
    """Median seconds of a forward pass at each batch size, after warm-up, with the device synchronised.

    Three passes warm up and `repeats` count; where they would take over 3 seconds, one and three.
    """
    found = {}
    with evaluating(model):
        for batch in batches:
            inputs = tree_map(lambda t, b=batch: _repeated(t, b), example)
            long = _seconds(model, inputs, call) * (2 + repeats) > 3.0
            took = [_seconds(model, inputs, call) for _ in range(3 if long else 2 + repeats)]
            found[batch] = median(took if long else took[2:])
    return found


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
