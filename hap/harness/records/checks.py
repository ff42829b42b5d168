"""What must be true of records, one by one and beside each other: runs -> what is wrong; does not know where they lie.

Everything is worked out again from the numbers that a record has; nothing is taken from the code that made it.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import combinations
from typing import Any

from hap.harness.records import outcomes
from hap.harness.records.record import Run
from hap.harness.spec.spec import Base, Case
from hap.harness.tasks import glue

NEAR = 1e-9
SIZES = ("params", "macs", "prunable")  # of a budget: what it is a share of
POINT = 0.01  # how far apart two cases may end up of one budget: groups are not divisible
Wrong = Iterator[tuple[str, object]]  # the rule, what was found
# what a record raises where a part is missing, or is not what it should be
BROKEN = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


def record(run: Run, case: Case, shown: str) -> Wrong:
    """What is wrong with a record of a case by itself; `shown` is the metric of its spec; raises one of BROKEN."""
    yield from _hashes(run, case)
    yield from _deltas(run)
    yield from _planned(run)
    yield from _selected(run, _metric(run, shown))
    yield from outcomes.differing(run.outcomes, run.metrics)
    for unit in ("params", "macs"):
        _removed(run, unit)  # what is checked of records beside each other must be there
    _shared(run)


def _hashes(run: Run, case: Case) -> Wrong:
    decides = {name: part for name, part in run.config.items() if name not in ("spec", "case")}
    text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    if (key := sha256(text.encode()).hexdigest()[:10]) != run.key:
        yield f"its key must be that of its config, {key}", run.key
    wanted = json.loads(json.dumps(case.config))
    if changed := sorted(name for name in run.config | wanted if run.config.get(name) != wanted.get(name)):
        yield "its config must be that of its case", f"another {', '.join(changed)}"
    for name, value in (("code", run.code.get("sha256")), ("data", run.data.get("sha256"))):
        if not re.fullmatch("[0-9a-f]{64}", str(value)):
            yield f"{name}.sha256 must be 64 hex digits", value
    commit = run.code.get("commit")
    if commit is not None and not re.fullmatch("[0-9a-f]{40}", str(commit)):
        yield "code.commit must be 40 hex digits, or null", commit


def _deltas(run: Run) -> Wrong:
    dense, pruned = run.cost["dense"], run.cost["pruned"]
    for unit in ("params", "macs"):
        before, after = dense[unit], pruned[unit]
        if not (isinstance(before, int) and isinstance(after, int) and 0 < after <= before):
            yield f"{unit} must be whole, and no more after pruning than before", f"{before}, {after}"
            continue
        told = run.plan.get("removed", {}).get(unit)
        if told is not None and abs(told - (1 - after / before)) > NEAR:
            yield f"plan.removed.{unit} must be 1 - {after} / {before}", told


def _planned(run: Run) -> Wrong:
    rows, removed = run.plan.get("rows"), run.plan.get("removed")
    if not (isinstance(rows, dict) and rows and all(re.fullmatch("[#o-]+", str(line)) for line in rows.values())):
        yield "plan.rows must be a line of '#', 'o' and '-' for each module", f"{rows!r:.80}"
    for unit in ("params", "macs"):
        share = removed.get(unit) if isinstance(removed, dict) else None
        if not (isinstance(share, int | float) and math.isfinite(share)):
            yield f"plan.removed.{unit} must be a share", share


def _metric(run: Run, shown: str) -> str:
    """That by which the task of a record selects epochs; a stranger's task is not asked, and has that of the spec."""
    task = run.config["task"]
    if (data := task["options"].get("data")) in glue.TASKS:
        return glue.TASKS[data].metric
    ours = task["use"].startswith("hap.") or shown not in run.metrics["selected"]
    return "accuracy" if ours else shown


def _selected(run: Run, metric: str) -> Wrong:
    metrics, tests = run.metrics, [epoch["test"] for epoch in run.epochs]
    if not tests:
        for stage in ("selected", "last", "best_test_epoch"):
            if metrics[stage] != metrics["one_shot"]:
                yield f"{stage} must be one_shot, for nothing was fine-tuned", metrics[stage]
        return
    if metrics["last"] != tests[-1]:
        yield "last must be the test of the last epoch", metrics["last"]
    chosen = _best([epoch["validation"] for epoch in run.epochs], metric)
    if metrics["selected"] != tests[chosen]:
        rule = "selected must be the test of the epoch that is best on the validation split"
        yield f"{rule}, {chosen}, by {metric}, then loss, then time", metrics["selected"]
    if metrics["best_test_epoch"] != tests[_best(tests, metric)]:
        yield f"best_test_epoch must be the best test of an epoch, by {metric}", metrics["best_test_epoch"]


