import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from fakes import fake_run, write_spec
from sklearn.metrics import f1_score, matthews_corrcoef

from hap import HapError
from hap.harness.records import outcomes, store
from hap.harness.records.outcomes import Said, attached, detached, differing, packed, right, said, shares
from hap.harness.run import answers as answers_of
from hap.harness.run import run as run_case
from hap.harness.spec.spec import load_spec

TWO, TEN = {"dense": {"accuracy": 90.0, "f1": 80.0}}, {"dense": {"accuracy": 90.0}}  # what says how many classes


def answers(size, classes=2, share=0.9, seed=0):
    """What networks said at three stages, right of a share of the samples."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size)
    wrong = {stage: rng.random(size) > share for stage in outcomes.STAGES}
    return {stage: Said((labels + miss) % classes, labels) for stage, miss in wrong.items()}


@pytest.fixture
def run(tmp_path):
    """A record of the tests' spec, with bits of 1,003 samples and the metrics that follow."""
    case = load_spec(write_spec(tmp_path)).cases["hap"]
    answered = answers(1003)
    made = fake_run(case, 0)
    metrics = {stage: {"loss": 0.1, **metrics_of(each)} for stage, each in answered.items()}
    return replace(made, metrics=made.metrics | metrics, outcomes=packed(answered, TWO))


def metrics_of(answer):
    """By scikit-learn, in percent."""
    pair = answer.labels, answer.classes
    right = 100 * float(np.mean(answer.labels == answer.classes))
    return {"accuracy": right, "f1": 100 * f1_score(*pair), "matthews": 100 * matthews_corrcoef(*pair)}


@pytest.mark.parametrize("size", [1, 8, 450, 1003])
def test_bits_come_back_as_they_were(size):
    answered = answers(size, classes=10)
    kept = json.loads(json.dumps(packed(answered, TEN)))
    for stage, each in answered.items():
        assert (right(kept, stage) == (each.classes == each.labels)).all()
        assert said(kept, stage) is None
    assert right(kept, "last") is None
    assert right({}, "dense") is None


def test_of_two_classes_what_was_said_comes_back_too():
    answered = answers(333)
    kept = packed(answered, TWO)
    for stage, each in answered.items():
        classes, labels = said(kept, stage)
        assert (classes == each.classes.astype(bool)).all()
        assert (labels == each.labels.astype(bool)).all()
        assert (right(kept, stage) == (each.classes == each.labels)).all()


def test_metrics_are_those_of_scikit_learn_also_of_samples_drawn_again():
    answered = answers(200, share=0.7)["dense"]
    labels, classes = answered.labels.astype(bool), answered.classes.astype(bool)
    weights = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), 5).astype(float)
    for name, oracle in (("f1", f1_score), ("matthews", matthews_corrcoef)):
        assert shares(name, labels, classes[None])[0] == pytest.approx(oracle(labels, classes))
        drawn = shares(name, labels, classes[None], weights)[:, 0]
        assert drawn == pytest.approx([oracle(labels, classes, sample_weight=each) for each in weights])
        assert shares(name, labels, np.zeros((1, 200), bool))[0] == 0


def test_a_record_of_ten_thousand_images_grows_by_less_than_8_kb(tmp_path):
    kept = packed(answers(10_000, classes=10), TEN)
    assert len(json.dumps(detached(kept, tmp_path), indent=1)) < 8000
    with_predictions = packed(answers(10_000), TWO)
    assert len(json.dumps(detached(with_predictions, tmp_path), indent=1)) < 8000
    (file,) = [each for each in (tmp_path / "bits").iterdir() if each.read_text().strip() == kept["dense"]]
    detached(kept, tmp_path)
    assert file.stat().st_size < 2000


def test_a_record_is_read_as_it_was_kept_and_has_the_dense_bits_once(run, tmp_path):
    file = store.save(run, tmp_path)
    assert store.load(file) == run
    store.save(replace(run, seed=1), tmp_path)
    assert len(list((tmp_path / run.spec / "bits").iterdir())) == 2  # the dense network's, and the labels
    told = json.loads(file.read_text())["outcomes"]
    assert len(told["dense"]) == len(told["labels"]) == 64
    assert told["one_shot"] == run.outcomes["one_shot"]


def test_a_record_of_before_there_were_bits_reads(run, tmp_path):
    file = store.save(replace(run, outcomes={}), tmp_path)
    table = json.loads(file.read_text())
    del table["outcomes"]
    file.write_text(json.dumps(table))
    assert store.load(file).outcomes == {}
    assert list(differing({}, run.metrics)) == []


@pytest.mark.parametrize(
    ("part", "to", "rule"),
    [
        ("dense", "0" * 64, "must be readable"),
        ("dense", "../seed0", "must be the sha256 of a file of bits"),
        ("one_shot", "AAAA", "must be 1003 bits"),
        ("one_shot", "no base64!", "must be base64"),
        ("samples", 0, "must be a number of samples"),
    ],
)
def test_damaged_bits_are_told_in_one_line(run, tmp_path, part, to, rule):
    file = store.save(run, tmp_path)
    table = json.loads(file.read_text())
    table["outcomes"][part] = to
    file.write_text(json.dumps(table))
    with pytest.raises(HapError, match=rule) as told:
        store.load(file)
    assert str(told.value).count("\n") == 0


def test_a_flipped_bit_of_the_dense_network_is_seen(run, tmp_path):
    store.save(run, tmp_path)
    for file in (tmp_path / run.spec / "bits").iterdir():
        file.write_text(file.read_text().swapcase())
    with pytest.raises(HapError, match="the sha256 of"):
        attached(json.loads(json.dumps(detached(run.outcomes, tmp_path / run.spec))), tmp_path / run.spec)


@pytest.mark.parametrize("stage", outcomes.STAGES)
@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_numbers_that_do_not_follow_from_the_bits_are_told(run, stage, metric):
    assert list(differing(run.outcomes, run.metrics)) == []
    edited = {**run.metrics, stage: {**run.metrics[stage], metric: run.metrics[stage][metric] + 0.01}}
    ((rule, found),) = differing(run.outcomes, edited)
    assert rule.startswith(f"{stage} {metric} must be that of its bits")
    assert found == edited[stage][metric]


def test_a_run_says_which_samples_were_right_and_its_numbers_follow(tmp_path):
    case = load_spec(write_spec(tmp_path, tiny.SPEC)).cases["hap@50"]
    record = run_case(case, 0)
    assert record.outcomes["samples"] == 450
    assert record.outcomes.keys() == {"samples", *outcomes.STAGES}
    assert list(differing(record.outcomes, record.metrics)) == []
    assert right(record.outcomes, "selected").sum() == round(4.5 * record.metrics["selected"]["accuracy"])


def test_a_task_that_does_not_tell_has_no_bits():
    task = replace(tiny.task(0), evaluate=lambda model, split: {"accuracy": 50.0, "loss": 0.1})
    told = answers_of(task, task.model)
    assert (told.metrics["accuracy"], told.said) == (50.0, None)
