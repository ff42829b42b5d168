"""Case + seed -> Run: the procedure of the paper, on one screen; does not know where records lie."""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from hap.cost import latency, macs, params
from hap.harness.batchnorm import recalibrate
from hap.harness.processes import ranks
from hap.harness.records.freshness import decides, entrances
from hap.harness.records.outcomes import Said, packed
from hap.harness.records.provenance import code, environment
from hap.harness.returned import accepted, agree, runs
from hap.harness.scoring import Scoring, remembered
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Case
from hap.harness.task import Task
from hap.harness.train.loop import Curve, Event, Say, State, exactly, fit, generator, silent, snapshot, threads
from hap.plan import Plan, plan
from hap.structure.groups import Groups, couple
from hap.structure.heads import heads
from hap.structure.tracing import trace
from hap.surgery.apply import apply
from hap.testing import check_groups

Method = Callable[..., tuple[nn.Module, Plan]]  # (task, groups, budget, *, rng, **options)
STARTS = {
    "task": 0.0,
    "trace": 0.1,
    "prune": 0.12,
    "score": 0.12,
    "plan": 0.2,
    "apply": 0.2,
    "finetune": 0.25,
    "evaluate": 0.9,
}


def run(case: Case, seed: int, *, say: Say = silent, keep: Path | None = None) -> "Run":
    """The record of one case and one seed: score the groups of a trained model, prune them, fine-tune, test [Yu22].

    `keep`: a folder for the epochs of the fine-tuning, so that one that was killed goes on.
    """
    clock = Clock(say)
    with exactly(), clock("task"):
        task = load_task(case.task, seed, lambda event: say(Event(event, STARTS["trace"] * (event.fraction or 0))))
    ranks.agreed(f"{task.name}: the data", f"{task.data.sha256} {task.train_size}")
    with exactly(), threads(task.threads):
        with clock("trace"):
            groups = remembered(case, seed, f"groups {case.coupling} {case.prune}", lambda: groups_of(task, case))
        score = Scoring(case, seed, say)
        prune = one_shot(score, _bound(case.implant), clock) if case.score else _bound(case.method)
        with clock("prune"):
            found = prune(task, groups, case.budget, rng=generator(seed, "prune"))
            pruned, chosen = accepted(case.method.use, task, groups, case.budget, found) if case.method else found
            ranks.agreed(f"{task.name}: the plan", json.dumps(chosen.to_json()))
            if case.recalibrate:
                recalibrate(pruned, task.batches, task.loss.call)
        before = snapshot(pruned)
        with clock("finetune"):
            rng, curve = generator(seed, "finetune"), Curve([], [])
            if case.finetune:
                curve = fit(pruned, task, case.finetune, rng=rng, say=clock.during, keep=keep)
        with clock("evaluate"):
            whole = remembered(case, seed, "accuracy", lambda: on_test(task, task.model))
            metrics, epochs, outcomes = examine(task, whole, pruned, before, curve)
            dense = remembered(case, seed, "cost", lambda: _cost(task.model, task))
            cost = {"dense": dense, "pruned": _cost(pruned, task)}
            metrics |= {"ranking": score.ranking} if score.ranking else {}
            if score.seconds:
                clock.seconds["score"] = score.seconds[0]  # also where it was remembered
        where = environment(next(task.model.parameters()).device)
        where |= {"ranks": ranks.world()} if ranks.world() > 1 else {}
    return Run(
        spec=case.spec,
        case=case.name,
        key=case.key,
        seed=seed,
        config=case.config,
        metrics=metrics,
        epochs=epochs,
        plan=chosen.to_json(),
        cost=cost,
        seconds=clock.seconds,
        environment=where,
        code={**code(), "decides": decides(entrances(case.config))},
        data=asdict(task.data) | ({"test_samples": task.test_samples} if task.test_samples else {}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=[*task.notes, *score.warnings, *curve.notes],
        outcomes=outcomes,
    )


def one_shot(score: Callable[..., Any], implant: Any = None, clock: "Clock | None" = None) -> Method:
    """The method of the paper made of a score and an implant: score once, plan once, apply once."""
    clock = clock or Clock(silent)

    def method(task: Task, groups: Groups, budget: Any, *, rng: Any) -> tuple[nn.Module, Plan]:
        with clock("score"):
            scores = score(task.model, task.loss, task.batches, groups, rng=rng)
        with clock("plan"):
            chosen = plan(groups, scores, budget)
        with clock("apply"):
            inputs = [inputs for inputs, _ in task.batches]
            pruned = apply(task.model, groups, chosen, implant, batches=inputs, call=task.loss.call)
        agree(task.name, task, pruned, chosen)
        if implant is not None:
            runs(task.name, task, pruned)
        return pruned, chosen

    return method


class Tested(NamedTuple):
    """What a network reached on the test set, and what it said of each sample, where the task tells."""

    metrics: dict[str, float]
    said: Said | None


def on_test(task: Task, model: nn.Module) -> Tested:
    """A network on the test set."""
    said: list[Said] = []

    def seen(classes: Tensor, labels: Tensor) -> None:
        said.append(Said(classes.cpu().numpy(), labels.cpu().numpy()))

    offered = {"seen": seen} if "seen" in inspect.signature(task.evaluate).parameters else {}
    metrics = task.evaluate(model, "test", **offered)
    return Tested(metrics, said[0] if said else None)


def examine(
    task: Task, dense: Tested, pruned: nn.Module, before: State, curve: Curve
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]], dict[str, Any]]:
    """The stages and the epochs on the test set, which is looked at after all is decided, and nowhere else by us.

    Metrics by stage, a row an epoch, and which samples were right at three of the stages.

    A faithful task may have selected its dense model on it, as published (`keep = "best_test"`), and says so.
    """
    one, *found = [on_test(task, _restored(pruned, state)) for state in (before, *curve.states())]
    stages = {"dense": dense, "one_shot": one, "selected": found[curve.selected] if found else one}
    metrics = {stage: each.metrics for stage, each in stages.items()}
    metrics |= dict.fromkeys(("last", "best_test_epoch"), one.metrics)
    if found:
        # upstream: reports the epoch that is best on the test set; recorded as what it is, and never selected by
        best = max((each.metrics for each in found), key=lambda each: (each[task.metric], -each["loss"]))
        metrics |= {"last": found[-1].metrics, "best_test_epoch": best}
    rows = [{**row, "test": each.metrics} for row, each in zip(curve.epochs, found, strict=True)]
    said = {stage: each.said for stage, each in stages.items() if each.said is not None}
    return metrics, rows, packed(said, binary="f1" in dense.metrics) if len(said) == len(stages) else {}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of one case and one seed, JSON-able; the order of the fields is the record's."""

    schema: int = 1
    spec: str
    case: str
    key: str
    seed: int
    config: dict[str, Any]  # the whole case, as in the spec
    metrics: dict[str, dict[str, float]]  # dense, one_shot, selected, last, best_test_epoch on the test set; ranking
    epochs: list[dict[str, Any]]
    plan: dict[str, Any]
    cost: dict[str, dict[str, Any]]  # dense, pruned
    seconds: dict[str, float]
    environment: dict[str, Any]
    code: dict[str, Any]
    data: dict[str, Any]
    created: str  # UTC
    warnings: list[str] = field(default_factory=list)
    outcomes: dict[str, Any] = field(default_factory=dict)  # which test samples were right, as `records.outcomes` packs


