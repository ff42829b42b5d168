"""Pairs of runs -> the differences between two methods, with intervals, corrected together; knows nothing of strangers.

A difference is the mean over seeds of the differences of runs that share a seed. Its interval holds the spread over
seeds and the error that a finite test set leaves (`hap.harness.verdicts.statistics`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from hap.harness.records.record import Run
from hap.harness.spec.spec import Case, Claim, Spec
from hap.harness.supplied import short
from hap.harness.verdicts.measures import measured
from hap.harness.verdicts.statistics import Interval, deviation, holm, p_value

STAGES = ("one_shot", "selected")
ALPHA = 0.05  # of the family of all differences that are told together


@dataclass(frozen=True)
class Pairs:
    """The runs of two methods in the place of `case`, by seed; and those of all committed methods at its budget."""

    case: Case
    mine: Sequence[Run]
    theirs: Sequence[Run]
    others: Mapping[str, Sequence[Run]]

    def __post_init__(self) -> None:
        """The runs are paired by seed."""
        assert [run.seed for run in self.mine] == [run.seed for run in self.theirs]


@dataclass(frozen=True)
class Difference:
    """How far one method is from another at one budget and stage, in points of the spec's metric; higher is better."""

    case: str
    stage: str
    mine: float
    theirs: float
    mean: float
    interval: Interval | None  # of two-sided confidence 1 - ALPHA; None where the seeds show no spread
    p: float  # corrected for all differences of the comparison
    rank: int
    ranked: int
    short: bool = False  # the first of the two prunes less than the budget asks

    @property
    def verdict(self) -> Literal["better", "worse", "open"]:
        """What can be concluded from it."""
        if self.short or self.interval is None or self.p > ALPHA:
            return "open"
        return "better" if self.mean > 0 else "worse"


def differences(spec: Spec, pairs: Sequence[Pairs]) -> list[Difference]:
    """All differences of a comparison, stages within budgets; their p-values are one family (Holm)."""
    found = [(each, stage) for each in pairs for stage in STAGES if stage == "one_shot" or each.case.finetune]
    raw = [_compared(spec.metric, each, stage) for each, stage in found]
    adjusted = holm([p for _, p in raw])
    return [
        _difference(spec.metric, each, stage, bounds, p)
        for (each, stage), (bounds, _), p in zip(found, raw, adjusted, strict=True)
    ]


def values(runs: Sequence[Run], metric: str, stage: str) -> list[float]:
    """A metric of each run at a stage."""
    return [run.metrics[stage][metric] for run in runs]


def _difference(metric: str, pairs: Pairs, stage: str, bounds: Interval | None, p: float) -> Difference:
    mine, theirs = (fmean(values(runs, metric, stage)) for runs in (pairs.mine, pairs.theirs))
    ahead = [name for name, runs in pairs.others.items() if fmean(values(runs, metric, stage)) > mine]
    ranked = 1 + len(pairs.others)
    missed = any(short(pairs.case.budget, run.plan.get("removed", {})) for run in pairs.mine)
    return Difference(pairs.case.name, stage, mine, theirs, mine - theirs, bounds, p, 1 + len(ahead), ranked, missed)


def _compared(metric: str, pairs: Pairs, stage: str) -> tuple[Interval | None, float]:
    """The two-sided interval of the paired differences, and the p at which it decides."""
    what: dict[str, Any] = {"metric": metric, "stage": stage, "op": ">=", "value": 0.0, "over": "seeds and images"}
    what |= {"text": "a comparison", "source": "two methods", "family": "comparisons"}
    claim = Claim(case="mine", against="theirs", **what)
    seeds = [run.seed for run in pairs.mine]
    found = measured(claim, {"mine": pairs.mine, "theirs": pairs.theirs}, seeds)
    if len(seeds) < 2 or deviation(found.values) == 0:
        return None, 1.0  # no spread is to be seen, which does not say that there is none

    def decided(confidence: float) -> bool:
        bounds = found.at(confidence)
        return bounds.low > 0 or bounds.high < 0

    return found.at(1 - ALPHA / 2), min(1.0, 2 * p_value(decided))
