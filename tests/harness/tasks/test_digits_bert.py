"""The digits as sequences of pixels and the BERT that reads them, trained for an epoch or four instead of fifteen."""

import sys
from dataclasses import replace

import pytest
import torch

from hap.harness.cli import doctor
from hap.harness.spec.functions import Ref
from hap.harness.task import MissingData
from hap.harness.tasks import digits_bert, digits_preresnet
from hap.harness.train import loop as training
from hap.harness.train.loop import generator
from hap.structure.groups import couple
from hap.structure.heads import heads
from hap.structure.tracing import trace

pytest.importorskip("transformers", reason="transformers is not installed: no BERT can be built")

FIRST = 17


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """One epoch, and a cache of its own."""
    monkeypatch.setattr(digits_bert, "RECIPE", replace(digits_bert.RECIPE, epochs=1))
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))


@pytest.fixture
def untrained(monkeypatch):
    """The trainings that would have begun, as (task, recipe)."""
    begun = []

    def none(model, task, recipe, **rest):
        begun.append((task, recipe))
        return training.Curve([], [])

    monkeypatch.setattr(training, "fit", none)
    return begun


def alike(one, other):
    return all(torch.equal(one[name], value) for name, value in other.items())


def test_a_sequence_is_the_pixels_in_order_behind_a_first_token_of_its_own():
    pictures, _ = digits_preresnet.digits()
    for name, tokens in digits_bert._sequences()[0].items():
        images = pictures[name]
        expected = [[FIRST, *(pixel for row in image[0] for pixel in row)] for image in images.pixels.tolist()]
        assert tokens.ids.view(len(images.labels), 65).tolist() == expected
        assert torch.equal(tokens.labels, images.labels)
        assert tokens.lengths.tolist() == [65] * len(images.labels)
        assert int(images.pixels.max()) == FIRST - 1  # no pixel looks like the first token
    assert digits_bert.CONFIG["vocab_size"] == FIRST + 1


def test_splits_and_data_are_those_of_the_convolutional_network(untrained):
    pictures, data = digits_preresnet.digits()
    made = digits_bert.task(0, samples=50, batch=20)
    assert made.data == data == digits_bert.ready(samples=3)
    assert doctor.ready(Ref(use="hap.harness.tasks.digits_bert:task"), 0) == data
    for which in ("validation", "test"):
        images, seen = pictures[which], []
        for inputs in torch.split(images.pixels.flatten(1).long(), 100):
            ids = torch.cat([torch.full((len(inputs), 1), FIRST), inputs], 1)
            seen.append(made.model(input_ids=ids).logits.detach())
        logits, found = torch.cat(seen), made.evaluate(made.model, which)
        assert found.keys() == {"accuracy", "loss"}
        assert found["accuracy"] == 100 * float((logits.argmax(1) == images.labels).double().mean())
        loss = torch.nn.functional.cross_entropy(logits, images.labels)
        assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    known = {tuple(image) for image in pictures["train"].pixels.flatten(1).tolist()}
    assert [len(labels) for _, labels in made.batches] == [20, 20, 10]
    shown = [tuple(ids[1:]) for inputs, _ in made.batches for ids in inputs["input_ids"].tolist()]
    assert set(shown) <= known
    assert made.train_size == sum(len(labels) for _, labels in made.train(32, generator(0))) == 1077


def test_the_network_has_two_layers_of_eight_heads(untrained):
    made = digits_bert.task(0)
    assert [layer.attention.self.num_attention_heads for layer in made.model.bert.encoder.layer] == [8, 8]
    groups = couple(made.model, trace(made.model, made.example, call=made.loss.call), "union")
    assert len(heads(groups)) == 16
    assert made.example["input_ids"].shape == (1, 65)
    assert (made.name, made.metric, made.threads) == ("digits_bert", "accuracy", 1)
    ((_, recipe),) = untrained
    assert (recipe.optimiser, recipe.schedule, recipe.batch_size, recipe.clip) == ("adamw", "cosine", 32, 1.0)


def test_the_network_learns(monkeypatch):
    monkeypatch.setattr(digits_bert, "RECIPE", replace(digits_bert.RECIPE, epochs=4))
    made = digits_bert.task(0)
    assert made.evaluate(made.model, "test")["accuracy"] > 40  # of ten classes; 62 here


def test_the_network_is_the_seeds_alone(tmp_path, monkeypatch):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("HAP_CACHE", str(tmp_path / str(number)))
        torch.manual_seed(number)
        before = torch.get_rng_state()
        made = digits_bert.task(seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert not made.model.training
        found.append((made.model.state_dict(), made.batches, made.evaluate(made.model, "test")))
    (weights, batches, reached), again, other = found
    assert alike(weights, again[0])
    assert reached == again[2]
    assert all(torch.equal(a[0]["input_ids"], b[0]["input_ids"]) for a, b in zip(batches, again[1], strict=True))
    assert not alike(weights, other[0])
    assert not torch.equal(batches[0][0]["input_ids"], other[1][0][0]["input_ids"])


def test_trained_weights_are_kept_and_the_recipe_names_them(tmp_path, monkeypatch):
    weights = digits_bert.task(0).model.state_dict()
    assert len(list(tmp_path.glob("digits_bert-seed0-*.safetensors"))) == 1
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained although the weights are there"))
    made = digits_bert.task(0, samples=10, batch=5)
    assert alike(weights, made.model.state_dict())
    assert not made.model.training
    for changed in ({"RECIPE": replace(digits_bert.RECIPE, lr=1e-3)}, {"CONFIG": {**digits_bert.CONFIG, "x": 1}}):
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(digits_bert, name, value)
            with pytest.raises(pytest.fail.Exception, match="trained although"):
                digits_bert.task(0)


def test_a_smoke_run_takes_few_digits_and_one_epoch(untrained, monkeypatch):
    monkeypatch.setattr(digits_bert, "RECIPE", replace(digits_bert.RECIPE, epochs=9))
    made = digits_bert.task(0, smoke=True)
    digits_bert.task(0)
    (learner, recipe), (_, whole) = untrained
    assert (recipe, whole.epochs) == (replace(whole, epochs=1), 9)
    sizes = digits_bert.encoder.SMOKE
    assert learner.train_size == made.train_size == sizes["train"]
    assert sum(len(labels) for _, labels in made.batches) == sizes["calibration"]
    images = digits_preresnet.digits()[0]["train"]
    shown = torch.cat([inputs["input_ids"] for inputs, _ in made.train(32, generator(0))])[:, 1:]
    first = images.pixels[: sizes["train"]].flatten(1).long()
    assert sorted(shown.tolist()) == sorted(first.tolist())


def test_without_transformers_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingData, match=r"transformers is not installed: python -m pip install 'hap\[heads\]'"):
        digits_bert.task(0)
