"""Whether a series of numbers stepped for the worse: by its best piecewise constant fit, and against a reference.

Pure numbers, higher is better, a number a night or a run; knows nothing of files, specs or time. Each p-value is that
of a test whose false alarms are bounded for independent normal noise of any size: whatever the fit could have chosen is
paid for by Bonferroni's inequality, and dropping the extremes of the reference by calibration. What a family of them
may raise is for the caller to say.

Apache Otava (0.8) answers the same question without that bound: at its p of 0.001 it sees a change in 0.5 % of quiet
series of 6 nights and in 3 % of those of 60 (400 simulated of each), here in at most 0.1 %.
"""

from functools import cache
from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
DRAWS = 400_000  # of the null distribution of the reference test; p-values end at its inverse
NORMAL = 0.6744897501960817  # the median absolute value of a standard normal number
SHORTEST = 2  # numbers in a level of the past: one alone may be luck


class Step(NamedTuple):
    """The last level of a series, beside the level of the past that it is most surely worse than."""

    at: int  # since when it is worse
    before: float
    after: float
    p: float


def fit(values: Numbers, floor: float) -> NDArray[np.intp]:
    """Of each prefix of a series, where the last level of its best fit begins; leading axes are series of one length.

    The fit minimises the squares plus 3 s^2 log n for each level (Yao 1988 has 2), by dynamic programming over where
    the last level begins; s is robust, from the median absolute difference of neighbours, and at least `floor`.
    """
    n = values.shape[-1]
    centred = values - values.mean(-1, keepdims=True)
    first, second = (np.insert(np.cumsum(centred**power, -1), 0, 0.0, -1) for power in (1, 2))
    penalty = (3 * np.log(n) * np.maximum(_spread(values), floor) ** 2)[..., None]
    best, begins = np.zeros((*values.shape[:-1], n + 1)), np.zeros(values.shape, dtype=np.intp)
    for stop in range(1, n + 1):
        sizes = stop - np.arange(stop)
        squares = second[..., stop, None] - second[..., :stop]
        squares = squares - (first[..., stop, None] - first[..., :stop]) ** 2 / sizes
        costs = best[..., :stop] + squares + penalty
        begins[..., stop - 1] = costs.argmin(-1)
        best[..., stop] = costs.min(-1)
    return begins


def levels(begins: NDArray[np.intp]) -> list[tuple[int, int]]:
    """The levels of one fitted series, each from its first number to behind its last, in order."""
    found, stop = list[tuple[int, int]](), len(begins)
    while stop:
        start = int(begins[stop - 1])
        found.append((start, stop))
        stop = start
    return found[::-1]


def step(values: Numbers, floor: float, shortest: int = 1, begins: NDArray[np.intp] | None = None) -> Step | None:
    """The surest step down to the end of the series; None where there is none.

    An end is the last level of the fit, or the last few as one, of `shortest` numbers or more; one that has recovered
    is none. It is compared with each level before it, and with all that is before it, by Student's test on the numbers
    of the two alone. A pair's p is divided by its share of all that could have been compared (`share`), so that
    the least p is at most alpha in at most alpha of all series without a step, wherever the fit led.
    """
    n, found, steps = len(values), levels(fit(values, floor) if begins is None else begins), list[Step]()
    ends = [start for start, _ in found[1:] if n - start >= shortest]
    pairs = {(*past, end) for end in ends for past in [(0, end), *found] if past[1] <= end}
    for start, stop, end in sorted(pairs):
        past, last = values[start:stop], values[end:]
        before, after = float(past.mean()), float(last.mean())
        high = [b for a, b in found if b > start and values[a:b].mean() > (before + after) / 2]
        if before > after and len(past) >= SHORTEST and high[-1] <= end:
            p = min(1.0, _student(past, last, floor) / share(start, stop, end, n, shortest))
            steps.append(Step(high[-1], before, after, p))  # it fell where the last high level ended
    return min(steps, key=lambda found: found.p, default=None)


def share(start: int, stop: int, end: int, n: int, shortest: int = 1) -> float:
    """The weight of comparing values[start:stop] with values[end:]; over all pairs of a series they add up to 1.

    Ends of L numbers share s / (L (L + 1)) from the shortest s on, so that what is new is seen soon. Of that, one half
    is for all that is before the end, a quarter for what is just before it, a quarter for what is farther back.
    """
    length = n - end
    weight = shortest / (length * (length + 1))
    if stop == end:
        return weight / 2 if start == 0 else weight / 4 / max(1, end - SHORTEST)
    return weight / 4 / comb(end, 2)


def reference(before: Numbers, new: Numbers, floor: float) -> Numbers:
    """p-values of `new`, N numbers, being worse than the 2N `before`, of which the best and the worst are dropped.

    The statistic is MLPerf's: a one-sided t-test with equal variances on what is left. Without the extremes the spread
    is too small: of 9 numbers its 0.05 is 0.08 and its 0.001 nearly 0.003. So p is the share of normal samples whose
    statistic is as large. # MLPerf: takes 0.05 of Student's distribution.
    """
    if before.shape[-1] != 2 * new.shape[-1]:
        raise ValueError(f"twice as many numbers of reference expected, found {before.shape[-1]} for {new.shape[-1]}")
    null = _null(new.shape[-1])
    beyond = len(null) - np.searchsorted(null, _statistic(before, new, floor), side="left")
    return np.asarray((1 + beyond) / (1 + len(null)))


def _statistic(before: Numbers, new: Numbers, floor: float) -> Numbers:
    from scipy.stats import ttest_ind_from_stats

    kept = np.sort(before, -1)[..., 1:-1]
    deviations = [np.maximum(each.std(-1, ddof=1), floor) for each in (kept, new)]
    sides = [(each.mean(-1), sd, each.shape[-1]) for each, sd in zip((kept, new), deviations, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Any = ttest_ind_from_stats(*sides[0], *sides[1])
    return np.asarray(np.nan_to_num(found.statistic, nan=0.0))


@cache
def _null(n: int) -> Numbers:
    """The statistic of DRAWS normal samples without a difference, sorted; of n new numbers and 2n of reference."""
    drawn = np.random.default_rng(0).standard_normal((DRAWS, 3 * n))
    return np.sort(_statistic(drawn[:, : 2 * n], drawn[:, 2 * n :], 0.0))


def _student(before: Numbers, after: Numbers, floor: float) -> float:
    """The one-sided p of `after` being lower, the pooled spread at least `floor`; one number alone has no spread."""
    from scipy.stats import t

    squares = sum(float(((each - each.mean()) ** 2).sum()) for each in (before, after))
    freedom = len(before) + len(after) - 2
    error = max(np.sqrt(squares / freedom), floor) * np.sqrt(1 / len(before) + 1 / len(after))
    gap = float(before.mean() - after.mean())
    if error == 0:
        return 0.0 if gap > 0 else 1.0
    return float(t.sf(gap / error, freedom))


def _spread(values: Numbers) -> Numbers:
    """A standard deviation that steps do not move: of the differences of neighbours, from their median size."""
    if values.shape[-1] < 2:
        return np.zeros(values.shape[:-1])
    differences = np.abs(np.diff(values, axis=-1))
    return np.asarray(np.median(differences, -1) / (NORMAL * np.sqrt(2)))
