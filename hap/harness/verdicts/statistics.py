"""Intervals, tests and their corrections over seeds, from numbers alone; knows nothing of claims, runs or files.

**Seeds.** The one-sided bounds at confidence c of n values with mean m and standard deviation s are Student's,
m -+ t(c, n - 1) s / sqrt(n). A difference between methods has bounds by the bootstrap, bias-corrected and accelerated
(BCa) [Efron87], from FEWEST seeds on. With fewer it has Student's: 3 values have but 10 different resampled means, and
a BCa bound at 95 % lies on the right side of a normal mean in 85 % of samples of 3, 90 % of 5 and 92 % of 10; of a
skewed one, where Student's fails too, BCa is the better of the two from about 10 on (simulated in the tests). A bound
is then the farther of both: resampling knows of skewness, and nothing of tails that it has not seen, which is where the
correction for many comparisons asks.

**The test set.** A mean over seeds is one of a finite sample of inputs, which no further seed makes larger. Where it
is known which samples were right, `across` has the bounds over seeds and samples, m -+ t(c, df) e, with the standard
error and the degrees of freedom of `crossed`. Where only counts are known, a bound of the samples' standard error
(`sampling`) widens Student's bounds in quadrature, each distance to the mean becoming sqrt(distance^2 + (z(c) e)^2):
the recovery of variances of [Zou08]. That takes the two sources for independent, though a spread over seeds holds much
of the samples' noise: it errs on the safe side, in 0 to 3 % where it says 5 %.

**Looks.** Where seeds are added for claims that are still open, each look spends its own part of the error, and all
looks together no more than all of it (Bonferroni over looks, under any dependence between them). `spending` gives a
look the part of the seeds that it adds: with 3, 6 and 12 seeds a quarter, a quarter and a half of the error.

**Decisions.** ">=" and "<=" are tests of non-inferiority, "==" is two one-sided tests (TOST) [Schuirmann87]: a claim
holds when the bounds lie in its band, and fails when they lie outside; "==" may fail on either side, and each has half
of the error. That is a test whose p-value is the least
1 - c at which the bounds decide; `holm` [Holm79] corrects a family of them, under any dependence.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from hap.harness.verdicts.crossed import Parts

Op = Literal["<=", ">=", "=="]
Kind = Literal["exact", "test set", "Student", "BCa", "crossed"]
FEWEST = 10  # seeds that the bootstrap takes
RESAMPLES = 9999
SMALLEST = 1e-9  # no p-value is told below it
MOST_SEEDS = 1000  # more are not told as a way to decide
LARGEST = 200_000  # samples of a test set, where its size is read off its counts


@dataclass(frozen=True)
class Interval:
    """A mean with its lower and upper one-sided bound, each at `confidence`, and how they were found."""

    mean: float
    low: float
    high: float
    kind: Kind
    confidence: float


def interval(
    values: Sequence[float], confidence: float = 0.95, *, sampling: float = 0.0, bootstrap: bool = False
) -> Interval:
    """The bounds of the mean of at least one value; `bootstrap`: by BCa too where there are FEWEST seeds.

    One value, or equal ones, have no spread to see: only the caller knows whether that is because there is none.
    """
    mean, spread = math.fsum(values) / len(values), deviation(values)
    found = expected(mean, spread, len(values), confidence, sampling=sampling)
    if not bootstrap or len(values) < FEWEST or spread == 0:
        return found
    low, high = _bca(tuple(values), confidence)
    if not (math.isfinite(low) and math.isfinite(high)):
        return found
    resampled = _widened(mean, mean - low, high - mean, "BCa", confidence, sampling)
    return replace(resampled, low=min(found.low, resampled.low), high=max(found.high, resampled.high))


def across(mean: float, parts: Parts, seeds: int, confidence: float = 0.95) -> Interval:
    """The bounds over seeds and images of a mean of so many seeds, from the parts of its variance."""
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    error = parts.error(seeds)
    half = -float(stdtrit(parts.freedom(seeds), 1 - confidence)) * error if error else 0.0
    return Interval(mean, mean - half, mean + half, "crossed" if error else "exact", confidence)


def spending(looks: Sequence[int]) -> list[float]:
    """The part of the error that each look spends: that of the seeds which it adds."""
    return [(seeds - before) / looks[-1] for before, seeds in zip([0, *looks], looks, strict=False)]


def bounds(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, lower and upper one-sided bound of Student."""
    found = interval(values, confidence)
    return found.mean, found.low, found.high


