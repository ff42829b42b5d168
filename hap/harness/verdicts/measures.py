"""What runs say on a claim, in numbers: a value a seed, whether chance is in it, what its test set adds.

A claim over seeds is about this test set, and has no error of it. One over seeds and images has the parts of its
variance from which samples were right, where all its records tell; else a bound of the error of the test set, from
counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from hap import HapError
from hap.harness.records import outcomes
from hap.harness.records.outcomes import METRICS
from hap.harness.records.record import Run
from hap.harness.spec.spec import STAGELESS, Claim
from hap.harness.verdicts.crossed import Parts, resampled
from hap.harness.verdicts.crossed import parts as crossed
from hap.harness.verdicts.statistics import (
    Interval,
    Op,
    across,
    counted,
    deviation,
    expected,
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
    """A claim with its numbers: a value for each seed, and what its test set adds."""

    claim: Claim
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    certain: bool  # the seeds make no difference
    sampling: float = 0.0  # a bound of the standard error of the test set, where its samples are not known one by one
    size: int | None = None  # of the test set
    parts: Parts | None = None  # of the variance over seeds and images, where they are

    @property
    def compared(self) -> bool:
        """Whether it is a comparison of cases that chance has a part in."""
        chance = self.sampling > 0 or deviation(self.values) > 0 or (self.parts is not None and self.parts.images > 0)
        return self.claim.against is not None and chance

    @property
    def band(self) -> tuple[float, float]:
        """What the claim allows."""
        slack = 1e-9 * max(1.0, abs(self.claim.value))  # a difference of two decimals is not exact
        return self.claim.value - self.claim.tolerance - slack, self.claim.value + self.claim.tolerance + slack

    def at(self, confidence: float, decision: Decision = holds) -> Interval:
        """The bounds of the mean; a comparison is bootstrapped where there are seeds enough."""
        confidence = self.level(confidence, decision)
        if self.parts is not None:
            return across(fmean(self.values), self.parts, len(self.values), confidence)
        return interval(self.values, confidence, sampling=self.sampling, bootstrap=self.claim.against is not None)

    def with_seeds(self, seeds: int, confidence: float, images: bool = True) -> Interval:
        """The bounds for so many seeds if mean and spread stay; without what images add, were their number endless."""
        mean, spread = math.fsum(self.values) / len(self.values), deviation(self.values)
        if self.parts is not None:
            return across(mean, self.parts if images else self.parts._replace(images=0.0), seeds, confidence)
        return expected(mean, spread, seeds, confidence, sampling=self.sampling if images else 0.0)

    def level(self, confidence: float, decision: Decision) -> float:
        """That of each bound: what "==" refutes, it refutes on either side, so each side has half of the error."""
        return (1 + confidence) / 2 if decision is fails and self.claim.op == "==" else confidence

    def p_value(self, decision: Decision) -> float:
        """That of the claim to hold, or to fail."""
        return p_value(lambda confidence: decision(self.claim.op, self.at(confidence, decision), *self.band))

    def told(self, found: Interval) -> str:
        """How the bounds were found."""
        if found.kind == "crossed":
            return f"over seeds and {self.size} images"
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
    found = Measured(claim, tuple(values), tuple(seeds), sure)
    if claim.over == "seeds" or len(seeds) < 2:
        return found
    if (parts := _parts(claim, columns)) is not None:
        return replace(found, parts=parts, size=parts.size)
    size = _size([run for column in columns for run in column])
    return replace(found, sampling=_sampling(claim, columns, size), size=size)


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


def _parts(claim: Claim, columns: list[list[Run]]) -> Parts | None:
    """The parts of the variance of what is claimed, in squared percent points; None where a record lacks bits of it."""
    if claim.metric in METRICS:
        found = _resampled(claim, columns)
    else:
        tables = [_table(claim, column) for column in columns]
        whole = [table for table in tables if table is not None]
        if len(whole) < len(tables) or len({table.shape for table in whole}) > 1 or whole[0].shape[1] < 2:
            return None
        found = crossed(whole[0] - sum(whole[1:]))
    return found and Parts(1e4 * found.seeds, 1e4 * found.images, 1e4 * found.rest, found.size)


def _table(claim: Claim, runs: list[Run]) -> Any:
    """What each sample of each seed adds to the metric, as a share: [seeds, images]; None where it is not known."""
    stages = [("dense", 1.0), (claim.stage, -1.0)] if claim.metric == "drop" else [(claim.stage, 1.0)]
    bits = [[outcomes.right(run.outcomes, stage) for stage, _ in stages] for run in runs]
    sizes = {None if each is None else len(each) for row in bits for each in row}
    if None in sizes or len(sizes) > 1:
        return None
    signs = np.array([sign for _, sign in stages])[None, :, None]
    return (np.array(bits) * signs).sum(1)


def _resampled(claim: Claim, columns: list[list[Run]]) -> Parts | None:
    """By drawing test sets again, for a metric that is no mean over samples."""
    pairs = [[outcomes.said(run.outcomes, claim.stage) for run in column] for column in columns]
    known = [pair for column in pairs for pair in column if pair is not None]
    if len(known) < sum(map(len, pairs)) or any(not np.array_equal(labels, known[0][1]) for _, labels in known):
        return None
    said = [np.array([pair[0] for pair in column if pair is not None]) for column in pairs]
    return resampled(claim.metric, known[0][1], *said)


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
