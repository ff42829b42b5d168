from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from test_history import ROW

from hap.harness.nightly import changepoint as detect
from hap.harness.nightly import regressions
from hap.harness.nightly.history import Accepted
from hap.harness.nightly.regressions import KINDS, RATE, junit, markdown, watch


def rows(night, values, metric="accuracy", case="hap", spec="digits", **changes):
    """Of one night: a row a seed, or one without a seed."""
    seeds = [None] if len(values) == 1 else range(len(values))
    fixed = {"night": f"n{night}", "metric": metric, "case": case, "spec": spec, "commit": f"{night:040x}"[::-1]}
    return [replace(ROW, **fixed, seed=s, value=float(v), **changes) for s, v in zip(seeds, values, strict=True)]


def nights(levels, spread, seeds=3, rng=None, **changes):
    rng = rng or np.random.default_rng(0)
    return [row for i, x in enumerate(levels) for row in rows(i, rng.normal(x, spread, seeds), **changes)]


def timings(levels, spread=0.04, **changes):
    rng = np.random.default_rng(1)
    return [
        row for i, x in enumerate(levels) for row in rows(i, [x * np.exp(rng.normal(0, spread))], "ratio", **changes)
    ]


def test_one_percent_lower_accuracy_is_found_within_two_nights():
    """Alone, with a spread of 0.4 points over three seeds."""
    levels = [97.5] * 20 + [96.5] * 2
    (found,) = watch(nights(levels, 0.4))
    assert found.worse
    assert found.line.startswith("digits/hap/accuracy/selected: 97.")
    assert found.since.name == "n20"
    assert found.last_good.name == "n19"
    assert f"since {found.since.commit} (night n20; before it {found.last_good.commit}), p = " in found.line
    assert found.before == pytest.approx(97.5, abs=0.2)
    assert found.after == pytest.approx(96.5, abs=0.4)


@pytest.mark.slow
def test_one_percent_lower_accuracy_is_found_among_as_many_series_as_a_night_of_digits_has():
    """With the same spread, in 8 of 10 histories within three nights, though all 52 series are one family."""
    found = 0
    for history in range(10):
        rng = np.random.default_rng(history)
        bad = nights([97.5] * 20 + [96.5] * 3, 0.4, rng=rng)
        others = [row for i in range(51) for row in nights([97.5] * 23, 0.4, rng=rng, case=f"case {i}")]
        worse = [each for each in watch([*bad, *others]) if each.worse]
        assert [each.series.case for each in worse] in (["hap"], [])
        found += bool(worse)
    assert found >= 8


def test_the_summary_says_which_fall_would_be_told_and_that_fall_is():
    """The oracle plants a fall of just more and of just less than what is said to be visible."""
    history = nights([97.5] * 20, 0.4)
    (known,) = watch(history)
    means = np.array([[row.value for row in history if row.night == f"n{i}"] for i in range(20)]).mean(1)
    for factor, told in ((1.01, True), (0.99, False)):
        step = detect.step(np.append(means, means.mean() - factor * known.visible), KINDS["accuracy"].floor)
        assert (step.p <= RATE / known.asked) is told
    text = markdown([known], [], "n19")
    assert f"told on its first night: {known.visible:.2g} points in the median series" in text
    (ratio,) = watch(timings([2.0] * 15))
    assert ratio.visible is None
    assert "first night" not in markdown([ratio], [], "n14")


def test_a_kernel_30_percent_slower_is_found_on_the_second_night():
    levels = [2.0] * 15 + [2.6] * 2
    history = timings(levels)
    (found,) = watch(history)
    assert found.worse
    assert found.since.name == "n15"
    assert found.line.startswith("digits/hap/ratio/selected: 2.0")
    assert "(+3" in found.line or "(+2" in found.line
    (alone,) = watch(history[:-1])  # one slow night may be a busy machine
    assert not alone.worse


