import pytest
from fakes import SPEC, fake_run, with_accuracy, write_spec

from hap.harness.spec.spec import load_spec
from hap.harness.verdicts.looks import pending

LOOKS = SPEC.replace("seeds = [0, 1, 2]", "seeds = {looks = [3, 6, 12]}")


@pytest.fixture
def spec(tmp_path):
    return load_spec(write_spec(tmp_path, LOOKS))


def runs(spec, seeds, gaps, removed=0.72):
    """Records whose second claim is about these differences of accuracy."""
    both = {name: [fake_run(spec.cases[name], seed) for seed in range(seeds)] for name in ("hap", "random")}
    for seed in range(seeds):
        both["hap"][seed] = with_accuracy(both["hap"][seed], "selected", 94.0 + gaps[seed % len(gaps)], 0.1 + seed / 99)
        both["random"][seed] = with_accuracy(both["random"][seed], "selected", 94.0, 0.2 + seed / 99)
    return both


def test_without_evidence_the_first_look_is_made(spec):
    wanted = pending(spec, {})
    assert wanted == [(case, seed) for case in ("hap", "random") for seed in range(3)]
    some = {"hap": [fake_run(spec.cases["hap"], 1)]}
    assert pending(spec, some) == [pair for pair in wanted if pair != ("hap", 1)]


def test_an_open_claim_takes_the_next_look_of_its_cases_and_no_more(spec):
    wide = runs(spec, 3, [-2.0, 0.0, 2.0])
    assert pending(spec, wide) == [(case, seed) for case in ("hap", "random") for seed in range(3, 6)]
    six = runs(spec, 6, [-2.0, 0.0, 2.0])
    assert pending(spec, six) == [(case, seed) for case in ("hap", "random") for seed in range(6, 12)]


def test_a_decided_claim_takes_none_and_the_last_look_is_the_last(spec):
    assert pending(spec, runs(spec, 3, [1.0, 1.1, 1.2])) == []
    assert pending(spec, runs(spec, 12, [-2.0, 0.0, 2.0])) == []


def test_one_look_has_no_next(tmp_path):
    spec = load_spec(write_spec(tmp_path))
    assert pending(spec, runs(spec, 3, [-2.0, 0.0, 2.0])) == []
    assert len(pending(spec, {})) == 6