@dataclass(frozen=True)
class Clock:
    """Says what begins, and keeps how long it took."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """One stage."""
        self.say(Event(stage, STARTS.get(stage)))
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def during(self, event: Event) -> None:
        """A line from within the fine-tuning, at its place in the whole."""
        span = STARTS["evaluate"] - STARTS["finetune"]
        self.say(Event(event, STARTS["finetune"] + span * (event.fraction or 0)))


def load_task(ref: Ref, seed: int, say: Say = silent) -> Task:
    """The workload; one that trains its model is offered to tell of it."""
    function = ref.load()
    offered = {"say": say} if "say" in inspect.signature(function).parameters else {}
    made: Task = function(seed, **offered, **ref.options)
    return made


def groups_of(task: Task, case: Case) -> Groups:
    """What may be pruned; surgery on it is checked against masking."""
    groups = couple(task.model, trace(task.model, task.example, call=task.loss.call), case.coupling)
    groups = heads(groups) if case.prune == "heads" else groups
    check_groups(task.model, task.example, groups, call=task.loss.call, trials=2)
    return groups


def _bound(ref: Ref | None) -> Any:
    return ref and partial(ref.load(), **ref.options)


def _restored(model: nn.Module, state: State) -> nn.Module:
    model.load_state_dict(state)
    return model


def _cost(model: nn.Module, task: Task) -> dict[str, Any]:
    return ranks.shared(partial(_measured, model, task))  # on a machine where others wait


def _measured(model: nn.Module, task: Task) -> dict[str, Any]:
    seconds = latency(model, task.example, call=task.loss.call)
    return {
        "params": params(model),
        "macs": macs(model, task.example, call=task.loss.call),
        "latency_seconds": {str(batch): value for batch, value in seconds.items()},
    }