def test_a_slower_machine_is_another_series_and_no_regression():
    slow = {**ROW.machine, "cpu": "a slow one"}
    history = timings([2.0] * 15) + timings([2.6] * 5, machine=slow)[-5:]
    history = [*history[:15], *(replace(row, night=f"m{i}") for i, row in enumerate(history[15:]))]
    (found,) = watch(history)
    assert (found.nights, found.worse) == (5, False)


def test_a_sign_error_is_found_in_one_night_although_the_history_is_short():
    levels = [60.0] * 5 + [10.0]
    (found,) = watch(nights(levels, 3.0))
    assert found.worse
    assert (found.since.name, found.last_good.name) == ("n5", "n4")
    assert "torch" not in found.line


def test_a_new_torch_is_named_where_it_came_with_the_step():
    history = nights([60.0] * 5 + [10.0], 3.0)
    history = [replace(row, machine={**row.machine, "torch": "2.16"}) if row.night == "n5" else row for row in history]
    (found,) = watch(history)
    assert ", torch 2.16 (before it 2.15.0), p = " in found.line


@pytest.mark.parametrize(("metric", "before", "after"), [("loss", 0.05, 0.09), ("drop", 0.5, 2.5), ("overlap", 1, 0.8)])
def test_each_metric_has_a_worse_way(metric, before, after):
    worse = nights([before] * 12 + [after] * 3, 0.01 * before, metric=metric)
    better = nights([after] * 12 + [before] * 3, 0.01 * before, metric=metric)
    assert [each.worse for each in watch(worse)] == [True]
    assert [each.worse for each in watch(better)] == [False]


def test_every_metric_of_a_history_is_compared():
    from typing import get_args, get_type_hints

    from hap.harness.nightly.history import Row

    assert set(KINDS) == {
        name for each in get_args(get_type_hints(Row)["metric"]) for name in (get_args(each) or [each])
    }


def test_a_change_too_small_to_matter_is_none():
    (found,) = watch(nights([97.5] * 40 + [97.35] * 40, 0.05))
    assert found.p < RATE
    assert not found.worse


def test_numbers_that_never_move_are_compared_too():
    (found,) = watch(nights([72.0] * 9, 0, metric="params_pruned"))
    assert not found.worse
    (found,) = watch(nights([72.0] * 9 + [60.0], 0, metric="params_pruned"))
    assert found.worse


def test_an_accepted_change_is_compared_with_no_more():
    before, after = nights([97.5] * 9, 0.3), nights([97.5] * 9 + [92.5] * 9, 0.3)[27:]
    assert watch([*before, *after])[0].worse
    accepted = Accepted(accepted="digits/hap/accuracy/selected", why="fewer epochs")
    (found,) = watch([*before, accepted, *after])
    assert (found.nights, found.worse) == (9, False)


def test_only_what_the_last_night_measured_is_judged():
    history = nights([97.5] * 9 + [90.0], 0.3)
    history += rows(10, [1.0], "ratio", spec="speed")
    assert [each.series.spec for each in watch(history)] == ["speed"]
    assert watch([]) == []


def test_the_questions_of_a_night_are_one_family():
    """The same step among others that are quiet has a larger p."""
    alone = watch(nights([97.5] * 9 + [96.0] * 2, 0.4))[0].p
    rng = np.random.default_rng(5)
    quiet = [row for case in range(30) for row in nights([97.5] * 11, 0.4, rng=rng, case=f"c{case}")]
    found = watch([*quiet, *nights([97.5] * 9 + [96.0] * 2, 0.4)])
    assert found[0].series.case == "hap"
    assert sum(each.asked for each in found) == 62
    assert found[0].p == pytest.approx(62 / 2 * alone, rel=0.04)


