"""Case + seed -> Run: the procedure of the paper, on one screen; does not know where records lie."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from hap.cost import latency, macs, params
from hap.harness.batchnorm import recalibrate
from hap.harness.processes import ranks
from hap.harness.processes.progress import Clock, Say, silent
from hap.harness.processes.provenance import code, environment
from hap.harness.processes.workers import Known
from hap.harness.records.freshness import decides, entrances
from hap.harness.records.outcomes import Said, packed
from hap.harness.records.record import Run
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Case
from hap.harness.supplied import Dense, Scored, accepted, agree, runs, scored
from hap.harness.task import Task
from hap.harness.train.loop import Curve, Fit, State, exactly, fit, generator, snapshot, threads
from hap.plan import Plan, plan
from hap.structure.groups import Groups, couple
from hap.structure.heads import heads
from hap.structure.tracing import trace
from hap.surgery.apply import added, apply
from hap.testing import check_groups

Method = Callable[..., tuple[nn.Module, Plan]]  # (task, groups, budget, *, rng, **options)


def run(case: Case, seed: int, *, known: Known | None = None, say: Say = silent, keep: Path | None = None) -> Run:
    """The record of one case and one seed: score the groups of a trained model, prune them, fine-tune, test [Yu22].

    `known`: a table that runs share, of what they worked out of dense models. `keep`: a folder for the epochs of the
    fine-tuning, so that one that was killed goes on.
    """
    dense, timed = Dense(case.task, seed, {} if known is None else known), Clock(say)
    with exactly():
        task = timed("task", load_task, case.task, seed, partial(fit, say=timed.within("task")))
    with exactly(), threads(task.threads):
        groups = timed("trace", groups_of, task, case, dense)
        score = timed("score", scored, case, task, groups, dense, say) if case.score is not None else None
        if score is None:
            pruned, chosen = timed("prune", by_method, case, seed, task, groups)
        else:
            chosen = timed("plan", plan, groups, score.scores, case.budget)
            pruned, chosen = timed("apply", applied, task, groups, chosen, bound(case.implant), bound(case.update))
        if case.recalibrate:
            recalibrate(pruned, task.batches, task.loss.call)
        start, rng = snapshot(pruned), generator(seed, "finetune")
        tune = partial(fit, rng=rng, say=timed.within("finetune"), keep=keep)
        curve = timed("finetune", tune, pruned, task, case.finetune) if case.finetune is not None else Curve([], [])
        tests = timed("evaluate", tested, task, pruned, start, curve, dense)
        return record(case, seed, task, chosen, score, curve, tests, timed.seconds)


def one_shot(score: Callable[..., Any], implant: Any = None, update: Any = None) -> Method:
    """The method of the paper made of a score, an implant and an update: score once, plan once, apply once."""

    def method(task: Task, groups: Groups, budget: Any, *, rng: Any) -> tuple[nn.Module, Plan]:
        chosen = plan(groups, score(task.model, task.loss, task.batches, groups, rng=rng), budget)
        return applied(task, groups, chosen, implant, update)

    return method


def load_task(ref: Ref, seed: int, train: Fit) -> Task:
    """The workload; one that trains its model is given `train`. HapError where ranks have different data."""
    function = ref.load()
    offered = {"fit": train} if "fit" in inspect.signature(function).parameters else {}
    task: Task = function(seed, **offered, **ref.options)
    ranks.agreed(f"{task.name}: the data", f"{task.data.sha256} {task.train_size}")
    return task


def groups_of(task: Task, case: Case, dense: Dense) -> Groups:
    """What may be pruned; surgery on it is checked against masking."""

    def make() -> Groups:
        groups = couple(task.model, trace(task.model, task.example, call=task.loss.call), case.coupling)
        groups = heads(groups) if case.prune == "heads" else groups
        check_groups(task.model, task.example, groups, call=task.loss.call, trials=2)
        return groups

    return dense.once(make, "groups", case.coupling, case.prune)


def by_method(case: Case, seed: int, task: Task, groups: Groups) -> tuple[nn.Module, Plan]:
    """The model that the method of a case pruned, and its plan, checked."""
    assert case.method is not None
    found = bound(case.method)(task, groups, case.budget, rng=generator(seed, "prune"))
    return accepted(case.method.use, task, groups, case.budget, found)


def applied(task: Task, groups: Groups, chosen: Plan, implant: Any, update: Any) -> tuple[nn.Module, Plan]:
    """The model that a plan leaves, checked, and the plan with the biases that an update added."""
    inputs = [inputs for inputs, _ in task.batches]
    pruned = apply(task.model, groups, chosen, implant, update, batches=inputs, call=task.loss.call, loss=task.loss)
    chosen = replace(chosen, added=added(task.model, pruned)) if update is not None else chosen
    agree(task.name, task, pruned, chosen)
    if implant is not None or update is not None:
        runs(task.name, task, pruned)
    return pruned, chosen


def bound(ref: Ref | None) -> Any:
    """The function that a case names, with its options; None where it names none."""
    return ref and partial(ref.load(), **ref.options)


class Tested(NamedTuple):
    """What the test set says of each stage and epoch, and what the dense and the pruned model cost."""

    metrics: dict[str, dict[str, float]]
    epochs: list[dict[str, Any]]
    cost: dict[str, dict[str, Any]]
    outcomes: dict[str, Any]  # which samples were right, where the task says


class Answers(NamedTuple):
    """What a network reaches on the test set, and what it says of each sample, where the task lets it be seen."""

    metrics: dict[str, float]
    said: Said | None


def tested(task: Task, pruned: nn.Module, start: State, curve: Curve, dense: Dense) -> Tested:
    """The stages and the epochs on the test set, which is looked at after all is decided, and nowhere else by us.

    A faithful task may have selected its dense model on it, as published (`keep = "best_test"`), and says so.
    """
    whole = dense.once(lambda: answers(task, task.model), "answers")
    one, *each = [answers(task, _restored(pruned, state)) for state in (start, *curve.states())]
    stages = {"dense": whole, "one_shot": one, "selected": one, "last": one, "best_test_epoch": one}
    if each:
        # upstream: reports the epoch that is best on the test set; recorded as what it is, and never selected by
        best = max(each, key=lambda found: (found.metrics[task.metric], -found.metrics["loss"]))
        stages |= {"selected": each[curve.selected], "last": each[-1], "best_test_epoch": best}
    metrics = {stage: found.metrics for stage, found in stages.items()}
    epochs = [{**row, "test": found.metrics} for row, found in zip(curve.epochs, each, strict=True)]
    cost = {"dense": dense.once(lambda: _cost(task.model, task), "cost"), "pruned": _cost(pruned, task)}
    return Tested(metrics, epochs, cost, packed({stage: found.said for stage, found in stages.items()}, metrics))


def answers(task: Task, model: nn.Module) -> Answers:
    """A network on the test set."""
    said: list[Said] = []

    def seen(classes: Tensor, labels: Tensor) -> None:
        said.append(Said(classes.cpu().numpy(), labels.cpu().numpy()))

    offered = {"seen": seen} if "seen" in inspect.signature(task.evaluate).parameters else {}
    metrics = task.evaluate(model, "test", **offered)
    return Answers(metrics, said[0] if said else None)


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


def record(
    case: Case,
    seed: int,
    task: Task,
    chosen: Plan,
    score: Scored | None,
    curve: Curve,
    tests: Tested,
    seconds: dict[str, float],
) -> Run:
    """All of it, as the record keeps it."""
    where = environment(next(task.model.parameters()).device)
    return Run(
        spec=case.spec,
        case=case.name,
        key=case.key,
        seed=seed,
        config=case.config,
        metrics=tests.metrics | ({"ranking": score.ranking} if score and score.ranking else {}),
        epochs=tests.epochs,
        plan=chosen.to_json(),
        cost=tests.cost,
        seconds=seconds | ({"score": score.seconds} if score else {}),
        environment=where | ({"ranks": ranks.world()} if ranks.world() > 1 else {}),
        code={**code(), "decides": decides(entrances(case.config))},
        data=asdict(task.data) | ({"test_samples": task.test_samples} if task.test_samples else {}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=[*task.notes, *(score.warnings if score else ()), *curve.notes],
        outcomes=tests.outcomes,
    )