def _best(by: Sequence[Mapping[str, float]], metric: str) -> int:
    """The epoch of highest metric; of equals, that of lower loss, then the earlier."""
    return max(range(len(by)), key=lambda i: (by[i][metric], -by[i]["loss"], -i))


def copied(runs: Sequence[Run]) -> Iterator[tuple[Run, str, object]]:
    """The runs of one case that cannot have been made on their own, for a clock or a draw never gives the same twice.

    Without fine-tuning equal metrics tell nothing: a case may draw nothing.
    """
    for other, run in combinations(runs, 2):
        if run.seconds == other.seconds:
            yield run, "its seconds must be its own", f"those of seed {other.seed}"
        elif run.epochs and _untimed(run) == _untimed(other):
            yield run, "its epochs must be its own", f"those of seed {other.seed}"


def _untimed(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in run.epochs]


def _shared(run: Run) -> dict[str, tuple[str, object]]:
    """What a record has in common with others: its name, whose it is, its value."""
    task = json.dumps(run.config["task"], sort_keys=True)
    return {
        f"the dense accuracy of seed {run.seed}": (task, run.metrics["dense"]["accuracy"]),
        "the parameters of the dense network": (task, run.cost["dense"]["params"]),
        "the MACs of the dense network, by one convention,": (task, run.cost["dense"]["macs"]),
        "the sha256 of the data": (run.data["name"], run.data["sha256"]),
    }


def networks(runs: Iterable[Run]) -> Iterator[tuple[Run, str, object]]:
    """The runs whose dense network, or whose data, is not that of the first run of the same workload."""
    first: dict[str, object] = {}
    for run in runs:
        for what, (whose, value) in _shared(run).items():
            known = first.setdefault(f"{what} {whose}", value)
            if known != value:
                yield run, f"{what} must be that of the other records, {known}", value


def published(run: Run, bases: Iterable[Base]) -> Wrong:
    """A dense accuracy that is not the published one of its network."""
    found = run.metrics["dense"]["accuracy"]
    for base in bases:
        if base.task == run.config["task"]["use"] and abs(found - base.accuracy) > base.tolerance + NEAR:
            yield f"the dense accuracy must be {base.accuracy:g} ± {base.tolerance:g}, {base.source}", found


def compared(mine: Case, theirs: Case, runs: Mapping[str, Sequence[Run]]) -> Wrong:
    """Two cases that a claim compares, and that differ in size, or in what they may train on."""
    sizes = [{unit: getattr(case.budget, unit) for unit in SIZES} for case in (mine, theirs)]
    if sizes[0] != sizes[1]:
        yield f"budgets of {mine.name} and {theirs.name} must be equal", _unequal(*sizes)
    trained = [{"task": case.task.model_dump(), "epochs": _epochs(case)} for case in (mine, theirs)]
    if trained[0] != trained[1]:
        yield f"{mine.name} and {theirs.name} must have one workload and as many epochs", _unequal(*trained)
    unit = "macs" if mine.budget.macs is not None else "params"
    others = {run.seed: run for run in runs[theirs.name]}
    for run in runs[mine.name]:
        if run.seed not in others:
            continue
        shares = [_removed(each, unit) for each in (run, others[run.seed])]
        if abs(shares[0] - shares[1]) > POINT:
            found = f"{100 * shares[0]:.4g} % and {100 * shares[1]:.4g} % of the {unit}, seed {run.seed}"
            yield f"{mine.name} and {theirs.name} must be pruned alike to {100 * POINT:g} point", found


def _epochs(case: Case) -> int:
    return case.finetune.epochs if case.finetune else 0


def _removed(run: Run, unit: str) -> float:
    return float(1 - run.cost["pruned"][unit] / run.cost["dense"][unit])


def _unequal(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} {mine[name]} and {theirs[name]}" for name in mine if mine[name] != theirs[name])
