"""Weights averaged over the steps of a training; knows no epochs.

The average lies in the optimiser's state, beside the momentum of each parameter, so that whatever keeps, restores or
forgets the optimiser does so with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Averaged(NamedTuple):
    """A tensor of the model, and where in the optimiser's state its average is."""

    value: Tensor
    parameter: nn.Parameter
    name: str


@contextmanager
def averaging(model: nn.Module, optimiser: torch.optim.Optimizer, decay: float | None) -> Iterator[None]:
    """Inside, the weights are those of the training and each step moves their average; outside they are the average.

    a = decay a + (1 - decay) w after each step, from the weights after the first one on; the running statistics of
    BatchNorm are averaged in the same way. Nothing happens where `decay` is None.
    """
    if decay is None:
        yield
        return
    averaged, move = list(_averaged(model)), get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def follow(*_: Any) -> None:
        known = [each for each in averaged if each.name in optimiser.state[each.parameter]]
        if known:
            move([_average(optimiser, each) for each in known], [each.value for each in known], None)
            return
        for each in averaged:
            optimiser.state[each.parameter][each.name] = each.value.clone()

    _swap(averaged, optimiser)
    handle = optimiser.register_step_post_hook(follow)
    try:
        yield
    finally:
        handle.remove()
        _swap(averaged, optimiser)


def _averaged(model: nn.Module) -> Iterator[Averaged]:
    for parameter in model.parameters():
        yield Averaged(parameter.detach(), parameter, "average")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            # beside the scale, which has their shape; without one they stay as they are
            for name, value in (("mean", module.running_mean), ("variance", module.running_var)):
                if module.weight is not None:
                    yield Averaged(value, module.weight, f"average {name}")


def _average(optimiser: torch.optim.Optimizer, each: Averaged) -> Tensor:
    found: Tensor = optimiser.state[each.parameter][each.name]
    return found


def _swap(averaged: list[Averaged], optimiser: torch.optim.Optimizer) -> None:
    for each in averaged:
        if each.name in optimiser.state[each.parameter]:
            average, value = _average(optimiser, each), each.value.clone()
            each.value.copy_(average)
            average.copy_(value)