NOISE = {
    "normal": lambda rng, shape: rng.normal(97, 0.5, shape),
    "counts of 450 images": lambda rng, shape: rng.binomial(450, 0.975, shape) / 4.5,
    "timings with heavy tails": lambda rng, shape: 0.05 * rng.standard_t(4, shape),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "seeds"), [("normal", 3), ("counts of 450 images", 3), ("timings with heavy tails", 1)]
)
def test_50_nights_of_pure_noise_raise_no_more_alarms_than_stated(noise, seeds):
    """100 histories of 50 nights and 8 series. Holm's procedure rejects anything where the least p is at most RATE / m.

    What the loop says is compared with `watch` itself in the next test.
    """
    histories, series, length = 100, 8, 50
    values = NOISE[noise](np.random.default_rng(0), (histories * series, length, seeds))
    floor = KINDS["accuracy" if seeds > 1 else "ratio"].floor
    alarms = np.zeros((histories, length), dtype=bool)
    for night in range(4, length + 1):
        least, asked = least_p(values[:, :night], floor)
        alarms[:, night - 1] = least.reshape(histories, series).min(1) <= RATE / (asked * series)
    assert alarms.mean() <= RATE


def least_p(values, floor):
    """Of each series the least p of its questions, and how many there are."""
    means, seeds = values.mean(-1), values.shape[-1]
    shortest, least = (1 if seeds > 1 else 2), np.ones(len(values))
    asked = int(means.shape[1] >= 2 + shortest)
    begins = detect.fit(means, floor)
    for row in np.flatnonzero(begins[:, -1]):
        found = detect.step(means[row], floor, shortest, begins[row])
        least[row] = 1.0 if found is None else found.p
    flat, new = values.reshape(len(values), -1), seeds if seeds > 1 else 3
    if flat.shape[1] >= 3 * new:
        asked += 1
        p = detect.reference(flat[:, -3 * new : -new], flat[:, -new:], floor)
        least = np.minimum(least, p)
    return least, asked


def test_the_simulation_asks_what_is_asked_of_a_history():
    rng = np.random.default_rng(7)
    values = rng.normal(97, 0.5, (4, 12, 3))
    values[2, 8:] -= 1.2
    history = [
        row for i in range(12) for case in range(4) for row in rows(i, values[case, i], case=f"c{case}")
    ]  # fmt: skip
    answers = {
        each.case: regressions._asked(each, found) for each, found in regressions.history.series(history).items()
    }
    least, asked = least_p(values, KINDS["accuracy"].floor)
    assert [min(p for p, _ in answers[f"c{case}"]) for case in range(4)] == pytest.approx(list(least))
    assert {len(each) for each in answers.values()} == {asked}


def test_the_summary_and_the_junit_say_the_same():
    history = nights([97.5] * 9 + [90.0], 0.3) + nights([97.5] * 10, 0.3, case="a|b <c>", rng=np.random.default_rng(3))
    history += rows(9, [1.0], "ratio", spec="speed", case="matmul")
    found = watch(history)
    text = markdown(found, ["left out: x | y"], "n9")
    assert text.startswith("# Night n9\n\n1 regression in 3 series.\n")
    row = next(line for line in text.splitlines() if line.startswith("| digits/hap/accuracy"))
    assert row.startswith("| digits/hap/accuracy/selected | 97.")
    assert "at most 1 % of nights raise any false alarm" in text
    assert "1 of the series have too few nights" in text
    assert "- left out: x \\| y\n" in text
    suite = ElementTree.fromstring(junit(found, [("digits hap seed 3", "Traceback\n  x\nHapError: gone\x00")], "n9"))
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "1",
    }  # fmt: skip
    cases = {case.get("name"): case for case in suite}
    failure = cases["digits/hap/accuracy/selected"].find("failure")
    assert failure.get("message") == found[0].line
    values = {each.get("name"): each.get("value") for each in cases["digits/hap/accuracy/selected"].iter("property")}
    assert values.keys() == {"before", "after", "p", "nights", "since", "machine", "visible"}
    assert float(values["after"]) == pytest.approx(found[0].after, rel=1e-4)
    assert cases["digits hap seed 3"].find("error").get("message") == "HapError: gone"
    assert cases["speed/matmul/ratio/selected"].find("skipped") is not None
