import itertools
import math
import random
import warnings

import numpy as np
import pytest
from scipy import stats

from hap.harness.verdicts import statistics
from hap.harness.verdicts.statistics import (
    Interval,
    confidences,
    counted,
    deviation,
    expected,
    fails,
    further,
    holds,
    holm,
    interval,
    p_value,
    variance,
    variance_of_difference,
)

TEN = [1.0, 1.2, 0.9, 1.1, 3.0, 1.05, 0.95, 1.3, 1.15, 0.85]


def test_student_by_hand():
    """93, 94, 95: s = 1, t(0.95, 2) = 2.919986, so the half width is 2.919986 / sqrt(3) = 1.685854."""
    found = interval([93.0, 94.0, 95.0])
    assert (found.mean, found.low, found.high) == pytest.approx((94.0, 92.314146, 95.685854), abs=1e-6)
    assert (found.kind, found.confidence) == ("Student", 0.95)


def test_student_at_another_confidence_by_hand():
    """Two values, 1 and 3: s = sqrt(2), t(0.9, 1) = 3.077684, half width 3.077684."""
    found = interval([1.0, 3.0], 0.9)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, -1.077684, 5.077684), abs=1e-6)


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0, 5.0], [0.1 + 0.2, 0.3]])
def test_values_without_spread_have_bounds_at_their_mean(values):
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((values[0], values[0]), abs=1e-12)
    assert found.kind == "exact"
    assert deviation(values) == 0


def test_the_test_set_widens_in_quadrature():
    """Distances of 1.685854 and of z(0.95) x 0.5 = 1.644854 x 0.5 = 0.822427: 1.875772."""
    found = interval([93.0, 94.0, 95.0], sampling=0.5)
    assert (found.low, found.high) == pytest.approx((94 - 1.875772, 94 + 1.875772), abs=1e-5)
    alone = interval([94.0, 94.0], sampling=0.5)
    assert alone.kind == "test set"
    assert alone.high - 94 == pytest.approx(stats.norm.ppf(0.95) * 0.5)


def test_the_widened_bounds_cover_what_they_say():
    """Simulated: the mean of 5 seeds on a test set whose error they share; 95 % of the lower bounds lie below."""
    rng = np.random.default_rng(3)
    shared, own = rng.normal(0, 0.4, 4000), rng.normal(0, 0.7, (4000, 5))
    below = [interval(list(e + row), sampling=0.4).low <= 0 for e, row in zip(shared, own, strict=True)]
    assert 0.94 <= np.mean(below) <= 0.97
    without = [interval(list(e + row)).low <= 0 for e, row in zip(shared, own, strict=True)]
    assert np.mean(without) < 0.92


def test_the_bootstrap_is_that_of_scipy_and_the_same_twice():
    low, high = statistics._bca(tuple(TEN), 0.95)
    oracle = stats.bootstrap((TEN,), np.mean, confidence_level=0.9, n_resamples=40_000, rng=np.random.default_rng(7))
    assert low == pytest.approx(oracle.confidence_interval.low, abs=0.03)
    assert high == pytest.approx(oracle.confidence_interval.high, abs=0.06)
    assert high - np.mean(TEN) > np.mean(TEN) - low  # one value is far above: BCa sees it, Student does not
    statistics._resampled.cache_clear()
    assert (low, high) == statistics._bca(tuple(TEN), 0.95)


@pytest.mark.parametrize("sampling", [0.0, 0.3])
def test_a_bound_of_a_difference_is_the_farther_of_both(sampling):
    found, student = (interval(TEN, sampling=sampling, bootstrap=flag) for flag in (True, False))
    assert (found.kind, student.kind) == ("BCa", "Student")
    assert found.low == student.low
    assert found.high > student.high
    mirrored = interval([-value for value in TEN], sampling=sampling, bootstrap=True)
    assert mirrored.low == pytest.approx(-found.high, abs=0.05)
    assert mirrored.high == pytest.approx(-found.low)


