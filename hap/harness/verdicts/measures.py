"""What runs say on a claim, in numbers: a value a seed, whether chance is in it, the error of its test set."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hap import HapError
from hap.harness.records.record import Run
from hap.harness.spec.spec import STAGELESS, Claim
from hap.harness.verdicts.statistics import (
    Interval,
    Op,
    counted,
    deviation,
    fails,
    holds,
    interval,
    p_value,
    variance,
    variance_of_difference,
)

Runs = Mapping[str, Sequence[Run]]
Cost = Mapping[str, Any]
Decision = Callable[[Op, Interval, float, float], bool]


@dataclass(frozen=True)
class Measured:
    """A claim with its numbers: a value for each seed, and the standard error that its test set adds."""

    claim: Claim
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    certain: bool  # the seeds make no difference
    sampling: float
    size: int | None  # of the test set

    @property
    def compared(self) -> bool:
        """Whether it is a comparison of cases that chance has a part in."""
        return self.claim.against is not None and (self.sampling > 0 or deviation(self.values) > 0)

    @property
    def band(self) -> tuple[float, float]:
        """What the claim allows."""
        slack = 1e-9 * max(1.0, abs(self.claim.value))  # a difference of two decimals is not exact
        return self.claim.value - self.claim.tolerance - slack, self.claim.value + self.claim.tolerance + slack

    def at(self, confidence: float, decision: Decision = holds) -> Interval:
        """The bounds of the mean; a comparison is bootstrapped where there are seeds enough."""
        confidence = self.level(confidence, decision)
        return interval(self.values, confidence, sampling=self.sampling, bootstrap=self.claim.against is not None)

    def level(self, confidence: float, decision: Decision) -> float:
        """That of each bound: what "==" refutes, it refutes on either side, so each side has half of the error."""
        return (1 + confidence) / 2 if decision is fails and self.claim.op == "==" else confidence

    def p_value(self, decision: Decision) -> float:
        """That of the claim to hold, or to fail."""
        return p_value(lambda confidence: decision(self.claim.op, self.at(confidence, decision), *self.band))

    def told(self, found: Interval) -> str:
        """How the bounds were found."""
        kind = "no spread over seeds" if found.kind == "test set" else found.kind
        return f"{kind}, test set of {self.size}" if self.sampling else kind


def sides(claim: Claim, runs: Runs) -> list[dict[int, Run]]:
    """The runs of the case, and of the one it is compared with, by seed."""
    return [{run.seed: run for run in runs.get(case, ())} for case in (claim.case, claim.against) if case]


def measured(claim: Claim, runs: Runs, seeds: Sequence[int]) -> Measured:
    """The numbers of a claim over these seeds, which all have a run on each side."""
    rows = [[side[seed] for side in sides(claim, runs)] for seed in seeds]
    values = [value(row[0], claim) - sum(value(run, claim) for run in row[1:]) for row in rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    sure = all(_certain(claim, column) for column in columns)
    size = _size([run for column in columns for run in column])
    if sure and claim.stage == "dense" and claim.against is None:
        size = None  # one network, counted on the same images as by its source
    return Measured(claim, tuple(values), tuple(seeds), sure, _sampling(claim, columns, size), size)


def value(run: Run, claim: Claim) -> float:
    """The number of one run that a claim is about."""
    if claim.metric in _COSTS:
        return _COSTS[claim.metric](run.cost["dense"], run.cost["pruned"])
    if claim.metric in STAGELESS:
        found = run.metrics.get("ranking", {})
    elif claim.metric == "drop":
        return run.metrics["dense"]["accuracy"] - run.metrics[claim.stage]["accuracy"]
    else:
        found = run.metrics[claim.stage]
    if claim.metric not in found:
        raise HapError(
            f"{run.case} seed {run.seed}: {claim.metric} expected in the record, found {', '.join(found) or 'none'}"
        )
    return found[claim.metric]


def _pruned(what: str) -> Callable[[Cost, Cost], float]:
    return lambda dense, pruned: float(100 * (1 - pruned[what] / dense[what]))


def _speedup(dense: Cost, pruned: Cost) -> float:
    batch = max(dense["latency_seconds"], key=int)
    return float(dense["latency_seconds"][batch] / pruned["latency_seconds"][batch])


_COSTS: dict[str, Callable[[Cost, Cost], float]] = {
    "params_pruned": _pruned("params"),
    "macs_pruned": _pruned("macs"),
    "speedup": _speedup,
}


def _certain(claim: Claim, runs: list[Run]) -> bool:
    """Whether a quantity is free of chance: equal over seeds, and counted or with a loss that is equal to rounding."""
    if claim.metric in _COSTS:  # one seed's count says nothing of another's, whose plan may be another
        return claim.metric != "speedup" and len(runs) > 1
    if claim.metric in STAGELESS:
        return False
    # accuracy is a count and agrees by luck; a loss that agrees to rounding does not
    stages = {claim.stage, "dense"} if claim.metric == "drop" else {claim.stage}
    losses = [[run.metrics[stage]["loss"] for run in runs] for stage in stages]
    return len(runs) > 1 and all(math.isclose(min(each), max(each), rel_tol=1e-6) for each in losses)


def _size(runs: list[Run]) -> int | None:
    """The samples of the test set: those that the records tell, else the fewest that their accuracies are counts of."""
    told = [run.data["test_samples"] for run in runs if "test_samples" in run.data]
    if told:
        return int(min(told))
    stages = [found for run in runs for stage, found in run.metrics.items() if stage != "ranking"]
    stages += [epoch["test"] for run in runs for epoch in run.epochs if "test" in epoch]
    return counted(found["accuracy"] for found in stages)


def _sampling(claim: Claim, columns: list[list[Run]], size: int | None) -> float:
    """The standard error that a test set of this size leaves in the mean over seeds, in percent."""
    if claim.metric in STAGELESS or claim.metric == "loss" or size is None:
        return 0.0
    metric = "accuracy" if claim.metric == "drop" else claim.metric
    stages = [(column, claim.stage) for column in columns]
    if claim.metric == "drop" and len(columns) == 1:  # of two drops, what the dense networks share goes out
        stages.append((columns[0], "dense"))
    shares = [[_share(column, stage, each) for each in (metric, "accuracy")] for column, stage in stages]
    if not all(math.isfinite(share) for pair in shares for share in pair):
        return 0.0
    first, *rest = [variance(metric, share, accuracy) for share, accuracy in shares]
    total = variance_of_difference(first, rest[0], shares[0][0] - shares[1][0]) if rest else first
    return 100 * math.sqrt(total / size)


def _share(runs: list[Run], stage: str, metric: str) -> float:
    return fmean(run.metrics[stage][metric] for run in runs) / 100
