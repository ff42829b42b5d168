"""What a claim can be expected to show: its effect and a spread -> power, seeds and hours; decides no verdict.

A claim says how far it takes the truth to lie from its value (`effect`). With the margin m from there to the end of
its tolerance, the standard error e of a mean over so many seeds and its degrees of freedom, the bound clears it with
the probability that a noncentral t, of noncentrality m / e, is beyond t(c) [Lehmann05, ch. 5.2]; "==" needs it on both
sides, and has at least the sum of both less 1. The confidence c is that of the first step of Holm's procedure over its
family, which is the least that the claim can meet: its power is at least what is said here.

Spreads come from records, stale ones too, and what they lack from what the spec assumes: records without bits do not
say what images add.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from hap import HapError
from hap.harness.records.freshness import FRESH, Age
from hap.harness.records.record import Run
from hap.harness.spec.spec import Assumed, Claim, Spec
from hap.harness.verdicts.crossed import Parts
from hap.harness.verdicts.measures import Runs, measured, sides
from hap.harness.verdicts.statistics import MOST_SEEDS, deviation, further, spending

WANTED = 0.8  # the power that a claim should have
TIMED = ("task", "trace", "prune", "finetune", "evaluate")  # the stages of a record that are not parts of others
ASSUMED = "what is assumed"
CERTAIN = 30.0  # standard errors: beyond it no probability but 1 can be told


class Spread(NamedTuple):
    """The parts of the variance of what a claim is about, and where they are from."""

    parts: Parts
    source: str


class Power(NamedTuple):
    """What can be expected of a claim."""

    claim: Claim
    seeds: int
    power: float  # with these seeds, in its family
    alone: float  # if it were the only one of its family
    enough: int | None  # the fewest seeds for WANTED; None where MOST_SEEDS are not enough
    hours: float | None  # for all records of its cases with these seeds
    enough_hours: float | None
    source: str  # of the spread


def powers(spec: Spec, runs: Runs, aged: Callable[[Run], Age] = lambda run: FRESH) -> list[Power]:
    """What can be expected of each claim of a spec that says its effect; HapError where no spread is known.

    `aged` tells the age of a run, so that it can be said where spreads are of stale records.
    """
    return [_power(spec, claim, runs, aged) for claim in spec.claims if claim.effect is not None]


def mistakes(spec: Spec, runs: Runs) -> Iterator[tuple[int, str, object]]:
    """Claims that say no effect, or that no number of seeds can be expected to decide: number, rule, found."""
    for number, claim in enumerate(spec.claims, start=1):
        if claim.effect is None:
            yield number, "must say the effect that it assumes, as in effect = 0.3", "none"
            continue
        try:
            found = _power(spec, claim, runs)
        except HapError as error:
            yield number, "must have a spread, from records or assumed", str(error)
            continue
        if found.enough is None:
            rule = f"must be one that seeds can decide in {WANTED:.0%} of cases at its effect of {claim.effect:g}"
            yield number, rule, f"{chance(claim, spread(spec, claim, runs).parts, MOST_SEEDS, _level(spec, claim)):.0%}"


def chance(claim: Claim, parts: Parts, seeds: int, level: float) -> float:
    """The probability that bounds of this confidence over so many seeds decide that the claim holds, at its effect."""
    if seeds < 2:
        return 0.0
    error, freedom, effect = parts.error(seeds), parts.freedom(seeds), claim.effect or 0.0
    if claim.op != "==":
        return _beyond(claim.tolerance + effect, error, freedom, level)
    both = (_beyond(claim.tolerance + shift, error, freedom, level) for shift in (-effect, effect))
    return max(0.0, sum(both) - 1)


def _beyond(margin: float, error: float, freedom: float, level: float) -> float:
    """That a bound lies within a margin from the truth."""
    from scipy.stats import nct, t

    if error == 0 or margin / error > CERTAIN:
        return float(margin >= 0)
    return float(nct.sf(t.isf(1 - level, freedom), freedom, margin / error)) if margin > 0 else 0.0


def spread(spec: Spec, claim: Claim, runs: Runs, aged: Callable[[Run], Age] = lambda run: FRESH) -> Spread:
    """That of what a claim is about: from its records, and from what the spec assumes where they do not say."""
    both = sides(claim, runs)
    seeds = [seed for seed in spec.seeds if all(seed in side for side in both)]
    if len(seeds) < 2:
        return Spread(_parts(_assumed(spec, claim), claim), ASSUMED)
    stale = any(aged(side[seed]).state == "stale" for side in both for seed in seeds)
    found, told = measured(claim, runs, seeds), f"{len(seeds)} seeds of {'stale ' if stale else ''}records"
    if found.parts is not None:
        return Spread(found.parts, told)
    if deviation(found.values) == 0 and not found.certain:
        return Spread(_parts(_assumed(spec, claim), claim), ASSUMED)
    seen = deviation(found.values) ** 2
    if claim.over == "seeds":
        return Spread(Parts(seen, 0.0, 0.0, 2), told)
    added = _parts(_assumed(spec, claim), claim)
    return Spread(added._replace(seeds=seen, rest=min(seen, added.rest)), f"{told}, images assumed")


def _assumed(spec: Spec, claim: Claim) -> Assumed:
    """What a spec assumes of a metric at a stage, or of the metric."""
    for name in (f"{claim.metric} {claim.stage}", claim.metric):
        if name in spec.assumed:
            return spec.assumed[name]
    raise HapError(f"{spec.name}: assumed.{claim.metric}: is needed where records do not say a spread")


def _parts(assumed: Assumed, claim: Claim) -> Parts:
    """The parts of what is assumed, in squared percent points; a claim over seeds has images for given."""
    if assumed.images is None:
        return Parts(assumed.seeds**2, 0.0, 0.0, 2)
    noise = 1e4 * assumed.disagree / 100 / assumed.images
    rest, lasting = noise * (1 - assumed.persistent), noise * assumed.persistent
    return Parts(assumed.seeds**2 + rest, lasting if claim.over != "seeds" else 0.0, rest, assumed.images)


def _level(spec: Spec, claim: Claim) -> float:
    """The confidence of the first step of Holm's procedure over the family of a claim."""
    family = [each for each in spec.claims if each.against is not None and each.family == claim.family]
    return 1 - (1 - claim.confidence) / (len(family) if claim.against is not None else 1)


