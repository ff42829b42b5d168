"""What a spec will take before it is run: a few real steps of each of its stages, timed, counted and multiplied.

Each workload is made as for a run, but where it would train its model, two steps are timed instead. A score is timed on
one calibration batch, with few probes; a fine-tuning on the dense network, so that its hours are at most those; the
test set is not looked at, only its size. FLOPs are counted by torch, backward passes included. On a CPU a step of a
large network has few samples, and counts as the batch they are from.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from hap.cost import macs, params
from hap.groups import Groups
from hap.harness import ranks
from hap.harness.bill import STAGES, Estimate, Price
from hap.harness.binding import Ref
from hap.harness.cases import few
from hap.harness.curve import INSTEAD, Curve
from hap.harness.recipe import Recipe
from hap.harness.run import groups_of, load_task
from hap.harness.spec import Case, Spec
from hap.harness.stepping import LEAST, Stepper, exactly, optimiser
from hap.harness.tasks import Task
from hap.harness.training import generator, snapshot, threads

STEPS = 2  # that are timed, after one that warms up
LOADING, MOST = 3.0, 64  # seconds, and batches, by which the loading of data is timed
SMALL = 4e10  # FLOPs of the forward pass of a step on a CPU


def estimate(spec: Spec, say: Callable[[str], None]) -> Estimate:
    """What all records of a spec take on this device, from nothing; HapError where its data is not here."""
    meter, device = Meter(say), ""
    stages, counts = {stage: Price() for stage in STAGES}, dict.fromkeys(STAGES, 0)
    chains, disk = [Price()], 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with exactly():
        for case in spec.cases.values():
            task, dense = meter.task(case, spec.seeds[0])
            device = str(next(task.model.parameters()).device)
            with threads(task.threads):
                parts = meter.record(case, task, spec.seeds[0])
            for stage, price in parts.items():
                stages[stage] = stages[stage].plus(price.times(len(spec.seeds)))
                counts[stage] += len(spec.seeds)
            one = Price.sum(parts.values())
            chains.append(one.plus(dense))
            epochs = case.finetune.epochs if case.finetune else 0
            disk = max(disk, 4 * params(task.model) * (epochs + 4))
    models = {key: dense for key, (_, dense) in meter.tasks.items() if dense.flops}
    for dense in models.values():
        stages["train"] = stages["train"].plus(dense.times(len(spec.seeds)))
    counts["train"] = len(models) * len(spec.seeds)
    disk += sum(4 * params(task.model) for task, dense in meter.tasks.values() if dense.flops) * len(spec.seeds)
    memory = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    chain = max(chains, key=lambda price: price.seconds)
    return Estimate(spec.name, stages, counts, chain, memory, disk, device)


@dataclass
class Meter:
    """What was measured once, for the cases that share it."""

    say: Callable[[str], None]
    tasks: dict[str, tuple[Task, Price]] = field(default_factory=dict)
    known: dict[str, Price] = field(default_factory=dict)

    def task(self, case: Case, seed: int) -> tuple[Task, Price]:
        """The workload of a case with an untrained model where it would train one, and what training it takes."""
        key = str(case.task.model_dump())
        if key not in self.tasks:
            self.say(f"{case.task}: its training")
            with _instead() as seen:
                task = load_task(case.task, seed)
            dense = Price.sum(steps_of(*each).plus(validation(each[1], each[2].epochs)) for each in seen)
            self.tasks[key] = task, dense
        return self.tasks[key]

    def record(self, case: Case, task: Task, seed: int) -> dict[str, Price]:
        """What the stages of one record take, its dense model given."""
        shared = f"{case.task.model_dump()}"
        traced = self._once(f"{shared} trace {case.coupling} {case.prune}", lambda: trace_of(task, case))
        scored = self._once(
            f"{shared} {case.coupling} {case.prune} {case.score} {case.method} {case.reference}",
            lambda: score_of(task, case, seed),
        )
        parts = {"trace": traced, "score": scored}
        recipe = case.finetune
        if recipe is not None:
            parts["fine-tune"] = self._once(
                f"{shared} {recipe}", lambda: steps_of(deepcopy(task.model), task, recipe, generator(seed))
            )
        epochs = recipe.epochs + recipe.stabilise if recipe is not None else 0
        passes = self._once(f"{shared} forward", lambda: forward_of(task))
        tested = (epochs + 1) * (task.test_samples or 0)  # after all is decided, each epoch is tested
        parts["evaluate"] = passes.times(tested).plus(validation(task, epochs, passes))
        return parts

    def _once(self, key: str, measure: Callable[[], Price]) -> Price:
        if key not in self.known:
            self.say(key[-100:])
            self.known[key] = measure()
        return self.known[key]


def steps_of(model: nn.Module, task: Task, recipe: Recipe, rng: torch.Generator) -> Price:
    """The training of a recipe, by a few of its steps: data, forward, backward and optimiser."""
    before, plain = snapshot(model), replace(recipe, compile=False)
    here = recipe if next(model.parameters()).device.type == "cuda" else plain  # on a CPU it takes minutes to compile
    size, moved = recipe.micro_batch or recipe.batch_size, optimiser(model, recipe)
    model.train()
    source = task.train(recipe.batch_size, rng)
    inputs, targets, share = _cut(task, *_part(task, next(source)))
    with FlopCounterMode(display=False) as counter:  # which does not see into what is compiled
        Stepper(model, task, plain, size)(inputs, targets)
    step = Stepper(model, task, here, size)

    def once() -> None:
        step(inputs, targets)
        moved.step()
        moved.zero_grad(set_to_none=True)

    once()
    stepped, loaded = min(_seconds(once) for _ in range(STEPS)) / share, loading(source)
    model.load_state_dict(before)
    model.eval()
    count = -(-task.train_size // recipe.batch_size) * recipe.epochs
    # a GPU works while the CPU decodes
    seconds = max(stepped, loaded) if here is recipe else stepped + loaded
    return Price(1, counter.get_total_flops() / share, seconds).times(count)


def loading(source: Iterator[Any]) -> float:
    """The seconds that a batch takes to come, once what workers had ready is used up."""
    took, start = list[float](), time.perf_counter()
    while len(took) < 2 or (time.perf_counter() - start < LOADING and len(took) < MOST):
        took.append(_seconds(lambda: next(source, None)))
    later = took[len(took) // 2 :]
    return sum(later) / len(later)


def trace_of(task: Task, case: Case) -> Price:
    """Tracing, coupling and the check of surgery against masking."""
    start = time.perf_counter()
    groups_of(task, case)
    return Price(0, 0.0, time.perf_counter() - start)


def score_of(task: Task, case: Case, seed: int) -> Price:
    """A score, with its reference, or a method: on one batch with few probes, times batches and probes."""
    groups = groups_of(task, case)
    inputs, targets, share = _cut(task, *task.batches[0])
    count, whole = len(task.batches) / share, Price()
    for ref in (case.score, case.method, case.reference):
        if ref is None:
            continue
        probes, cheap = few(ref)  # of the published default of 3, two
        price = _measured(partial(_scored, cheap, ref is case.method, task, case, groups, (inputs, targets), seed))
        whole = whole.plus(price.times(count * probes))
    return whole


def _scored(ref: Ref, method: bool, task: Task, case: Case, groups: Groups, batch: Any, seed: int) -> None:
    rng = generator(seed, "price")
    if not method:
        ref.load()(task.model, task.loss, [batch], groups, rng=rng, **ref.options)
        return
    with _instead():
        ref.load()(replace(task, batches=[batch]), groups, case.budget, rng=rng, **ref.options)


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
    """A forward pass of one sample, among those of a batch, and how long it takes to come."""
    loaded = _seconds(lambda: task.batches[0]) / len(task.batches[0][1])
    inputs, targets, _ = _cut(task, *task.batches[0])
    with torch.inference_mode():
        one = _measured(lambda: task.loss.call(task.model, inputs)).times(1 / len(targets))
    return Price(0, one.flops, one.seconds + loaded)


def validation(task: Task, epochs: int, one: Price | None = None) -> Price:
    """The validation after each epoch, taken to have as many samples as the test set where a task does not say."""
    return (one or forward_of(task)).times(epochs * (task.test_samples or 0))


@contextmanager
def _instead() -> Iterator[list[tuple[nn.Module, Task, Recipe, torch.Generator]]]:
    """Inside, trainings are noted, not done."""
    seen: list[tuple[nn.Module, Task, Recipe, torch.Generator]] = []

    def note(model: nn.Module, task: Task, recipe: Recipe, rng: torch.Generator) -> Curve:
        seen.append((model, task, recipe, rng))
        row = {"epoch": 0, "validation": {task.metric: 0.0, "loss": 0.0}}
        return Curve([row], [snapshot(model)], [], task.metric)

    token = INSTEAD.set(note)
    try:
        yield seen
    finally:
        INSTEAD.reset(token)


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
