"""Claims + runs -> verdicts, with bounds over seeds; does not know where runs come from.

A claim HOLDS when its one-sided bound at the stated confidence is inside the tolerance band, FAILS when it is outside,
and is UNDECIDED otherwise (`statistics` has the bounds). Cases are compared seed by seed. The claims of a spec that
compare cases are a family: what holds among them is corrected as one, and what fails, by Holm's procedure, so that the
chance that *any* false one is told to hold is what its confidence says. The bounds told are those of the claim alone.

The error of a finite test set is in the bounds of accuracy, F1 and Matthews' correlation: a verdict is on the network,
not on these images. Two things have none: what is counted, and the accuracy of one and the same dense network, which
its source counted on the same images. Of a loss the records do not say how it varies from sample to sample.

A verdict on evidence that is not of today's code or data is STALE, and still tells what the evidence `says`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from hap.harness.records.freshness import FRESH, Age
from hap.harness.records.freshness import aged as told
from hap.harness.records.record import Run
from hap.harness.spec.spec import STAGELESS, Claim, Spec
from hap.harness.verdicts.measures import Measured, Runs, measured, sides
from hap.harness.verdicts.statistics import (
    MOST_SEEDS,
    Interval,
    confidences,
    deviation,
    expected,
    fails,
    further,
    holds,
    holm,
)
from hap.harness.verdicts.statistics import bounds as bounds

Aged = Callable[[Run], Age]
EVERYTHING = (-math.inf, math.inf)
RANGES = {  # what the mean of a metric can be
    **dict.fromkeys(("accuracy", "f1", "params_pruned", "macs_pruned"), (0.0, 100.0)),
    "matthews": (-100.0, 100.0),
    "spearman": (-1.0, 1.0),
    "overlap": (0.0, 1.0),
}
AGES = ("stale", "unknown", "fresh")


class Outcome(StrEnum):
    """What evidence says of a claim."""

    HOLDS = "HOLDS"
    FAILS = "FAILS"
    UNDECIDED = "UNDECIDED"
    ABSENT = "ABSENT"
    STALE = "STALE"


@dataclass(frozen=True)
class Verdict:
    """What the evidence says of a claim, what was observed with its one-sided bounds, and why it is no clearer."""

    says: Outcome
    claim: Claim
    observed: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    reason: str = ""
    method: str = ""  # how the bounds were found
    further: int | None = None  # seeds that would decide, where that can be told
    age: Age = FRESH

    @property
    def outcome(self) -> Outcome:
        """STALE where there is evidence and it is not of today, else what it says."""
        stale = self.age.state == "stale" and self.says is not Outcome.ABSENT
        return Outcome.STALE if stale else self.says

    @property
    def surprising(self) -> bool:
        """Whether the evidence, be it stale, fails a claim that should hold, or holds one that is `known` to fail."""
        return self.says is (Outcome.FAILS if self.claim.known is None else Outcome.HOLDS)

    @property
    def released(self) -> bool:
        """Whether a release may go out with it: decided, not surprising, and known to be of today's code and data."""
        return self.says in (Outcome.HOLDS, Outcome.FAILS) and not self.surprising and self.age.state == "fresh"

    @property
    def line(self) -> str:
        """The verdict as one line: claim, source, observed with bounds, seeds, reason."""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.outcome}: {self.claim.text} [{self.claim.source}]: {self.measured}{notes}"

    @property
    def notes(self) -> list[str]:
        """Why it is no clearer, and what is to say of its age."""
        says = f"the evidence says {self.says}, but " if self.outcome is Outcome.STALE else ""
        return [note for note in (self.reason, says + self.age.why) if note]

    @property
    def measured(self) -> str:
        """What was observed, beside what was claimed."""
        claimed = f"claimed {describe(self.claim)}"
        if self.observed is None:
            return claimed
        return f"observed {self.observed:.4g}{self.bounds} over {_count(len(self.seeds), 'seed')}, {claimed}"

    @property
    def bounds(self) -> str:
        """The bounds in brackets, with how they were found; nothing where there are none."""
        if self.low is None or self.high is None:
            return ""
        # a mean cannot lie beyond what its metric can be, though Student's interval knows nothing of it
        least, most = RANGES.get(self.claim.metric, EVERYTHING) if self.claim.against is None else EVERYTHING
        return f" ({max(self.low, least):.4g} to {min(self.high, most):.4g}; {self.method})"


def describe(claim: Claim) -> str:
    """The comparison of a claim in symbols."""
    band = f" ± {claim.tolerance:g}" if claim.tolerance else ""
    against = f" - {claim.against}" if claim.against else ""
    stage = "" if claim.metric in STAGELESS else f" {claim.stage}"
    return f"{claim.metric}{stage} of {claim.case}{against} {claim.op} {claim.value:g}{band}"


def judge(claim: Claim, runs: Runs, seeds: Sequence[int] | None = None, aged: Aged | None = None) -> Verdict:
    """The verdict on a claim that stands alone."""
    return verdicts([claim], runs, seeds, aged)[0]


