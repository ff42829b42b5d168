"""Functions that a stranger may bring to `hap compare`, good and bad."""

import os
import signal
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hap.harness.run import one_shot
from hap.implants import centre_tap
from hap.methods import hessian_trace, random
from hap.plan import Budget

CALLS: list[str] = []


def score(model, loss, batches, groups, *, rng, width: int = 1, name: str = "x"):
    CALLS.append("score")
    return random(model, loss, batches, groups, rng=rng)


def untyped(model, loss, batches, groups, *, rng, power=2):
    return random(model, loss, batches, groups, rng=rng)


def same(model, loss, batches, groups, *, rng):
    return hessian_trace(model, loss, batches, groups, rng=rng)


def worst(model, loss, batches, groups, *, rng):
    return -hessian_trace(model, loss, batches, groups, rng=rng)


def nan(model, loss, batches, groups, *, rng):
    return torch.full((len(groups),), float("nan"))


def short(model, loss, batches, groups, *, rng):
    return torch.zeros(3)


def a_list(model, loss, batches, groups, *, rng):
    return [0.0] * len(groups)


def imaginary(model, loss, batches, groups, *, rng):
    return torch.zeros(len(groups), dtype=torch.complex64)


def broken(model, loss, batches, groups, *, rng):
    return 1 / 0


def aborts(model, loss, batches, groups, *, rng):
    os.abort()


def killed(model, loss, batches, groups, *, rng):
    os.kill(os.getpid(), signal.SIGKILL)


def exhausts(model, loss, batches, groups, *, rng):
    raise MemoryError("a made-up lack of it")


def slow(model, loss, batches, groups, *, rng):
    Path("running").touch()
    time.sleep(600)


def leaves(model, loss, batches, groups, *, rng):
    sys.exit("no license")


def meta(model, loss, batches, groups, *, rng):
    return torch.zeros(len(groups), device="meta")


def no_groups(model, loss, *, rng):
    return None


def method(task, groups, budget, *, rng):
    return one_shot(random)(task, groups, budget, rng=rng)


def no_plan(task, groups, budget, *, rng):
    return task.model


def sparing(task, groups, budget, *, rng):
    return one_shot(random)(task, groups, Budget(params=0.01), rng=rng)


def boasting(task, groups, budget, *, rng):
    pruned, plan = sparing(task, groups, budget, rng=rng)
    return pruned, replace(plan, removed=dict.fromkeys(plan.removed, 0.9), budget={budget.unit: budget.target})


def untouched(task, groups, budget, *, rng):
    return deepcopy(task.model), method(task, groups, budget, rng=rng)[1]


def itself(task, groups, budget, *, rng):
    return task.model, method(task, groups, budget, rng=rng)[1]


def another(task, groups, budget, *, rng):
    return nn.Linear(2, 2), method(task, groups, budget, rng=rng)[1]


def stuck(task, groups, budget, *, rng):
    pruned, plan = method(task, groups, budget, rng=rng)
    pruned[4] = nn.Unflatten(1, (3, -1))
    return pruned, plan


def squeezed(task, groups, budget, *, rng):
    pruned, plan = method(task, groups, budget, rng=rng)
    return nn.Sequential(*pruned, nn.Unflatten(1, (5, 2)), nn.Flatten(0, 1)), plan


def of_others(task, groups, budget, *, rng):
    pruned, plan = method(task, groups, budget, rng=rng)
    return pruned, replace(plan, rows={"conv": "#-"})


def not_json(task, groups, budget, *, rng):
    pruned, plan = method(task, groups, budget, rng=rng)
    return pruned, replace(plan, budget={"ratio": torch.zeros(2)})


def implant(module, rows, inputs):
    return centre_tap(module, rows, inputs)


def no_module(module, rows, inputs):
    return None


def padded(module, rows, inputs):
    made = centre_tap(module, rows, inputs)
    made.padding = (2, 2)
    return made
