"""No step of a training and no score enters the kernel that writes past its memory, and the way around computes the same.

Where the machine has AVX2, the oracle is a process of its own that would die, hang or differ from double precision;
a watcher of the ops is the other one, on any machine. Neither sees what torch.jit.script has compiled.
"""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hap import Budget
from hap.harness.tasks import nets
from hap.harness.train.step import Stepper
from hap.hessian.hutchinson import hutchinson
from hap.hessian.losses import CrossEntropy
from hap.methods import random, taylor
from hap.plan import plan
from hap.structure.groups import couple
from hap.structure.narrow import sound
from hap.structure.tracing import trace
from hap.surgery.apply import apply

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
LABELS = torch.arange(8) % 4


class Watch(TorchDispatchMode):
    """Notes what shapes went through the faulty path of oneDNN, forward or backward."""

    def __init__(self):
        super().__init__()
        self.seen, self.convolutions = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.convolution_backward.default, torch.ops.aten.convolution.default):
            backward = func is torch.ops.aten.convolution_backward.default
            x, weight, _, stride, padding, _, _, _, groups = args[1:10] if backward else args[:9]
            self.convolutions += 1
            last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
            point = weight.shape[2:].numel() == 1 and groups == 1 and not any(padding)
            if last and point and max(stride) > 1 and weight.shape[1] < 16:
                self.seen.append((backward, tuple(weight.shape)))
        return func(*args, **(kwargs or {}))


class Functional(nn.Module):
    """A stranger's: a bare parameter, and pixels that come with the channels last from within."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3, 1, 1))
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return self.out(F.conv2d(x, self.kernel, stride=(2, 1)).mean((2, 3)))


class Recomputed(nn.Module):
    """Computes its convolution again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 5, 1, 2), nn.Linear(5, 4)

    def forward(self, x):
        return self.out(checkpoint(self.conv, x, use_reentrant=False).mean((2, 3)))


def pruned():
    """A PreResNet whose shortcuts read odd numbers of channels, as a pruned one's do."""
    net = nets.preresnet(20, (8, 16, 32), channels=3, rng=torch.Generator().manual_seed(0))
    net.fc = nn.Linear(net.fc.in_features, 4) if hasattr(net, "fc") else net.fc
    groups = couple(net, trace(net, IMAGES[:1]), "union")
    rng = torch.Generator().manual_seed(1)
    scores = random(net, CrossEntropy(), [], groups, rng=rng)
    return apply(net, groups, plan(groups, scores, Budget(prunable=0.6))).to(memory_format=torch.channels_last)


NETS = {"pruned": pruned, "functional": Functional, "recomputed": Recomputed}


def step(model, task):
    from hap.harness.train.recipe import Recipe

    recipe = Recipe(epochs=1, lr=0.1, weight_decay=0.0, batch_size=8)
    return Stepper(model.train(), task, recipe, 8)(IMAGES, LABELS)