def test_resampling_does_not_find_what_it_has_not_seen():
    """Ten values above 0, and so all resamples: BCa alone would tell a p-value of none, Student tells t(9)'s."""
    values = [0.1 + value / 10 for value in range(10)]
    assert statistics._bca(tuple(values), 1 - 1e-9)[0] > 0
    found = p_value(lambda c: holds(">=", interval(values, c, bootstrap=True), 0.0, math.inf))
    assert found == pytest.approx(stats.ttest_1samp(values, 0.0, alternative="greater").pvalue, rel=0.05)


def test_few_seeds_have_students_bounds_and_say_so():
    nine = interval(TEN[:9], bootstrap=True)
    assert nine == interval(TEN[:9])
    assert nine.kind == "Student"
    assert interval([2.0] * 12, bootstrap=True).kind == "exact"
    assert interval(TEN).kind == "Student"


def test_a_bootstrap_that_finds_no_number_falls_back(monkeypatch):
    monkeypatch.setattr(statistics, "_bca", lambda values, confidence: (math.nan, 1.0))
    assert interval(TEN, bootstrap=True) == interval(TEN)


def test_why_few_seeds_are_not_bootstrapped():
    """Simulated: the share of lower bounds at 95 % below the mean of a normal and of a left-skewed sample."""

    def share(seeds, draw, mean):
        sample = draw((1500, seeds))
        found = stats.bootstrap(
            (sample,), np.mean, axis=1, confidence_level=0.9, n_resamples=1000, rng=np.random.default_rng(0)
        )
        low = sample.mean(1) - stats.t.ppf(0.95, seeds - 1) * sample.std(1, ddof=1) / seeds**0.5
        return np.mean(found.confidence_interval.low <= mean), np.mean(low <= mean)

    rng = np.random.default_rng(1)
    normal = {seeds: share(seeds, lambda size: rng.normal(size=size), 0.0)[0] for seeds in (3, 5, 10)}
    assert normal[3] < 0.88 < normal[5] < 0.915 < normal[10] < 0.945
    few, many = (share(seeds, lambda size: -rng.exponential(size=size), -1.0) for seeds in (3, 20))
    assert few[0] < few[1]  # 3: Student's is nearer to 95 %
    assert many[0] > many[1]  # 20: BCa's is


BAND = (-1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "held", "failed"),
    [
        (-0.5, 0.5, "<= >= ==", ""),
        (-1.5, 0.5, "<=", ""),
        (-0.5, 1.5, ">=", ""),
        (-1.5, 1.5, "", ""),
        (1.1, 1.5, ">=", "<= =="),
        (-1.5, -1.1, "<=", ">= =="),
        (-1.0, 1.0, "<= >= ==", ""),
    ],
)
def test_bounds_inside_the_band_hold_and_bounds_outside_fail(low, high, held, failed):
    found = Interval((low + high) / 2, low, high, "Student", 0.95)
    for op in ("<=", ">=", "=="):
        assert holds(op, found, *BAND) is (op in held.split())
        assert fails(op, found, *BAND) is (op in failed.split())


def sample(seed, size=4, mean=0.0):
    return list(np.random.default_rng(seed).normal(mean, 1.0, size))


@pytest.mark.parametrize("seed", range(6))
def test_p_values_are_those_of_the_one_sample_t_test(seed):
    values = sample(seed, mean=0.5)
    non_inferior = p_value(lambda c: holds(">=", interval(values, c), -0.8, math.inf))
    assert non_inferior == pytest.approx(one_sided(values, -0.8, "greater"), rel=1e-6)
    not_above = p_value(lambda c: holds("<=", interval(values, c), -math.inf, 1.3))
    assert not_above == pytest.approx(one_sided(values, 1.3, "less"), rel=1e-6)
    refuted = p_value(lambda c: fails(">=", interval(values, c), 2.0, math.inf))
    assert refuted == pytest.approx(one_sided(values, 2.0, "less"), rel=1e-6)


