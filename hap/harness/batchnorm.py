"""What can be done about BatchNorm: fold it for scoring, renew its statistics, take them over ranks; no training."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hap.harness.processes import ranks
from hap.hessian.losses import Batches, Loss
from hap.methods import Scores, hessian_trace
from hap.structure.groups import Groups
from hap.structure.layers import Call, evaluating


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


@contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode takes its statistics over the samples of all ranks, on any device.

    So a training does not depend on the number of ranks, beyond rounding. torch's SyncBatchNorm does the same on GPUs
    alone, and is another class of module, which a saved model would have to become again.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if ranks.world() > 1 else []
    for norm in norms:
        norm.__dict__["forward"] = partial(_normalised, norm)  # in place of the method of its class
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def _normalised(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x.float()  # also where the convolutions run in bfloat16
    add = ranks.summed_with_gradient
    here = wide.new_full((1,), x.numel() / max(x.shape[1], 1))
    sums = add(torch.cat([wide.sum(axes), here]))
    count, mean = sums[-1], sums[:-1] / sums[-1]
    shape = (1, -1, *[1] * (x.dim() - 2))
    centred = wide - mean.view(shape)
    variance = add(centred.square().sum(axes)) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean), share)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var), share)
    scaled = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return scaled.to(x.dtype)
