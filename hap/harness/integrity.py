"""What must be true of records, one by one and beside each other: runs -> what is wrong; does not know where they lie.

Everything is worked out again from the numbers that a record has; nothing is taken from the code that made it.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from hap.harness.run import Run
from hap.harness.spec import Base, Case

NEAR = 1e-9
SIZES = ("params", "macs", "prunable")  # of a budget: what it is a share of
POINT = 0.01  # how far apart two cases may end up of one budget: groups are not divisible
Wrong = Iterator[tuple[str, object]]  # the rule, what was found


def record(run: Run, case: Case) -> Wrong:
    """What is wrong with a record of a case by itself."""
    yield from _hashes(run, case)
    yield from _deltas(run)
    yield from _selected(run)


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


def _selected(run: Run) -> Wrong:
    metrics, tests = run.metrics, [epoch["test"] for epoch in run.epochs]
    if not tests:
        for stage in ("selected", "last", "best_test_epoch"):
            if metrics[stage] != metrics["one_shot"]:
                yield f"{stage} must be one_shot, for nothing was fine-tuned", metrics[stage]
        return
    if metrics["last"] != tests[-1]:
        yield "last must be the test of the last epoch", metrics["last"]
    names = [name for name in tests[0] if name != "loss"]
    ruled = [test for name in names for test in _best([epoch["validation"] for epoch in run.epochs], tests, name)]
    if metrics["selected"] not in ruled:
        yield "selected must be the test of the epoch that is best on the validation split", metrics["selected"]
    if metrics["best_test_epoch"] not in [test for name in names for test in _best(tests, tests, name)]:
        yield "best_test_epoch must be the best test of an epoch", metrics["best_test_epoch"]


def _best(by: Sequence[Mapping[str, float]], tests: list[dict[str, float]], metric: str) -> list[dict[str, float]]:
    """The tests of the epochs that none is better than by a metric; epochs may be equal."""
    values = [each.get(metric, -math.inf) for each in by]
    return [test for test, value in zip(tests, values, strict=True) if value == max(values)]


def networks(runs: Iterable[Run]) -> Iterator[tuple[Run, str, object]]:
    """The runs whose dense network, or whose data, is not that of the first run of the same workload."""
    first: dict[str, object] = {}
    for run in runs:
        task, data = json.dumps(run.config["task"], sort_keys=True), run.data
        told = {
            f"the dense accuracy of seed {run.seed}": (task, run.metrics["dense"]["accuracy"]),
            "the parameters of the dense network": (task, run.cost["dense"]["params"]),
            "the MACs of the dense network, by one convention,": (task, run.cost["dense"]["macs"]),
            "the sha256 of the data": (data["name"], data["sha256"]),
        }
        for what, (whose, value) in told.items():
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