def one_sided(values, popmean, alternative):
    """The p-value of scipy, 1 where the mean is on the wrong side: there no bounds decide."""
    found = stats.ttest_1samp(values, popmean, alternative=alternative).pvalue
    return found if found < 0.5 else 1.0


@pytest.mark.parametrize("seed", range(6))
def test_equality_is_the_larger_of_two_one_sided_tests(seed):
    values = sample(seed, 6)
    tost = max(one_sided(values, -1.5, "greater"), one_sided(values, 1.5, "less"))
    assert p_value(lambda c: holds("==", interval(values, c), -1.5, 1.5)) == pytest.approx(tost, rel=1e-6)


def test_p_values_end_at_one_and_at_the_smallest_told():
    assert p_value(lambda c: False) == 1.0
    assert p_value(lambda c: True) == statistics.SMALLEST
    assert p_value(lambda c: c <= 0.99) == pytest.approx(0.01)


def closed_testing(p_values, alpha):
    """Rejected by closed testing with Bonferroni in each intersection, by brute force over all subsets."""
    every = range(len(p_values))
    subsets = [s for n in range(1, len(p_values) + 1) for s in itertools.combinations(every, n)]
    rejected = {s for s in subsets if min(p_values[i] for i in s) <= alpha / len(s)}
    return [all(s in rejected for s in subsets if i in s) for i in every]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_holm_is_closed_testing(size):
    draw = random.Random(size)
    decided = set()
    for _ in range(60):
        p_values = [draw.choice([0.001, 0.008, 0.01, 0.02, 0.03, 0.2, draw.random() / 5]) for _ in range(size)]
        oracle = closed_testing(p_values, 0.05)
        assert [p <= 0.05 for p in holm(p_values)] == oracle
        found = confidences(p_values, [0.95] * size)
        assert [p <= (1 - c) * (1 + 1e-12) for p, c in zip(p_values, found, strict=True)] == oracle
        decided |= set(oracle)
    assert decided == {True, False}


def test_holm_by_hand():
    """0.01 x 3, 0.02 x 2, 0.03 x 1, never smaller than the one before: 0.03, 0.04, 0.04."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == confidences([], []) == []
    assert confidences([0.03, 0.01, 0.02], [0.95] * 3) == pytest.approx([0.95, 1 - 0.05 / 3, 0.975])
    # the second fails at 0.05 / 2: what comes after is held against the same
    assert confidences([0.04, 0.01, 0.03], [0.95] * 3) == pytest.approx([0.975, 1 - 0.05 / 3, 0.975])


def test_each_hypothesis_of_a_family_keeps_its_own_confidence():
    assert confidences([0.001, 0.001], [0.9, 0.95]) == pytest.approx([0.95, 0.95])
    assert confidences([0.04], [0.9]) == pytest.approx([0.9])


def test_holm_keeps_the_family_wise_error():
    """Simulated: 8 true null hypotheses, of which at most 5 in 100 families reject one; uncorrected, 1 in 3 does."""
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(4000, 8))
    assert np.mean([min(holm(list(family))) <= 0.05 for family in families]) < 0.056
    assert np.mean(families.min(1) <= 0.05) > 0.3


def above(bottom, values, sampling=0.0):
    """Whether so many further seeds decide that a mean is above `bottom` or below."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))

    def decided(more):
        found = expected(mean, spread, len(values) + more, sampling=sampling)
        return holds(">=", found, bottom, math.inf) or fails(">=", found, bottom, math.inf)

    return decided


def test_further_seeds_are_the_fewest_that_decide():
    """By trying each number in turn, with the bounds of scipy."""
    values = [0.2, -0.3, 0.5]
    lows = {n: stats.t.interval(0.9, n - 1, np.mean(values), np.std(values, ddof=1) / n**0.5)[0] for n in range(4, 999)}
    fewest = next(n for n, low in lows.items() if low >= -0.1) - 3
    assert fewest > 1
    assert further(above(-0.1, values)) == fewest


