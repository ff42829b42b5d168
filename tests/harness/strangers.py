"""Functions that a stranger may bring to `hap compare`, good and bad."""

import torch

from hap.harness.run import one_shot
from hap.implants import centre_tap
from hap.methods import hessian_trace, random

CALLS: list[str] = []


def score(model, loss, batches, groups, *, rng, width: int = 1, name: str = "x"):
    CALLS.append("score")
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


def no_groups(model, loss, *, rng):
    return None


def method(task, groups, budget, *, rng):
    return one_shot(random)(task, groups, budget, rng=rng)


def no_plan(task, groups, budget, *, rng):
    return task.model


def implant(module, rows, inputs):
    return centre_tap(module, rows, inputs)


def no_module(module, rows, inputs):
    return None
