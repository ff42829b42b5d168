"""Statistics of BatchNorm taken anew after surgery, which changes what flows into it; does not train."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap.layers import Call, evaluating


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], call: Call) -> None:
    """Sets running mean and variance to the averages over `batches` of (inputs, targets); weights stay.

    # paper: does not do so; a pruned network otherwise normalises by the statistics of the dense one.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # a plain average over the batches
        for inputs, _ in batches:
            call(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