def test_no_seeds_decide_where_the_mean_sits_on_the_bound_or_the_test_set_is_small():
    values = [0.9, 1.0, 1.1]
    assert further(above(1.0, values)) is None
    assert further(above(0.8, values)) == 1
    assert further(above(0.8, values, sampling=0.1)) > 1
    assert further(above(0.8, values, sampling=0.5)) is None


def test_the_variance_of_an_accuracy_is_binomial():
    hits = np.random.default_rng(0).binomial(450, 0.9, 200_000) / 450
    assert variance("accuracy", 0.9, 0.9) / 450 == pytest.approx(hits.var(), rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_the_variances_of_f1_and_matthews_are_those_of_resampled_tables(seed):
    """F1 of any table; Matthews' correlation of one with margins of one half, and the docstring says so."""
    rng = np.random.default_rng(seed)
    table = np.array([0.55, 0.1, 0.08, 0.27])  # hits, misses, false alarms, rejections
    draws = rng.multinomial(400, table, 200_000)
    f1 = 2 * draws[:, 0] / (2 * draws[:, 0] + draws[:, 1] + draws[:, 2])
    exact = 2 * table[0] / (2 * table[0] + table[1] + table[2])
    assert variance("f1", exact, table[0] + table[3]) / 400 == pytest.approx(f1.var(), rel=0.03)
    hits, misses, alarms, rejections = rng.multinomial(400, [0.4, 0.1, 0.1, 0.4], 200_000).T
    margins = (hits + misses) * (hits + alarms) * (rejections + misses) * (rejections + alarms)
    r = (hits * rejections - misses * alarms) / np.sqrt(margins.astype(float))
    assert variance("matthews", 0.6, 0.8) / 400 == pytest.approx(r.var(), rel=0.03)


def test_the_variances_are_finite_at_the_ends():
    for metric in ("accuracy", "f1", "matthews"):
        assert variance(metric, 1.0, 1.0) == 0.0
        assert math.isfinite(variance(metric, 0.0, 0.0))
        assert math.isfinite(variance(metric, 0.0, 0.5))


def test_the_variance_of_a_difference_lies_between_its_bounds():
    assert variance_of_difference(0.09, 0.09, 0.0) == pytest.approx(0.09)  # independent: 0.18; nested: 0
    assert variance_of_difference(0.09, 0.16, 0.1) == pytest.approx((0.25 + 0.09) / 2)


def test_the_rule_for_differences_is_wide_enough_for_networks_whose_errors_are_known():
    """Perceptrons that differ in seed, width and weights set to zero, on 1,297 digits that they have not seen."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = order[:500], order[500:]
    right = []
    for width, seed in ((16, 0), (16, 1), (48, 2)):
        net = MLPClassifier((width,), random_state=seed, max_iter=60, tol=0, n_iter_no_change=99)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged, and need not
            net.fit(pixels[train] / 16, labels[train])
        for share in (0.0, 0.3, 0.5):  # the smallest weights go
            small = np.abs(net.coefs_[0]) < np.quantile(np.abs(net.coefs_[0]), share)
            net.coefs_[0] = np.where(small, 0.0, net.coefs_[0])
            right.append((net.predict(pixels[test] / 16) == labels[test]).astype(float))
    ratios = []
    for one, other in itertools.combinations(right, 2):
        parts = [variance("accuracy", each.mean(), each.mean()) for each in (one, other)]
        ratios.append((one - other).var() / variance_of_difference(*parts, one.mean() - other.mean()))
    assert max(ratios) < 1.15  # trained apart: right to a tenth or so
    assert np.median(ratios) < 1
    assert min(ratios) < 0.3  # of one parent: on the safe side


@pytest.mark.parametrize("size", [450, 408, 1043, 10_000])
def test_the_size_of_a_test_set_is_read_off_its_counts(size):
    rng = random.Random(size)
    counts = [*(rng.randrange(size) for _ in range(6)), size - 1]
    assert counted(100 * count / size for count in counts) == size
    assert counted([50.0, 25.0]) == 4
    assert counted([100.0]) == 1


def test_no_size_is_read_off_what_is_no_count():
    assert counted([100 / math.pi]) is None
