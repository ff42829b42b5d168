"""The price of a stage: a few real steps, timed, with their FLOPs as torch counts them, backward passes included.

A score is timed on one calibration batch, with few probes. On a CPU a step of a large network has few samples, and
counts as the batch they are from. Batches of sentences differ in length: a batch counts by the elements that it has.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from hap.cost import macs
from hap.harness.cli.bill import Price
from hap.harness.processes import ranks
from hap.harness.run import groups_of
from hap.harness.spec.cases import few
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Case
from hap.harness.supplied import Dense
from hap.harness.task import Task
from hap.harness.train.loop import Curve, generator, snapshot
from hap.harness.train.recipe import Recipe
from hap.harness.train.step import LEAST, Stepper, optimiser
from hap.structure.kernels import sound

STEPS = 2  # that are timed, after one that warms up
LOADING, MOST = 3.0, 64  # seconds, and batches, by which the loading of data is timed
SMALL = 4e10  # FLOPs of the forward pass of a step on a CPU


def steps_of(model: nn.Module, task: Task, recipe: Recipe, rng: torch.Generator) -> Price:
    """The training of a recipe, by a few of its steps: data, forward, backward and optimiser."""
    with sound(model):
        return _steps(model, task, recipe, rng)


def _steps(model: nn.Module, task: Task, recipe: Recipe, rng: torch.Generator) -> Price:
    before, plain = snapshot(model), replace(recipe, compile=False)
    here = recipe if next(model.parameters()).device.type == "cuda" else plain  # on a CPU it takes minutes to compile
    size, moved = recipe.micro_batch or recipe.batch_size, optimiser(model, recipe)
    model.train()
    source = task.train(recipe.batch_size, rng)
    first = next(source)
    inputs, targets, share = _cut(task, *_part(task, first))
    with FlopCounterMode(display=False) as counter:  # which does not see into what is compiled
        Stepper(model, task, plain, size)(inputs, targets)
    step = Stepper(model, task, here, size)

    def once() -> None:
        step(inputs, targets)
        moved.step()
        moved.zero_grad(set_to_none=True)

    once()
    loaded, extents = loading(source)
    share *= extent(first[0]) * (1 + len(extents)) / (extent(first[0]) + sum(extents))
    stepped = min(_seconds(once) for _ in range(STEPS)) / share
    model.load_state_dict(before)
    model.eval()
    count = -(-task.train_size // recipe.batch_size) * recipe.epochs
    # a GPU works while the CPU decodes
    seconds = max(stepped, loaded) if here is recipe else stepped + loaded
    return Price(1, counter.get_total_flops() / share, seconds).times(count)


def loading(source: Iterator[Any]) -> tuple[float, list[int]]:
    """The seconds that a batch takes to come, once what workers had ready is used up; and the extents of those seen."""
    took, extents, start = list[float](), list[int](), time.perf_counter()

    def load() -> None:
        batch = next(source, None)
        extents.extend([] if batch is None else [extent(batch[0])])

    while len(took) < 2 or (time.perf_counter() - start < LOADING and len(took) < MOST):
        took.append(_seconds(load))
    later = took[len(took) // 2 :]
    return sum(later) / len(later), extents


def extent(inputs: Any) -> int:
    """The elements of a batch, of which sentences have as many as the longest of them."""
    return sum(leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def trace_of(task: Task, case: Case) -> Price:
    """Tracing, coupling and the check of surgery against masking."""
    start = time.perf_counter()
    groups_of(task, case, Dense(case.task, 0, {}))
    return Price(0, 0.0, time.perf_counter() - start)


def score_of(ref: Ref, task: Task, case: Case, seed: int) -> Price:
    """A score, a reference or a method of a case with few probes, times the probes; a score on one batch, times all.

    A method that trains is timed with its training.
    """
    probes, cheap = few(ref)[0:2]
    groups, call = groups_of(task, case, Dense(case.task, seed, {})), partial(cheap.load(), **cheap.options)
    if ref is case.method:
        return _measured(lambda: call(task, groups, case.budget, rng=generator(seed, "price"))).times(probes)
    inputs, targets, share = _cut(task, *task.batches[0])
    batch = [(inputs, targets)]
    price = _measured(lambda: call(task.model, task.loss, batch, groups, rng=generator(seed, "price")))
    return price.times(probes * _whole(task.batches) / share)


def _whole(batches: Sequence[tuple[Any, Tensor]]) -> float:
    """How many times the extent of the first they have together."""
    return sum(extent(inputs) for inputs, _ in batches) / extent(batches[0][0])


def _measured(do: Callable[[], Any]) -> Price:
    """Counted once, which is slow and warms up; then timed."""
    with FlopCounterMode(display=False) as counter:
        do()
    return Price(1, counter.get_total_flops(), _seconds(do))


def _seconds(do: Callable[[], Any]) -> float:
    _synchronise()
    start = time.perf_counter()
    do()
    _synchronise()
    return time.perf_counter() - start


def forward_of(task: Task) -> Price:
    """A forward pass of one sample, such as those of calibration are on average, and how long it takes to come."""
    loaded = _seconds(lambda: task.batches[0]) / len(task.batches[0][1])
    inputs, _, share = _cut(task, *task.batches[0])
    samples = sum(len(targets) for _, targets in task.batches)
    with torch.inference_mode():
        one = _measured(lambda: task.loss.call(task.model, inputs)).times(_whole(task.batches) / share / samples)
    return Price(0, one.flops, one.seconds + loaded)


def validation(task: Task, epochs: int, one: Price | None = None) -> Price:
    """The validation after each epoch, taken to have as many samples as the test set where a task does not say."""
    return (one or forward_of(task)).times(epochs * (task.test_samples or 0))


class Noted(NamedTuple):
    """A training that was asked for."""

    model: nn.Module
    task: Task
    recipe: Recipe
    rng: torch.Generator


def noting(seen: list[Noted], model: nn.Module, task: Task, recipe: Recipe, *, rng: torch.Generator, **_: Any) -> Curve:
    """Takes the place of `fit`: notes what is asked for in `seen`, and trains nothing."""
    seen.append(Noted(model, task, recipe, rng))
    row = {"epoch": 0, "validation": {task.metric: 0.0, "loss": 0.0}}
    return Curve([row], [snapshot(model)], [], task.metric)


def _part(task: Task, batch: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    return batch if task.sharded else ranks.part(*batch)


def _cut(task: Task, inputs: Any, targets: Tensor) -> tuple[Any, Tensor, float]:
    """A batch, on a CPU no more of its samples than are quick, and which share of it they are."""
    whole = len(targets)
    if targets.device.type != "cpu":
        return inputs, targets, 1.0
    one = 2 * macs(task.model, task.example, call=task.loss.call)
    most = min(whole, max(LEAST, int(SMALL / max(one, 1))))
    cut = tree_map(lambda leaf: ranks.rows(leaf, slice(most), whole), inputs)
    return cut, targets[:most], most / whole


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
