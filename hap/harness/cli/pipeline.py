"""Whether images come as fast as a network takes them: both measured for some seconds, and the slower one named.

For workloads whose module offers `pictures(**options)`, what its workers decode.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import islice
from typing import NamedTuple

import torch

from hap import HapError
from hap.harness.spec.functions import Ref
from hap.harness.task import Task
from hap.harness.tasks.decoding import AHEAD, Pictures, stream, workers
from hap.harness.train.exact import exactly
from hap.harness.train.recipe import Recipe
from hap.harness.train.step import Stepper
from hap.structure.kernels import sound

SECONDS = 1.5  # of each measurement, at least; and at least one step
PART = 8  # images decoded at a time
MOST = 4000  # such parts: more than workers decode in that time


class Speed(NamedTuple):
    """Images a second."""

    one: float  # that one process decodes
    workers: int
    all: float  # that all workers decode
    training: float  # that a step of training takes
    batch: int  # images of such a step


def lines(ref: Ref, recipe: Recipe | None, seed: int) -> Iterator[str]:
    """A line on a workload that decodes images; none for another."""
    offered: Callable[..., Pictures] | None = getattr(import_module(ref.use.partition(":")[0]), "pictures", None)
    if offered is None:
        return
    try:
        yield told(measured(offered(**ref.options), ref.load()(seed, **ref.options), recipe or Recipe(1, 0.1)))
    except HapError as error:
        yield f"  pipeline: NO, {error}"


def told(speed: Speed) -> str:
    """The line."""
    by = f"by {speed.workers} workers" if speed.workers else "in the process that trains, for there are no workers"
    slower = "decoding" if speed.all < speed.training else "the network"
    return (
        f"  pipeline: {speed.one:.0f} images/s a worker, {speed.all:.0f} {by}; training takes {speed.training:.1f} "
        f"images/s, uncompiled and {speed.batch} at a time: {slower} is the bottleneck"
    )


def measured(pictures: Pictures, task: Task, recipe: Recipe, seconds: float = SECONDS) -> Speed:
    """The images a second of the pipeline, by one process and by all, and of training steps as the recipe has them."""
    count, n = workers(), len(pictures.images.labels)
    keys = [[(i % n, i) for i in range(first, first + PART)] for first in range(0, PART * MOST, PART)]
    one = every = _rate((len(part) for part in stream(pictures, keys, 0)), seconds)
    if count:
        ready = (len(part) for part in stream(pictures, keys, count))
        every = _rate(islice(ready, AHEAD * count, None), seconds)  # without what was decoded before the clock
    cuda = next(task.model.parameters()).is_cuda
    batch = min(64, recipe.batch_size) if cuda else 4
    with exactly():
        training = _rate(_steps(task, recipe, batch), seconds)
    return Speed(one, count, every, training, batch)


def _steps(task: Task, recipe: Recipe, batch: int) -> Iterator[int]:
    """Steps for ever, but for the optimiser's, which is a small part of them."""
    plain = replace(recipe, compile=False, distil=None, temperature=None)
    model = copy.deepcopy(task.model).train()
    step = Stepper(model, task, plain, batch)
    inputs = task.example.repeat(batch, *[1] * (task.example.dim() - 1))
    targets = torch.arange(batch, device=inputs.device)
    while True:
        with sound(model):
            float(step(inputs, targets))  # waits for the device
        yield batch


def _rate(counts: Iterable[int], seconds: float) -> float:
    """Counted a second, after a first one that warms up."""
    source = iter(counts)
    next(source)
    start, total = time.perf_counter(), 0
    for each in source:
        total += each
        if (passed := time.perf_counter() - start) >= seconds:
            break
    return total / passed
