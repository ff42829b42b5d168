import math
from dataclasses import replace

import pytest
from fakes import fake_run, with_accuracy, write_spec

from hap.harness.judge import Outcome, bounds, describe, judge, value
from hap.harness.spec import Claim, load_spec

HOLDS, FAILS, UNDECIDED, ABSENT = Outcome


@pytest.fixture
def case(tmp_path):
    return load_spec(write_spec(tmp_path)).cases["hap"]


@pytest.fixture
def spread(case):
    """Runs with these selected accuracies, a seed each; losses that differ unless told otherwise."""

    def make(*accuracies, loss=None, dense=95.0):
        runs = [with_accuracy(fake_run(case, seed), "selected", a, loss) for seed, a in enumerate(accuracies)]
        return [with_accuracy(run, "dense", dense) for run in runs]

    return make


def claim(**changes):
    given = {"text": "t", "source": "s", "case": "hap", "metric": "accuracy", "op": ">=", "value": 94.0}
    return Claim(**{**given, **changes})


def test_bounds_are_those_of_student_by_hand():
    """93, 94, 95: s = 1, t(0.95, 2) = 2.919986, so the half width is 2.919986 / sqrt(3) = 1.685854."""
    mean, low, high = bounds([93.0, 94.0, 95.0], 0.95)
    assert (mean, low, high) == pytest.approx((94.0, 92.314146, 95.685854), abs=1e-6)


def test_bounds_at_another_confidence_by_hand():
    """Two values, 1 and 3: s = sqrt(2), t(0.9, 1) = 3.077684, half width 3.077684."""
    assert bounds([1.0, 3.0], 0.9) == pytest.approx((2.0, -1.077684, 5.077684), abs=1e-6)


# accuracies 93, 94, 95 have the bounds 92.314 and 95.686
@pytest.mark.parametrize(
    ("op", "claimed", "tolerance", "outcome"),
    [
        (">=", 92.3, 0.0, HOLDS),
        (">=", 92.4, 0.0, UNDECIDED),
        (">=", 92.4, 0.1, HOLDS),
        (">=", 95.6, 0.0, UNDECIDED),
        (">=", 95.7, 0.0, FAILS),
        (">=", 95.7, 0.1, UNDECIDED),
        ("<=", 95.7, 0.0, HOLDS),
        ("<=", 95.6, 0.0, UNDECIDED),
        ("<=", 95.6, 0.1, HOLDS),
        ("<=", 92.4, 0.0, UNDECIDED),
        ("<=", 92.3, 0.0, FAILS),
        ("<=", 92.3, 0.1, UNDECIDED),
        ("==", 94.0, 1.7, HOLDS),
        ("==", 94.0, 1.6, UNDECIDED),
        ("==", 94.5, 1.7, UNDECIDED),
        ("==", 96.0, 0.3, FAILS),
        ("==", 96.0, 0.4, UNDECIDED),
        ("==", 92.0, 0.3, FAILS),
    ],
)
def test_the_outcome_follows_from_the_bounds(spread, op, claimed, tolerance, outcome):
    verdict = judge(claim(op=op, value=claimed, tolerance=tolerance), {"hap": spread(93.0, 94.0, 95.0)})
    assert verdict.outcome is outcome
    assert (verdict.observed, verdict.low, verdict.high) == pytest.approx((94.0, 92.314146, 95.685854), abs=1e-6)
    assert verdict.seeds == (0, 1, 2)
    assert verdict.reason == ("the interval crosses the bound" if outcome is UNDECIDED else "")


def test_the_confidence_of_the_claim_counts(spread):
    runs = {"hap": spread(93.0, 94.0, 95.0)}
    assert judge(claim(value=92.4), runs).outcome is UNDECIDED
    assert judge(claim(value=92.4, confidence=0.9), runs).outcome is HOLDS  # t(0.9, 2) = 1.886: low = 92.911


def test_against_is_paired_by_seed(spread, case):
    """The cases vary by 5 points from seed to seed, their difference by 0.1: only pairing sees it."""
    runs = {"hap": spread(85.0, 90.0, 95.0), "random": list(reversed(spread(84.0, 89.1, 93.9)))}
    verdict = judge(claim(against="random", value=0.5), runs)
    assert verdict.outcome is HOLDS
    assert verdict.observed == pytest.approx(1.0)
    assert verdict.low == pytest.approx(1 - 2.919986 * 0.1 / math.sqrt(3), abs=1e-6)
    assert "accuracy selected of hap - random >= 0.5" in verdict.line


@pytest.mark.parametrize(
    ("mine", "theirs", "seeds", "reason"),
    [
        ((), (), None, "no evidence"),
        ((94.0,), (), None, "no evidence for seed 0"),
        ((94.0, 94.1), (94.0, 94.2), (0, 1, 2), "no evidence for seed 2"),
        ((94.0, 94.1, 94.2), (94.0,), None, "no evidence for seed 1, 2"),
    ],
)
def test_a_seed_without_evidence_makes_a_claim_absent(spread, mine, theirs, seeds, reason):
    verdict = judge(claim(against="random"), {"hap": spread(*mine), "random": spread(*theirs)}, seeds)
    assert (verdict.outcome, verdict.reason, verdict.observed) == (ABSENT, reason, None)
    assert "claimed accuracy" in verdict.line


