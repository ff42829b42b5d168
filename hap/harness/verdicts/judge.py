"""Claims + runs -> verdicts, with bounds over seeds; does not know where runs come from.

A claim HOLDS when its one-sided bound at the stated confidence is inside the tolerance band, FAILS when it is outside,
and is UNDECIDED otherwise (`statistics` has the bounds). Cases are compared seed by seed. Claims that compare cases
belong to families, which the spec declares: what holds among a family is corrected as one, and what fails, by Holm's
procedure, so that the chance that *any* false one of a family is told to hold is what its confidence says. The claims
that the paper makes are a family of their own, "paper", tested before all others: their error is theirs alone, and no
idea or check that a spec adds makes them harder to decide. Nor do they shut out the others, whose families have an
error each: a spec of k families errs anywhere in at most k times that. The bounds told are those of the claim alone.

A claim over "seeds" is about its test set, as a number of a paper's table is: its bounds are those of the seeds. One
over "seeds and images" is about new images too: its bounds are those of both, where the records say which samples were
right; where they do not, the error of the test set is bounded from counts, and the verdict says so.

Where a spec has several looks, each spends a part of the error, so that all together err as often as one. A claim that
is decided is closed: seeds that another claim asked for do not open it again. What is open is looked at again when all
seeds of the next look are there.

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
from hap.harness.verdicts.measures import Decision, Measured, Runs, measured, sides
from hap.harness.verdicts.statistics import (
    MOST_SEEDS,
    Interval,
    confidences,
    deviation,
    fails,
    further,
    holds,
    holm,
    spending,
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
BOUNDED = "its records do not say which samples were right, so the error of the test set is a bound, on the safe side"
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
    look: int = 0  # at which it was judged, from 1 on; 0 where there is no evidence
    bounded: bool = False  # the error of the test set is a bound from counts
    stand_in: str | None = None  # for what its spec stands in

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
        return f"{self.shown}: {self.claim.text} [{self.claim.source}]: {self.measured}{notes}"

    @property
    def shown(self) -> str:
        """The outcome, and for what it is a stand-in if it is one."""
        return f"{self.outcome} (stand-in for {self.stand_in})" if self.stand_in else str(self.outcome)

    @property
    def notes(self) -> list[str]:
        """Why it is no clearer, and what is to say of its age."""
        says = f"the evidence says {self.says}, but " if self.outcome is Outcome.STALE else ""
        return [note for note in (self.reason, BOUNDED if self.bounded else "", says + self.age.why) if note]

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
    claims: Sequence[Claim],
    runs: Runs,
    seeds: Sequence[int] | None = None,
    aged: Aged | None = None,
    looks: Sequence[int] = (),
) -> list[Verdict]:
    """The verdicts on the claims of a spec over `seeds`, by default all that have a run; ABSENT where one lacks one.

    `aged` tells the age of a run; without it evidence is taken as it is. `looks`: how many of the seeds are there at
    each look, where that is more than once.
    """
    judged = _first(claims, runs, None if seeds is None else seeds[: looks[0]] if looks else seeds, looks)
    for number in range(1, len(looks)):
        judged = _further(judged, runs, (seeds or ())[: looks[number]], looks, number)
    return judged if aged is None else [replace(each, age=_oldest(each, runs, aged)) for each in judged]


def of_today(spec: Spec, runs: Runs) -> list[Verdict]:
    """The verdicts on a spec, with the age of the evidence."""
    age = told([run for each in runs.values() for run in each])
    found = verdicts(spec.claims, runs, spec.seeds, age, spec.stops if len(spec.stops) > 1 else ())
    return [replace(each, stand_in=spec.stand_in) for each in found]


class Held(NamedTuple):
    """What Holm's procedure holds a comparison to."""

    p: float  # adjusted, of what is likelier: that the claim holds, or that it fails
    inside: float  # the confidence of bounds that decide that it holds
    outside: float
    family: int  # claims that are compared


class Look(NamedTuple):
    """Which look it is, and the part of the error that it spends."""

    number: int = 0
    looks: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """The part of the error; all of it where there is one look."""
        return spending(self.looks)[self.number] if self.looks else 1.0

    def confidence(self, claim: Claim) -> float:
        """That of the bounds of a claim at this look."""
        return 1 - (1 - claim.confidence) * self.share

    @property
    def told(self) -> str:
        """Which look it is, in words; nothing where there is one."""
        return f", look {self.number + 1} of {len(self.looks)}" if self.looks else ""


def _first(claims: Sequence[Claim], runs: Runs, seeds: Sequence[int] | None, looks: Sequence[int]) -> list[Verdict]:
    """The verdicts at the only look, or at the first."""
    found = [_looked(claim, runs, seeds) for claim in claims]
    return _held(found, [None] * len(found), Look(0, tuple(looks)))


def _further(
    judged: list[Verdict], runs: Runs, seeds: Sequence[int], looks: Sequence[int], number: int
) -> list[Verdict]:
    """The verdicts after another look: claims that are decided stay so, and without all its seeds one stays open."""
    found: list[Measured | Verdict] = list(judged)
    for place in (i for i, each in enumerate(judged) if each.says is Outcome.UNDECIDED):
        looked = _looked(judged[place].claim, runs, seeds)
        if isinstance(looked, Measured):
            found[place] = looked
        elif looked.says is Outcome.UNDECIDED:
            found[place] = replace(looked, look=number + 1)
    return _held(found, judged, Look(number, tuple(looks)))


