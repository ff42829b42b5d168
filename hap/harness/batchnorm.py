"""What can be done about BatchNorm before and after surgery: fold it for scoring, renew its statistics; no training."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap.groups import Groups
from hap.layers import Call, evaluating
from hap.losses import Batches, Loss
from hap.methods import Scores, hessian_trace


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


def folded_trace(
    model: nn.Module, loss: Loss, batches: Batches, groups: Groups, *, rng: torch.Generator, columns: int | None = None
) -> Scores:
    """The exact `hessian_trace` as if each BatchNorm were part of the layer before it.

    # paper: does not do so. It changes the scores of groups of several layers alone: see `folded`.
    """
    return hessian_trace(folded(model, groups), loss, batches, groups, rng=rng, columns=columns)


def folded(model: nn.Module, groups: Groups) -> nn.Module:
    """A copy that computes the same in eval mode, the scale of each BatchNorm moved into the layer before it.

    Rows of w times s have curvature over s^2, so a row's Tr(H) ||w||^2 stays; that of rows of several layers does not.
    """
    model = copy.deepcopy(model)
    for name in groups.shapes:
        layer, norm = model.get_submodule(name), groups.norm_behind(name, torch.arange(groups.shapes[name].rows))[0]
        behind = model.get_submodule(norm) if norm else None
        if not isinstance(behind, _BatchNorm) or behind.running_mean is None or behind.running_var is None:
            continue
        with torch.no_grad():
            scale = (behind.running_var + behind.eps).rsqrt() * (1.0 if behind.weight is None else behind.weight)
            for value in (*layer.parameters(recurse=False), behind.running_mean):
                value.mul_(scale.reshape(-1, *[1] * (value.dim() - 1)))
            behind.running_var.fill_(1 - behind.eps)
            if behind.weight is not None:
                behind.weight.fill_(1.0)
    return model
