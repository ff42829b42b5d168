from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hap.harness.nightly import changepoint as detect


def cost(values, cuts, penalty):
    """Squares within the levels between `cuts`, and what the levels cost."""
    edges = [0, *cuts, len(values)]
    parts = [values[a:b] for a, b in pairwise(edges)]
    return sum(float(((part - part.mean()) ** 2).sum()) for part in parts) + penalty * len(parts)


def penalty_of(values, floor):
    sigma = np.median(np.abs(np.diff(values))) / (stats.norm.ppf(0.75) * np.sqrt(2))
    return 3 * np.log(len(values)) * max(sigma, floor) ** 2


@settings(max_examples=60)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9), st.floats(0.1, 3))
def test_the_fit_is_the_best_of_all_segmentations(numbers, floor):
    """Brute force over all 2^(n-1) of them."""
    values = np.array(numbers, dtype=float)
    inner = range(1, len(values))
    every = [cuts for k in range(len(values)) for cuts in combinations(inner, k)]
    penalty = penalty_of(values, floor)
    least = min(cost(values, cuts, penalty) for cuts in every)
    found = detect.levels(detect.fit(values, floor))
    assert found[0][0] == 0
    assert found[-1][1] == len(values)
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert cost(values, [a for a, _ in found[1:]], penalty) == pytest.approx(least, abs=1e-9)


def test_many_series_are_fitted_as_each_alone():
    values = np.random.default_rng(0).normal(size=(3, 2, 12))
    values[1, 0, 6:] -= 9
    together = detect.fit(values, 0.1)
    alone = [[detect.fit(values[i, j], 0.1) for j in range(2)] for i in range(3)]
    np.testing.assert_array_equal(together, alone)


def test_a_step_is_found_where_it_is_with_its_levels():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(94, 0.2, 20), rng.normal(93, 0.2, 5)])
    found = detect.step(values, 0.05)
    assert found.at == 20
    assert found.before == pytest.approx(values[:20].mean())
    assert found.after == pytest.approx(values[20:].mean())
    raw = stats.ttest_ind(values[:20], values[20:], alternative="greater").pvalue
    assert found.p == pytest.approx(raw * 5 * 6 * 2, rel=1e-9)
    assert found.p < 1e-6


def test_an_improvement_and_a_level_series_are_no_step():
    assert detect.step(np.array([1.0, 1, 1, 2, 2, 2]), 0.1) is None
    assert detect.step(np.ones(9), 0.1) is None
    assert detect.step(np.array([3.0]), 0.1) is None


def test_a_partial_recovery_is_still_a_step_from_the_best_level():
    values = np.concatenate([np.full(10, 94.0), np.full(5, 90.0), np.full(5, 92.0)])
    values += np.random.default_rng(0).normal(0, 0.1, 20)
    found = detect.step(values, 0.05)
    assert found.at == 10
    assert found.after == pytest.approx(92, abs=0.2)
    assert found.before == pytest.approx(94, abs=0.2)
    assert found.p < 1e-6


def test_what_has_recovered_is_no_step():
    values = np.concatenate([np.full(20, 94.0), np.full(5, 90.0), np.full(1, 94.0)])
    values += np.random.default_rng(0).normal(0, 0.1, 26)
    assert detect.step(values[:-1], 0.05).p < 1e-6
    assert detect.step(values, 0.05) is None


def test_one_lucky_night_is_no_level_and_one_bad_night_is_one_if_allowed():
    lucky = np.array([1.0, 1.1, 0.9, 9.0, 1.0, 1.1, 0.9, 1.0])
    assert detect.step(lucky, 0.05).p == 1
    bad = np.array([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, -9.0])
    assert detect.step(bad, 0.05, shortest=2) is None
    assert detect.step(bad, 0.05).p < 1e-6


def test_a_spread_below_the_floor_is_not_believed():
    still = np.array([5.0] * 10 + [4.9])
    assert detect.step(still, 0.01).p < 1e-3
    assert detect.step(still, 0.1) is None
    assert detect.step(np.array([5.0] * 10 + [4.9]), 0.0).p == 0


def test_the_statistic_of_the_reference_test_is_that_of_mlperf():
    rng = np.random.default_rng(2)
    before, new = rng.normal(1, 1, (5, 8)), rng.normal(0, 1, (5, 4))
    trimmed = np.sort(before)[:, 1:-1]
    expected = stats.ttest_ind(trimmed, new, axis=-1).statistic
    np.testing.assert_allclose(detect._statistic(before, new, 0.0), expected)


@pytest.mark.parametrize("n", [3, 5])
def test_the_p_of_the_reference_test_is_right_where_mlperfs_is_too_small(n):
    """On other normal samples than it was calibrated with, shifted and scaled."""
    rng = np.random.default_rng(3)
    drawn = rng.normal(7, 0.3, (40_000, 3 * n))
    p = detect.reference(drawn[:, : 2 * n], drawn[:, 2 * n :], 0.0)
    for alpha in (0.001, 0.01, 0.05, 0.3):
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=4 * np.sqrt(alpha / 40_000) + 1e-4)
    kept = np.sort(drawn[:, : 2 * n])[:, 1:-1]
    theirs = stats.ttest_ind(kept, drawn[:, 2 * n :], axis=-1, alternative="greater").pvalue
    assert (theirs <= 0.05).mean() > 0.07


def test_the_reference_test_finds_what_is_lower_and_only_that():
    before = np.array([94.0, 94.2, 93.9, 94.1, 94.3, 93.8])
    assert detect.reference(before, np.array([90.0, 90.1, 90.2]), 0.05) < 1e-4
    assert detect.reference(before, np.array([98.0, 98.1, 98.2]), 0.05) > 0.999
    assert detect.reference(np.full(6, 2.0), np.full(3, 2.0), 0.0) > 0.3
    assert detect.reference(np.full(6, 2.0), np.full(3, 1.0), 0.0) < 1e-4
    with pytest.raises(ValueError, match="twice as many"):
        detect.reference(before, before[:2], 0.0)


def test_the_step_test_raises_no_more_than_its_p_says():
    """20,000 series of pure noise; in vain where all are level, so the p are compared with their bound."""
    rng, alarms = np.random.default_rng(4), {0.3: 0, 0.05: 0}
    for n in (6, 12, 25):
        values = rng.normal(size=(4000, n))
        begins = detect.fit(values, 0.0)
        for row in np.flatnonzero(begins[:, -1]):
            found = detect.step(values[row], 0.0, begins=begins[row])
            for alpha in alarms:
                alarms[alpha] += found is not None and found.p <= alpha
    assert 0 < alarms[0.3] <= 0.3 * 12_000
    assert alarms[0.05] <= 0.05 * 12_000


@pytest.mark.parametrize("shortest", [1, 2])
@pytest.mark.parametrize("n", [3, 4, 9, 30])
def test_the_shares_of_all_pairs_add_up_to_one_at_most(n, shortest):
    ends = range(2, n - shortest + 1)
    pairs = [(a, b, end) for end in ends for b in range(2, end + 1) for a in range(b - 1)]
    total = sum(detect.share(*pair, n, shortest) for pair in pairs)
    assert total <= 1 + 1e-12
    assert total > 0.6 or n < 9