def test_seeds_that_the_spec_does_not_name_do_not_count(spread):
    verdict = judge(claim(value=93.0), {"hap": spread(94.0, 94.1, 50.0)}, (0, 1))
    assert (verdict.outcome, verdict.seeds) == (HOLDS, (0, 1))


def test_one_seed_decides_nothing_that_has_chance_in_it(spread):
    for value_ in (50.0, 99.0):
        verdict = judge(claim(value=value_), {"hap": spread(94.0)})
        assert (verdict.outcome, verdict.reason) == (UNDECIDED, "one seed says nothing of the spread")
        assert verdict.observed == 94.0


@pytest.mark.parametrize(("op", "claimed", "outcome"), [(">=", 70.0, HOLDS), ("==", 72.0, HOLDS), (">=", 73.0, FAILS)])
def test_one_seed_decides_what_is_counted(case, op, claimed, outcome):
    verdict = judge(claim(metric="params_pruned", op=op, value=claimed), {"hap": [fake_run(case, 0)]})
    assert verdict.outcome is outcome
    assert verdict.observed == pytest.approx(72.0)


def test_one_seed_decides_no_speed(case):
    assert judge(claim(metric="speedup", value=1.0), {"hap": [fake_run(case, 0)]}).outcome is UNDECIDED


def test_the_dense_accuracy_of_a_checkpoint_is_certain_over_seeds(spread):
    exact = claim(stage="dense", op="==", value=95.0, tolerance=0.05)
    assert judge(exact, {"hap": spread(94.0, 94.5)}).outcome is HOLDS
    assert judge(exact, {"hap": spread(94.0, 94.5, dense=94.9)}).outcome is FAILS
    assert judge(exact, {"hap": spread(94.0)}).outcome is UNDECIDED


def test_equal_accuracies_of_different_models_are_luck(spread):
    lucky = spread(94.0, 94.0)
    lucky[1] = with_accuracy(lucky[1], "selected", 94.0, 0.2)
    verdict = judge(claim(), {"hap": lucky})
    assert (verdict.outcome, verdict.reason) == (UNDECIDED, "equal by chance: the spread is not known")
    assert judge(claim(), {"hap": spread(94.0, 94.0, loss=0.1)}).outcome is HOLDS
    assert judge(claim(metric="drop", op="<=", value=1.0), {"hap": lucky}).outcome is UNDECIDED


def test_a_number_that_is_none_decides_nothing(spread):
    verdict = judge(claim(metric="loss", op="<=", value=1.0), {"hap": spread(94.0, 94.1, loss=math.nan)})
    assert (verdict.outcome, verdict.reason) == (UNDECIDED, "seed 0 is not a finite number")


@pytest.mark.parametrize(
    ("metric", "stage", "expected"),
    [
        ("accuracy", "selected", 94.2),
        ("accuracy", "one_shot", 62.0),
        ("accuracy", "best_test_epoch", 94.7),
        ("loss", "last", 0.06),
        ("drop", "selected", 0.8),
        ("drop", "one_shot", 33.0),
        ("params_pruned", "selected", 72.0),
        ("macs_pruned", "selected", 60.0),
        ("speedup", "selected", 2.0),
    ],
)
def test_the_number_of_a_run(case, metric, stage, expected):
    assert value(fake_run(case, 2), claim(metric=metric, stage=stage)) == pytest.approx(expected)


def test_a_verdict_is_one_line_a_person_can_read(spread):
    verdict = judge(claim(value=92.4, tolerance=0.1), {"hap": spread(93.0, 94.0, 95.0)})
    assert verdict.line == (
        "HOLDS: t [s]: observed 94 (92.31 to 95.69) over 3 seeds, claimed accuracy selected of hap >= 92.4 ± 0.1"
    )
    assert describe(claim(metric="params_pruned")) == "params_pruned of hap >= 94"


@pytest.mark.parametrize(
    ("claimed", "known", "surprising"),
    [(90, None, False), (99, None, True), (90, "w", True), (99, "w", False), (94, "w", False)],
)
def test_a_surprise_is_a_failure_or_a_known_one_that_holds(spread, claimed, known, surprising):
    verdict = judge(claim(value=claimed, known=known), {"hap": spread(93.0, 94.0, 95.0)})
    assert verdict.surprising is surprising


def test_a_ranking_is_judged_by_its_spread_and_is_never_certain(case):
    runs = [replace(r, metrics={**r.metrics, "ranking": {"spearman": v, "overlap": 0.5}})
            for r, v in ((fake_run(case, seed), 0.2 + seed / 100) for seed in range(3))]  # fmt: skip
    made = claim(metric="spearman", op="<=", value=0.3)
    verdict = judge(made, {"hap": runs})
    assert (verdict.outcome, verdict.observed) == (HOLDS, pytest.approx(0.21))
    assert describe(made) == "spearman of hap <= 0.3"
    assert judge(claim(metric="overlap", value=0.4), {"hap": runs}).outcome is UNDECIDED  # equal, but by chance
