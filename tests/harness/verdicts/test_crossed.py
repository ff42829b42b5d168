"""The bounds over seeds, and over seeds and images, on made-up networks of which the truth is known."""

import numpy as np
import pytest
from scipy import stats

from hap.harness.records import outcomes
from hap.harness.records.outcomes import shares
from hap.harness.verdicts.crossed import Parts, parts, resampled
from hap.harness.verdicts.statistics import across, interval, spending

ALPHA = 0.05


def tables(rng, count, seeds, size, disagree, persistent, spread, shift=0.0):
    """Tables of +1 (only the first network is right), -1 and 0 for seeds and images, with what is of the images alone.

    Of the images a share disagrees; a part of that share is the same for all seeds, the rest is drawn for each. The
    mean of a seed, images aside, is normal with this spread around `shift`. All as shares.
    """
    lasting = rng.random((count, 1, size)) < disagree * persistent
    sign = np.where(rng.random((count, 1, size)) < 0.5, 1, -1)
    means = rng.normal(shift, spread, (count, seeds, 1)) / (1 - disagree * persistent)
    free = disagree * (1 - persistent) / (1 - disagree * persistent)
    drawn = rng.random((count, seeds, size), dtype=np.float32)
    own = (drawn < (free + means) / 2).astype(np.int8) - (drawn > 1 - (free - means) / 2).astype(np.int8)
    found = np.where(lasting, sign, own).astype(float)
    return found, np.where(lasting, sign, 0).mean(2)[:, 0] + shift