def verdicts(
    claims: Sequence[Claim], runs: Runs, seeds: Sequence[int] | None = None, aged: Aged | None = None
) -> list[Verdict]:
    """The verdicts on the claims of a spec over `seeds`, by default all that have a run; ABSENT where one lacks one.

    `aged` tells the age of a run; without it evidence is taken as it is.
    """
    found = [_looked(claim, runs, seeds) for claim in claims]
    family = [each for each in found if isinstance(each, Measured) and each.compared]
    holding, failing = ([each.p_value(decision) for each in family] for decision in (holds, fails))
    stated = [each.claim.confidence for each in family]
    least = [min(pair) for pair in zip(holm(holding), holm(failing), strict=True)]
    held = zip(family, least, confidences(holding, stated), confidences(failing, stated), strict=True)
    corrected = {id(each): Held(p, inside, outside, len(family)) for each, p, inside, outside in held}
    judged = [_decided(e, corrected.get(id(e))) if isinstance(e, Measured) else e for e in found]
    return judged if aged is None else [replace(each, age=_oldest(each, runs, aged)) for each in judged]


def of_today(spec: Spec, runs: Runs) -> list[Verdict]:
    """The verdicts on a spec, with the age of the evidence."""
    return verdicts(spec.claims, runs, spec.seeds, told([run for each in runs.values() for run in each]))


class Held(NamedTuple):
    """What Holm's procedure holds a comparison to."""

    p: float  # adjusted, of what is likelier: that the claim holds, or that it fails
    inside: float  # the confidence of bounds that decide that it holds
    outside: float
    family: int  # claims that are compared


def _looked(claim: Claim, runs: Runs, seeds: Sequence[int] | None) -> "Measured | Verdict":
    """The numbers of a claim; a verdict already where there are none, or they say nothing of the spread."""
    each = sides(claim, runs)
    wanted = tuple(sorted(set().union(*each) if seeds is None else seeds))
    missing = [seed for seed in wanted if not all(seed in side for side in each)]
    if missing or not wanted:
        gone = f"no evidence for seed {', '.join(map(str, missing))}" if missing else "no evidence"
        return Verdict(Outcome.ABSENT, claim, None, None, None, wanted, gone)
    found = measured(claim, runs, wanted)
    strange = [seed for seed, value in zip(wanted, found.values, strict=True) if not math.isfinite(value)]
    mean = sum(found.values) / len(found.values)
    if strange or not math.isfinite(mean):
        why = f"seed {strange[0]} is not a finite number" if strange else "the mean is not a finite number"
        return Verdict(Outcome.UNDECIDED, claim, mean, None, None, wanted, why)
    if deviation(found.values) == 0 and not found.certain:
        why = "one seed says nothing of the spread" if len(wanted) == 1 else "equal by chance: the spread is not known"
        return Verdict(Outcome.UNDECIDED, claim, mean, None, None, wanted, why)
    return found


def _oldest(verdict: Verdict, runs: Runs, aged: Aged) -> Age:
    """The age of a verdict: that of the first of its runs that is not of today."""
    sides = [run for case in (verdict.claim.case, verdict.claim.against) if case for run in runs.get(case, ())]
    ages = sorted((aged(run) for run in sides if run.seed in verdict.seeds), key=lambda age: AGES.index(age.state))
    return ages[0] if ages else FRESH


def _decided(found: Measured, held: Held | None) -> Verdict:
    """The verdict by the bounds; among a family, by those at the confidences that Holm's procedure asks for."""
    claim, bounds = found.claim, found.at(found.claim.confidence)
    alone = _says(found, bounds, found.at(claim.confidence, fails))
    held = held or Held(1.0, claim.confidence, claim.confidence, 1)
    says = alone if held.family == 1 else _says(found, found.at(held.inside), found.at(held.outside, fails))
    among = f", Holm over {held.family}: p {held.p:.2g}" if held.family > 1 else ""
    told = (bounds.mean, bounds.low, bounds.high, found.seeds)
    verdict = Verdict(says, claim, *told, method=f"{found.told(bounds)}{among}")
    if says is not Outcome.UNDECIDED:
        return verdict
    lost = f"alone it {alone}, among {held.family} comparisons it does not (Holm)"
    seeds, why = _more(found, held.inside, held.outside)
    first = "the interval crosses the bound" if alone is says else lost
    return replace(verdict, reason=f"{first}; {why}", further=seeds)


def _says(found: Measured, inside: Interval, outside: Interval) -> Outcome:
    if holds(found.claim.op, inside, *found.band):
        return Outcome.HOLDS
    return Outcome.FAILS if fails(found.claim.op, outside, *found.band) else Outcome.UNDECIDED


def _more(found: Measured, inner: float, outer: float) -> tuple[int | None, str]:
    """How many further seeds would decide a claim, and that in words."""
    mean, spread, n = math.fsum(found.values) / len(found.values), deviation(found.values), len(found.values)

    def enough(more: int, sampling: float = found.sampling) -> bool:
        levels = (inner, found.level(outer, fails))
        bounds = (expected(mean, spread, n + more, level, sampling=sampling) for level in levels)
        return _says(found, *bounds) is not Outcome.UNDECIDED

    seeds = further(enough)
    if seeds is not None:
        return seeds, f"{_count(seeds, 'further seed')} would decide it if mean and spread stay"
    if enough(MOST_SEEDS, 0.0):
        return None, f"no number of seeds would decide it: a test set of {found.size} is too small"
    return None, f"{MOST_SEEDS} further seeds would not decide it: the mean sits on the bound"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
