"""What a spec will take before it is run: a few real steps of each of its stages, timed, counted and multiplied.

Each workload is made as for a run, but where it would train its model, its steps are priced instead. A fine-tuning is
priced on the dense network, so that its hours are at most those; the test set is not looked at, only its size.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hap.cost import params
from hap.harness.cli.bill import STAGES, Estimate, Price
from hap.harness.cli.pricing import Noted, forward_of, noting, score_of, steps_of, trace_of, validation
from hap.harness.processes.files import caching
from hap.harness.run import load_task
from hap.harness.spec.spec import Case, Spec
from hap.harness.task import Task
from hap.harness.train.exact import exactly
from hap.harness.train.loop import generator, threads


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
                stages[stage] = stages[stage].plus(price.times(len(spec.first)))
                counts[stage] += len(spec.first)
            one = Price.sum(parts.values())
            chains.append(one.plus(dense))
            epochs = case.finetune.epochs if case.finetune else 0
            disk = max(disk, 4 * params(task.model) * (epochs + 4))
    models = {key: dense for key, (_, dense) in meter.tasks.items() if dense.flops}
    for dense in models.values():
        stages["train"] = stages["train"].plus(dense.times(len(spec.first)))
    counts["train"] = len(models) * len(spec.first)
    disk += sum(4 * params(task.model) for task, dense in meter.tasks.values() if dense.flops) * len(spec.first)
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
            seen = list[Noted]()
            with (
                TemporaryDirectory(prefix="hap-") as empty,
                caching(Path(empty)),
            ):  # neither read nor write a real model
                task = load_task(case.task, seed, partial(noting, seen))
            dense = Price.sum(steps_of(*each).plus(validation(each[1], each[2].epochs)) for each in seen)
            self.tasks[key] = task, dense
        return self.tasks[key]

    def record(self, case: Case, task: Task, seed: int) -> dict[str, Price]:
        """What the stages of one record take, its dense model given."""
        shared = f"{case.task.model_dump()}"
        traced = self._once(f"{shared} trace {case.coupling} {case.prune}", lambda: trace_of(task, case))
        known = f"{shared} {case.coupling} {case.prune}"  # a method may hang on all of the case
        scored = Price.sum(
            self._once(
                f"{known} {ref} {case.budget if ref is case.method else ''}", partial(score_of, ref, task, case, seed)
            )
            for ref in (case.score, case.method, case.reference)
            if ref is not None
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