def expected(mean: float, deviation: float, seeds: int, confidence: float = 0.95, *, sampling: float = 0.0) -> Interval:
    """Student's bounds for so many seeds with this mean and standard deviation."""
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    if deviation == 0:
        return _widened(mean, 0.0, 0.0, "test set" if sampling else "exact", confidence, sampling)
    half = -float(stdtrit(seeds - 1, 1 - confidence)) * deviation / math.sqrt(seeds)
    return _widened(mean, half, half, "Student", confidence, sampling)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 of one value, and of values equal to rounding."""
    mean = math.fsum(values) / len(values)
    if max(values) - min(values) <= 1e-9 * max(1.0, abs(mean)):
        return 0.0
    scale = max(abs(value - mean) for value in values)  # else the squares of what is huge are infinite
    return scale * math.sqrt(math.fsum(((value - mean) / scale) ** 2 for value in values) / (len(values) - 1))


def holds(op: Op, found: Interval, bottom: float, top: float) -> bool:
    """Whether the bounds lie inside the band: above its bottom for ">=", below its top for "<=", both for "=="."""
    above, below = found.low >= bottom, found.high <= top
    return {">=": above, "<=": below, "==": above and below}[op]


def fails(op: Op, found: Interval, bottom: float, top: float) -> bool:
    """Whether the bounds lie outside the band, and so what is claimed is refuted."""
    above, below = found.low > top, found.high < bottom
    return {">=": below, "<=": above, "==": above or below}[op]


def p_value(decided: Callable[[float], bool]) -> float:
    """The least 1 - c at which the bounds of confidence c decide, by bisection; 1 where those of one half do not."""
    if not decided(0.5):
        return 1.0
    below, above = math.log(SMALLEST), math.log(0.5)
    if decided(1 - SMALLEST):
        return SMALLEST
    for _ in range(40):
        middle = (below + above) / 2
        below, above = (below, middle) if decided(1 - math.exp(middle)) else (middle, above)
    return math.exp(above)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number [Holm79]: to reject those up to alpha errs anywhere at most that often."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def confidences(p_values: Sequence[float], stated: Sequence[float]) -> list[float]:
    """The confidence at which Holm's procedure decides each hypothesis of a family, given the one stated for each.

    A p-value is rejected exactly when it is at most 1 - c, so bounds at c say what the procedure says. After the first
    one that is not rejected the rest is held against the same share of its 1 - c.
    """
    ranks = sorted(range(len(p_values)), key=lambda i: p_values[i] / (1 - stated[i]))
    left, found = len(p_values), list(stated)
    stopped = False
    for index in ranks:
        found[index] = 1 - (1 - stated[index]) / left
        stopped = stopped or p_values[index] > (1 - stated[index]) / left
        left -= not stopped
    return found


def further(decided: Callable[[int], bool]) -> int | None:
    """The least number of further seeds with which `decided` says yes; None where MOST_SEEDS are not enough."""
    if not decided(MOST_SEEDS):
        return None
    few, many = 0, MOST_SEEDS
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if decided(middle) else (middle, many)
    return many


def variance(metric: str, value: float, accuracy: float) -> float:
    """What one sample of a test set contributes to the variance of a metric (shares, not percent), times 1.

    Accuracy p: p (1 - p). F1: with errors e = 1 - p and hits of the class a = F e / (2 (1 - F)), by the delta method,
    4 a e (a + e) / (2 a + e)^4. Matthews' correlation r: 1 - r^2, that of a table whose margins are one half [Yule12];
    records do not tell the margins, and at those of CoLA, 69 to 31, the error is 5 to 8 % larger (simulated).
    """
    if metric == "matthews":
        return max(0.0, 1 - value**2)
    wrong = 1 - accuracy
    if metric == "f1":
        hits = value * wrong / (2 * (1 - value)) if value < 1 else 1.0
        return 4 * hits * wrong * (hits + wrong) / (2 * hits + wrong) ** 4 if hits + wrong else 0.0
    return accuracy * wrong


def variance_of_difference(first: float, second: float, difference: float) -> float:
    """What one sample contributes to the variance of the difference of two models on the same test set.

    The counts do not say which samples the models share their errors on; they bound it. If errors had nothing to do
    with each other it were the sum of both variances; if one model's errors were among the other's it were d (1 - d)
    for a difference d, the least there is (McNemar). Networks agree well beyond what their accuracies tell [Mania19]:
    the rule is the middle of the two. On networks whose errors are known (in the tests) it is right to a tenth where
    they were trained apart, and on the safe side where they were pruned from one.
    """
    least = max(0.0, abs(difference) * (1 - abs(difference)))
    return (first + second + least) / 2


def counted(accuracies: Iterable[float]) -> int | None:
    """The least number of samples of which all these accuracies, in percent, are whole counts; None above LARGEST.

    A test set is this size or a multiple of it: where it says too little, an interval is too wide and not too narrow.
    """
    import numpy as np

    sizes = np.arange(1, LARGEST + 1)
    for accuracy in set(accuracies):
        counts = sizes * accuracy / 100
        sizes = sizes[np.abs(counts - np.round(counts)) < 1e-6]
    return int(sizes[0]) if len(sizes) else None


def _widened(mean: float, below: float, above: float, kind: Kind, confidence: float, sampling: float) -> Interval:
    from scipy.special import ndtri

    error = -float(ndtri(1 - confidence)) * sampling if sampling else 0.0
    return Interval(mean, mean - math.hypot(below, error), mean + math.hypot(above, error), kind, confidence)


def _bca(values: tuple[float, ...], confidence: float) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    level = max(2 * confidence - 1, 0.0)
    given: dict[str, Any] = {"confidence_level": level, "method": "BCa", "n_resamples": 0}
    found = bootstrap((values,), np.mean, **given, bootstrap_result=_resampled(values)).confidence_interval
    return float(found.low), float(found.high)


@lru_cache(maxsize=64)  # a p-value asks for many confidences
def _resampled(values: tuple[float, ...]) -> Any:
    import numpy as np
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)  # the same values have the same bounds
    return bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=rng)