def simulated(count, seeds, size, disagree, persistent, spread, tolerance=0.0, over="seeds and images", seed=0):
    """How often a lower bound at 95 % is above the truth, and how often it is above minus the tolerance."""
    rng = np.random.default_rng(seed)
    wrong, held, left = 0, 0, count
    while left:
        some = min(left, max(1, 2_000_000 // (seeds * size)))
        for table, here in zip(*tables(rng, some, seeds, size, disagree, persistent, spread), strict=True):
            means = table.mean(1)
            if means.max() - means.min() < 1e-9:  # the judge says that they are equal by chance, and decides nothing
                continue
            if over == "seeds":
                low = interval(list(means), 1 - ALPHA).low - here
            else:
                low = across(means.mean(), parts(table), seeds, 1 - ALPHA).low
            wrong += low > 0
            held += low >= -tolerance
        left -= some
    return wrong / count, held / count


def test_the_parts_are_those_of_the_two_way_analysis_of_variance():
    """The mean squares by hand: of a table of 3 x 4 with their sums of squares from the definition."""
    table = np.array([[1.0, 0, 0, 1], [1, 1, 0, 1], [0, 1, 0, 1]])
    seeds, images = table.mean(1), table.mean(0)
    of_seeds = 4 * ((seeds - table.mean()) ** 2).sum() / 2
    of_images = 3 * ((images - table.mean()) ** 2).sum() / 3
    rest = sum((table[s, i] - seeds[s] - images[i] + table.mean()) ** 2 for s in range(3) for i in range(4)) / 6
    found = parts(table)
    assert found.error(3) == pytest.approx(np.sqrt((of_seeds + of_images - rest) / 12))
    assert found == pytest.approx(Parts(of_seeds / 4, (of_images - rest) / 12, rest / 4, 4))


def test_the_variance_is_that_of_made_up_tables():
    """Averaged over 4,000 tables, the estimate is the variance of their means."""
    rng = np.random.default_rng(1)
    found, _ = tables(rng, 4000, 3, 450, 0.05, 0.3, 0.003)
    estimates = [parts(table).error(3) ** 2 for table in found]
    assert np.mean(estimates) == pytest.approx(found.mean((1, 2)).var(), rel=0.06)


def test_images_that_add_nothing_leave_the_degrees_of_freedom_of_the_seeds():
    found = Parts(4.0, 0.0, 3.0, 450)
    assert found.freedom(3) == pytest.approx(2, rel=0.01)
    assert found.error(3) == pytest.approx(np.sqrt(4 / 3))
    assert Parts(0.0, 2.0, 0.0, 450).freedom(3) == pytest.approx(449)  # one network: as many as images, less one
    assert Parts(0.0, 0.0, 0.0, 450).freedom(3) == 2


def test_agreement_by_chance_makes_no_seed_well_known():
    """Seeds that differ by less than the rest alone makes them, count with the rest in the degrees of freedom."""
    assert Parts(0.1, 1.0, 3.0, 450).freedom(3) == pytest.approx(Parts(3.0, 1.0, 3.0, 450).freedom(3))
    assert Parts(9.0, 1.0, 3.0, 450).freedom(3) < Parts(3.0, 1.0, 3.0, 450).freedom(3)


def test_more_seeds_make_the_error_less_down_to_that_of_the_images():
    found = Parts(4.0, 0.25, 3.0, 450)
    errors = [found.error(seeds) for seeds in (3, 10, 100, 10**6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0.5, rel=0.01)


# seeds, images, disagreement, persistent share, spread of seeds
CONDITIONS = [
    (3, 450, 0.02, 0.1, 0.003),
    (5, 450, 0.05, 0.1, 0.003),
    (3, 10_000, 0.02, 0.1, 0.001),
    (5, 10_000, 0.05, 0.1, 0.001),
]
GRID = [
    (seeds, size, disagree, persistent, spread)
    for size, spreads in ((450, (0.0, 0.003)), (10_000, (0.0, 0.001)))
    for seeds in (3, 5)
    for disagree in (0.02, 0.05)
    for persistent in (0.0, 0.1, 0.3)
    for spread in spreads
]


@pytest.mark.parametrize("over", ["seeds", "seeds and images"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_bound_errs_as_often_as_it_says(condition, over):
    """Nominal 5 %; 1,500 tables leave a standard error of 0.6 points, so the seed of the draws is part of the test."""
    wrong, _ = simulated(3000 if condition[1] < 1000 else 1500, *condition, over=over, seed=4)
    assert 0.03 <= wrong <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("over", ["seeds", "seeds and images"])
@pytest.mark.parametrize("condition", GRID)
def test_the_bound_errs_as_often_as_it_says_over_the_grid(condition, over):
    wrong, _ = simulated(10_000, *condition, over=over)
    assert 0.03 <= wrong <= 0.06


@pytest.mark.parametrize(
    ("size", "tolerance", "spread", "least", "before"),
    [(450, 0.01, 0.003, 0.4, 0.17), (10_000, 0.003, 0.001, 0.55, 0.03)],
)
def test_equal_networks_are_told_to_be_no_worse(size, tolerance, spread, least, before):
    """Three seeds, 2 % disagree, a tenth of that lasts; `before`: with the error of the test set added."""
    _, held = simulated(2000 if size < 1000 else 1000, 3, size, 0.02, 0.1, spread, tolerance)
    assert held >= least > before + 0.2


def test_without_images_a_claim_on_new_images_errs_too_often():
    """What the images add is no luxury: Student's bounds over seeds alone err in a tenth and more."""
    rng = np.random.default_rng(5)
    found, _ = tables(rng, 3000, 5, 450, 0.05, 0.3, 0.003)
    wrong = np.mean([interval(list(table.mean(1)), 1 - ALPHA).low > 0 for table in found])
    assert wrong > 0.1


def sentences(rng, count, seeds, size, flips, lasting):
    """What two networks say of sentences of two classes: right but for hard ones and flips, of which some last."""
    labels = rng.random((count, 1, size)) < 0.68
    hard = rng.random((count, 1, size)) < 0.12
    both = []
    for _ in range(2):
        same = rng.random((count, 1, size)) < flips * lasting
        own = rng.random((count, seeds, size)) < flips * (1 - lasting)
        both.append(labels ^ hard ^ (same | own))
    return labels[:, 0], *both


def of_sentences(metric, count, seed):
    """How often a lower bound of the difference of two networks that are equal in truth is above 0: 3 seeds, N 400."""
    wrong = []
    for labels, one, other in zip(*sentences(np.random.default_rng(seed), count, 3, 400, 0.03, 0.2), strict=True):
        found = shares(metric, labels, one) - shares(metric, labels, other)
        wrong.append(across(found.mean(), resampled(metric, labels, one, other), 3, 1 - ALPHA).low > 0)
    return np.mean(wrong)


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_the_bounds_of_f1_and_matthews_err_as_often_as_they_say(metric):
    """400 draws leave a standard error of 1.1 points, so the seed of the draws is part of the test."""
    assert 0.03 <= of_sentences(metric, 400, 6) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_the_bounds_of_f1_and_matthews_err_as_often_as_they_say_in_many_draws(metric):
    assert 0.03 <= of_sentences(metric, 4000, 0) <= 0.06


def test_resampling_an_accuracy_would_give_the_parts_of_the_table(monkeypatch):
    """The bootstrap and the analysis of variance are two ways to one number where a metric is a mean."""
    rng = np.random.default_rng(7)
    labels, one, other = (each[0] for each in sentences(rng, 1, 4, 500, 0.1, 0.5))
    monkeypatch.setitem(outcomes.METRICS, "f1", lambda hits, alarms, misses, rejections: (hits + rejections) / 500)
    exact = parts((one == labels).astype(float) - (other == labels))
    drawn = resampled("f1", labels, one, other)
    assert drawn.seeds == pytest.approx(exact.seeds)
    assert drawn.images == pytest.approx(exact.images, rel=0.15)
    assert drawn.rest == pytest.approx(exact.rest, rel=0.1)


def test_looks_spend_the_error_once():
    """Simulated: a claim that is false by nothing, with seeds added while it is open: 3, 6, 12.

    It is decided in error in at most 5 %, where three looks at the whole error each err in more than 8 %.
    """
    assert spending([3, 6, 12]) == pytest.approx([0.25, 0.25, 0.5])
    assert spending([5]) == [1.0]
    values = np.random.default_rng(8).normal(size=(40_000, 12))
    spent = np.zeros(len(values), bool)
    whole = np.zeros(len(values), bool)
    for look, share in zip([3, 6, 12], spending([3, 6, 12]), strict=True):
        seen = values[:, :look]
        ratio = seen.mean(1) / (seen.std(1, ddof=1) / look**0.5)
        spent |= ratio > stats.t.isf(ALPHA * share, look - 1)
        whole |= ratio > stats.t.isf(ALPHA, look - 1)
    assert 0.035 <= spent.mean() <= 0.05
    assert whole.mean() > 0.08
