"""Claim + runs -> Verdict, with bounds over seeds; does not know where runs come from.

With mean m, standard deviation s and n seeds, the one-sided bounds at confidence c are m -+ t(c, n - 1) s / sqrt(n)
(Student). They say how far seeds move a number; the error of a finite test set is not in them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hap import HapError
from hap.harness.run import Run
from hap.harness.spec import STAGELESS, Claim

Runs = Mapping[str, Sequence[Run]]


class Outcome(StrEnum):
    """What evidence says of a claim."""

    HOLDS = "HOLDS"
    FAILS = "FAILS"
    UNDECIDED = "UNDECIDED"
    ABSENT = "ABSENT"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim, what was observed with its one-sided bounds, and why it is no clearer."""

    outcome: Outcome
    claim: Claim
    observed: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    reason: str

    @property
    def surprising(self) -> bool:
        """Whether a claim fails that should hold, or holds although it is `known` to fail."""
        return self.outcome is (Outcome.FAILS if self.claim.known is None else Outcome.HOLDS)

    @property
    def line(self) -> str:
        """The verdict as one line: claim, source, observed with bounds, seeds, reason."""
        why = f"; {self.reason}" if self.reason else ""
        return f"{self.outcome}: {self.claim.text} [{self.claim.source}]: {self.measured}{why}"

    @property
    def measured(self) -> str:
        """What was observed, beside what was claimed."""
        claimed = f"claimed {describe(self.claim)}"
        if self.observed is None:
            return claimed
        bounds = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"observed {self.observed:.4g}{bounds} over {_count(self.seeds)}, {claimed}"


def describe(claim: Claim) -> str:
    """The comparison of a claim in symbols."""
    band = f" ± {claim.tolerance:g}" if claim.tolerance else ""
    against = f" - {claim.against}" if claim.against else ""
    stage = "" if claim.metric in STAGELESS else f" {claim.stage}"
    return f"{claim.metric}{stage} of {claim.case}{against} {claim.op} {claim.value:g}{band}"


def judge(claim: Claim, runs: Runs, seeds: Sequence[int] | None = None) -> Verdict:
    """The verdict on `claim` over `seeds`, by default all that have a run; ABSENT if one of them lacks evidence."""
    sides = [{run.seed: run for run in runs.get(case, ())} for case in (claim.case, claim.against) if case]
    wanted = sorted(set().union(*sides) if seeds is None else seeds)
    missing = [seed for seed in wanted if not all(seed in side for side in sides)]
    if missing or not wanted:
        gone = f"no evidence for seed {', '.join(map(str, missing))}" if missing else "no evidence"
        return Verdict(Outcome.ABSENT, claim, None, None, None, tuple(wanted), gone)
    rows = [[side[seed] for side in sides] for seed in wanted]
    values = [value(row[0], claim) - sum(value(run, claim) for run in row[1:]) for row in rows]
    return _verdict(claim, values, tuple(wanted), [_certain(claim, list(column)) for column in zip(*rows, strict=True)])


def value(run: Run, claim: Claim) -> float:
    """The number of one run that a claim is about."""
    if claim.metric in _COSTS:
        return _COSTS[claim.metric](run.cost["dense"], run.cost["pruned"])
    if claim.metric in STAGELESS:
        return run.metrics["ranking"][claim.metric]
    if claim.metric == "drop":
        return run.metrics["dense"]["accuracy"] - run.metrics[claim.stage]["accuracy"]
    found = run.metrics[claim.stage]
    if claim.metric not in found:
        raise HapError(f"{run.case} seed {run.seed}: {claim.metric} expected in the record, found {', '.join(found)}")
    return found[claim.metric]


def bounds(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, lower and upper one-sided bound of at least two values."""
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(t.ppf(confidence, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


Cost = Mapping[str, Any]


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
    """Whether a quantity is free of chance: counted, or equal over seeds to the rounding of its loss."""
    if claim.metric in _COSTS:
        return claim.metric != "speedup"
    if claim.metric in STAGELESS:
        return False
    # accuracy is a count and agrees by luck; a loss that agrees to rounding does not
    stages = {claim.stage, "dense"} if claim.metric == "drop" else {claim.stage}
    losses = [[run.metrics[stage]["loss"] for run in runs] for stage in stages]
    return len(runs) > 1 and all(math.isclose(min(each), max(each), rel_tol=1e-6) for each in losses)


def _verdict(claim: Claim, values: list[float], seeds: tuple[int, ...], certain: list[bool]) -> Verdict:
    mean = math.fsum(values) / len(values)
    if not math.isfinite(mean):
        strange = next(seed for seed, value in zip(seeds, values, strict=True) if not math.isfinite(value))
        return Verdict(Outcome.UNDECIDED, claim, mean, None, None, seeds, f"seed {strange} is not a finite number")
    still = max(values) - min(values) <= 1e-9 * max(1.0, abs(mean))
    if still and not all(certain):
        why = "one seed says nothing of the spread" if len(seeds) == 1 else "equal by chance: the spread is not known"
        return Verdict(Outcome.UNDECIDED, claim, mean, None, None, seeds, why)
    mean, low, high = (mean, mean, mean) if still else bounds(values, claim.confidence)
    outcome = _decide(claim, low, high)
    why = "the interval crosses the bound" if outcome is Outcome.UNDECIDED else ""
    return Verdict(outcome, claim, mean, low, high, seeds, why)


def _decide(claim: Claim, low: float, high: float) -> Outcome:
    slack = 1e-9 * max(1.0, abs(claim.value))  # a difference of two decimals is not exact
    bottom, top = claim.value - claim.tolerance - slack, claim.value + claim.tolerance + slack
    holds = {"<=": high <= top, ">=": low >= bottom, "==": bottom <= low and high <= top}
    fails = {"<=": low > top, ">=": high < bottom, "==": low > top or high < bottom}
    if holds[claim.op]:
        return Outcome.HOLDS
    return Outcome.FAILS if fails[claim.op] else Outcome.UNDECIDED


def _count(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