def _power(spec: Spec, claim: Claim, runs: Runs, aged: Callable[[Run], Age] = lambda run: FRESH) -> Power:
    found, level, stops = spread(spec, claim, runs, aged), _level(spec, claim), spec.stops

    def best(confidence: float) -> float:
        """By the look that is likeliest to decide, each with the part of the error that it spends."""
        looks = zip(stops, spending(stops), strict=True)
        return max(chance(claim, found.parts, look, 1 - (1 - confidence) * share) for look, share in looks)

    more = further(lambda seeds: chance(claim, found.parts, 1 + seeds, level) >= WANTED)
    enough = None if more is None else 1 + more
    each = _hours(spec, claim, runs)
    hours = [None if each is None or seeds is None else each * seeds for seeds in (stops[-1], enough)]
    return Power(claim, stops[-1], best(level), best(claim.confidence), enough, hours[0], hours[1], found.source)


def _hours(spec: Spec, claim: Claim, runs: Runs) -> float | None:
    """What a seed of all its cases takes: by the median of their records, or as the spec assumes."""
    cases = [case for case in (claim.case, claim.against) if case is not None]
    took = [_seconds(runs.get(case, ())) or (spec.minutes and 60 * spec.minutes) for case in cases]
    return None if None in took else sum(each for each in took if each is not None) / 3600


def _seconds(runs: Sequence[Run]) -> float | None:
    took: list[Mapping[str, float]] = [run.seconds for run in runs]
    return median(sum(each.get(stage, 0.0) for stage in TIMED) for each in took) if took else None