def _held(found: Sequence[Measured | Verdict], before: Sequence[Verdict | None], look: Look) -> list[Verdict]:
    """The verdicts by the bounds, comparisons corrected within their family; `before`: at the look before this one."""
    corrected: dict[int, Held] = {}
    families: dict[str, list[int]] = {}
    for place, each in enumerate(found):
        earlier = before[place]
        seen = each.compared if isinstance(each, Measured) else earlier is not None and earlier.look > 0
        if each.claim.against is not None and seen:
            families.setdefault(each.claim.family, []).append(place)
    for places in families.values():
        corrected |= _corrected(places, found, look)
    return [
        _decided(each, corrected.get(i), look) if isinstance(each, Measured) else each for i, each in enumerate(found)
    ]


def _corrected(places: Sequence[int], found: Sequence[Measured | Verdict], look: Look) -> dict[int, Held]:
    """What Holm's procedure holds the comparisons of a family to, by place.

    One that a look before has decided is out of the procedure that decided it, and counts in the other one, where it is
    not tested any more; one that lacks the seeds of this look counts in both.
    """
    levels: dict[Decision, dict[int, tuple[float, float]]] = {}
    for decision, decided in ((holds, Outcome.HOLDS), (fails, Outcome.FAILS)):
        here = [i for i in places if not (isinstance(each := found[i], Verdict) and each.says is decided)]
        p_values = [each.p_value(decision) if isinstance(each := found[i], Measured) else 1.0 for i in here]
        stated = [look.confidence(found[i].claim) for i in here]
        levels[decision] = dict(zip(here, zip(holm(p_values), confidences(p_values, stated), strict=True), strict=True))
    held = {}
    for place in (i for i in places if isinstance(found[i], Measured)):
        (p, inside), (q, outside) = levels[holds][place], levels[fails][place]
        held[place] = Held(min(p, q), inside, outside, len(places))
    return held


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
        return Verdict(Outcome.UNDECIDED, claim, mean, None, None, wanted, why, look=1)
    if deviation(found.values) == 0 and not found.certain:
        why = "one seed says nothing of the spread" if len(wanted) == 1 else "equal by chance: the spread is not known"
        return Verdict(Outcome.UNDECIDED, claim, mean, None, None, wanted, why, look=1)
    return found


def _oldest(verdict: Verdict, runs: Runs, aged: Aged) -> Age:
    """The age of a verdict: that of the first of its runs that is not of today."""
    sides = [run for case in (verdict.claim.case, verdict.claim.against) if case for run in runs.get(case, ())]
    ages = sorted((aged(run) for run in sides if run.seed in verdict.seeds), key=lambda age: AGES.index(age.state))
    return ages[0] if ages else FRESH


def _decided(found: Measured, held: Held | None, look: Look) -> Verdict:
    """The verdict by the bounds; among a family, by those at the confidences that Holm's procedure asks for."""
    claim, level = found.claim, look.confidence(found.claim)
    bounds = found.at(level)
    alone = _says(found, bounds, found.at(level, fails))
    held = held or Held(1.0, level, level, 1)
    says = alone if held.family == 1 else _says(found, found.at(held.inside), found.at(held.outside, fails))
    among = f', Holm over {held.family} of "{claim.family}": p {held.p:.2g}' if held.family > 1 else ""
    seen = (bounds.mean, bounds.low, bounds.high, found.seeds)
    method = f"{found.told(bounds)}{among}{look.told}"
    verdict = Verdict(says, claim, *seen, method=method, bounded=found.sampling > 0, look=look.number + 1)
    if says is not Outcome.UNDECIDED:
        return verdict
    lost = f"alone it {alone}, among {held.family} comparisons it does not (Holm)"
    seeds, why = _more(found, held.inside, held.outside)
    first = "the interval crosses the bound" if alone is says else lost
    more = "; --until-decided adds the seeds of the next look" if look.number + 1 < len(look.looks) else ""
    return replace(verdict, reason=f"{first}; {why}{more}", further=seeds)


def _says(found: Measured, inside: Interval, outside: Interval) -> Outcome:
    if holds(found.claim.op, inside, *found.band):
        return Outcome.HOLDS
    return Outcome.FAILS if fails(found.claim.op, outside, *found.band) else Outcome.UNDECIDED


def _more(found: Measured, inner: float, outer: float) -> tuple[int | None, str]:
    """How many further seeds would decide a claim, and that in words."""
    seen = len(found.values)

    def enough(more: int, images: bool = True) -> bool:
        levels = (inner, found.level(outer, fails))
        return (
            _says(found, *(found.with_seeds(seen + more, level, images) for level in levels)) is not Outcome.UNDECIDED
        )

    seeds = further(enough)
    if seeds is not None:
        return seeds, f"{_count(seeds, 'further seed')} would decide it if mean and spread stay"
    if enough(MOST_SEEDS, images=False):
        return None, f"no number of seeds would decide it: a test set of {found.size} is too small"
    return None, f"{MOST_SEEDS} further seeds would not decide it: the mean sits on the bound"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
