"""The CIFAR-10 workloads on random images and untrained weights: what they read, train on, keep and remember."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from hap import HapError
from hap.cost import params
from hap.harness.cli import doctor
from hap.harness.spec.functions import Ref, resolve
from hap.harness.tasks import cifar10, cifar10_resnet20, cifar10_resnet32, cifar10_resnet56, cifar10_scratch, data
from hap.harness.tasks.nets import resnet
from hap.harness.train import loop as training

PUBLISHED = {"preresnet29": 2_235_850, "resnet56b": 855_770, "wideresnet32": 7_427_914, "vgg16": 14_719_818}
FAST = {"train": 12, "validation": 4, "test": 8, "calibration": 10}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def module(name):
    return import_module(f"hap.harness.tasks.cifar10_{name}")


@pytest.fixture
def folder(fakedata, tmp_path, monkeypatch):
    """Where trained weights go; the fake data is found, and a smoke run takes few images."""
    monkeypatch.setenv("HAP_DATA", str(fakedata))
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))
    monkeypatch.setattr(cifar10_scratch, "SMOKE", FAST)
    monkeypatch.setattr(cifar10, "SMOKE", FAST)
    return tmp_path


@pytest.fixture
def fits(monkeypatch):
    """The trainings that were begun, as (task, recipe)."""
    begun, fit = [], training.fit

    def counted(model, task, recipe, **rest):
        begun.append((task, recipe))
        return fit(model, task, recipe, **rest)

    monkeypatch.setattr(training, "fit", counted)
    return begun


@pytest.fixture
def untrained(monkeypatch):
    """The trainings that would have begun, as (task, recipe); the weights stay as they were drawn."""
    begun = []

    def none(model, task, recipe, **rest):
        begun.append((task, recipe))
        model.train()
        return training.Curve([], [training.snapshot(model)])

    monkeypatch.setattr(training, "fit", none)
    return begun


def tiny(seed=0, *, smoke=True, **options):
    """The smallest network, trained by the published recipe."""
    return cifar10_scratch.trained("tiny", partial(resnet, 8, (2, 4, 8), "B"), seed, smoke=smoke, **options)


def normalised(pixels, mean=MEAN, std=STD):
    return (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def among(images, pixels):
    """Which of the batches' images are among these pixels."""
    known = {tuple(row) for row in normalised(pixels).flatten(1)[:, :40].tolist()}
    shown = torch.cat([inputs for inputs, _ in images]).flatten(1)[:, :40].tolist()
    return [any(max(abs(a - b) for a, b in zip(row, other, strict=True)) < 1e-5 for other in known) for row in shown]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_of_the_paper_goes_through_its_training(name, folder, fits):
    made = module(name).task(0, smoke=True, images=8)
    assert made.name == f"cifar10_{name}"
    assert params(made.model) == PUBLISHED[name]
    ((learner, recipe),) = fits
    assert recipe == training.Recipe(1, 0.1, weight_decay=2e-4, batch_size=128, schedule="step")
    assert learner.train_size == made.train_size == FAST["train"]
    assert made.evaluate(made.model, "test")["loss"] > 0
    assert not made.model.training
    assert len(list(folder.glob(f"cifar10_{name}-seed0-*.safetensors"))) == 1
    resolve("task", "task", Ref(use=f"hap.harness.tasks.cifar10_{name}:task", options={"epochs": 3, "held_out": 0}))


def test_the_published_recipe_is_the_default(folder, untrained):
    made = tiny(smoke=False)
    ((learner, recipe),) = untrained
    assert recipe == training.Recipe(200, 0.1, momentum=0.9, weight_decay=2e-4, batch_size=128, schedule="step")
    assert learner.train_size == made.train_size == 45_000
    assert not made.model.training


def test_weights_are_drawn_by_the_seed(folder, untrained):
    for seed in (0, 1):
        expected = resnet(8, (2, 4, 8), "B", rng=training.generator(seed, "init")).state_dict()
        assert all(torch.equal(expected[name], value) for name, value in tiny(seed).model.state_dict().items())


def test_all_images_are_trained_on_where_none_is_held_out(folder, untrained, monkeypatch):
    made = tiny(smoke=False, held_out=0)
    ((learner, _),) = untrained
    assert learner.train_size == made.train_size == 50_000
    whole = data.cifar10()[0]
    shown = []
    monkeypatch.setattr(cifar10, "measure", lambda model, call, images, normalise, **_: shown.append(images) or {})
    made.evaluate(made.model, "validation")
    assert torch.equal(shown[0].pixels, whole.pixels[45_000:])
    assert tiny(smoke=True, held_out=0).train_size == FAST["train"]


def test_splits_are_the_first_and_the_last_training_images_and_the_test_images(folder):
    whole, test, source = data.cifar10()
    for held_out in (5000, 100):
        splits, told = cifar10.split(held_out)
        assert torch.equal(splits["train"].pixels, whole.pixels[:-held_out])
        assert torch.equal(splits["validation"].labels, whole.labels[-held_out:])
        assert torch.equal(splits["test"].pixels, test.pixels)
        assert told == source
    splits, _ = cifar10.split(smoke=True)
    assert torch.equal(splits["train"].pixels, whole.pixels[:12])
    assert torch.equal(splits["validation"].pixels, whole.pixels[12:16])
    assert torch.equal(splits["test"].pixels, test.pixels[:8])
    assert torch.equal(cifar10.split(3, smoke=True)[0]["validation"].pixels, whole.pixels[12:15])
    splits, _ = cifar10.split(0, smoke=True)
    assert torch.equal(splits["train"].pixels, whole.pixels[:12])
    assert torch.equal(splits["validation"].pixels, whole.pixels[8:12])


@pytest.mark.parametrize("held_out", [-1, 50_000])
def test_an_impossible_share_is_refused(folder, held_out):
    with pytest.raises(HapError, match=f"held_out must be at least 0 and below 50000, found {held_out}"):
        tiny(held_out=held_out)


def test_images_are_normalised_as_published_and_calibration_is_on_training_images(folder, untrained):
    whole, test, _ = data.cifar10()
    made = tiny(images=10, batch=4)
    assert torch.allclose(made.example, normalised(whole.pixels[:1]), atol=1e-5)
    assert [len(labels) for _, labels in made.batches] == [4, 4, 2]
    assert all(among(made.batches, whole.pixels[:12]))
    ((last, labels),) = tiny(last=3).batches
    assert torch.allclose(last, normalised(whole.pixels[13:16]), atol=1e-5)
    assert torch.equal(labels, whole.labels[13:16])
    logits = made.model(normalised(test.pixels[:8]))
    found = made.evaluate(made.model, "test")
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, test.labels[:8]).detach()), rel=1e-4)
    assert found["accuracy"] == 100 * float((logits.argmax(1) == test.labels[:8]).double().mean())


def test_a_limit_is_on_fine_tuning_and_not_on_the_training(folder, untrained):
    made = tiny(train_images=5)
    ((learner, _),) = untrained
    counts = [sum(len(labels) for _, labels in task.train(4, training.generator(0))) for task in (made, learner)]
    assert counts == [made.train_size, learner.train_size] == [5, 12]
    assert tiny(train_images=99).train_size == 12


def test_images_are_shifted_and_mirrored_in_training(folder, untrained):
    """Whole images would all be among the originals; random pixels make a chance match impossible."""
    made, whole = tiny(), data.cifar10()[0]
    shown = list(made.train(12, training.generator(0)))
    assert sum(among(shown, whole.pixels[:12])) < 3
    assert torch.equal(shown[0][1].sort().values, whole.labels[:12].sort().values)


def test_trained_weights_are_read_back_and_what_decides_them_trains_anew(folder, fits):
    weights = tiny().model.state_dict()
    again = tiny(images=4, batch=2, last=2, train_images=3).model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.items())
    assert len(fits) == 1
    for number, options in enumerate([{"seed": 1}, {"held_out": 2}, {"keep": "best_test"}], start=2):
        other = tiny(**options).model.state_dict()
        assert len(fits) == number
        assert torch.equal(weights["conv1.weight"], other["conv1.weight"]) == ("seed" not in options)  # one epoch


def test_the_number_of_epochs_and_smoke_name_other_weights(folder, untrained):
    tiny(smoke=False, epochs=1)
    tiny(smoke=False, epochs=2)
    tiny()
    assert [recipe.epochs for _, recipe in untrained] == [1, 2, 1]


def test_training_changes_weights_that_the_seed_alone_draws(folder, monkeypatch, fits):
    drawn = resnet(8, (2, 4, 8), "B", rng=training.generator(0, "init")).state_dict()
    weights = tiny().model.state_dict()
    assert all(not torch.equal(drawn[name], weights[name]) for name in ("conv1.weight", "bn1.running_mean"))
    monkeypatch.setenv("HAP_CACHE", str(folder / "other"))
    torch.manual_seed(1)
    again = tiny().model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.items())
    assert len(fits) == 2


def test_the_last_epoch_is_kept_or_the_best_on_the_test_set_as_published(folder, monkeypatch):
    states = [resnet(8, (2, 4, 8), "B", rng=training.generator(seed)).state_dict() for seed in range(6)]

    def fit(model, *_, snapshots, **__):
        model.load_state_dict(states[-1])
        return training.Curve([], states if snapshots else [])

    monkeypatch.setattr(training, "fit", fit)
    made = tiny()
    reached = []
    for state in states:
        made.model.load_state_dict(state)
        reached.append(made.evaluate(made.model, "test")["accuracy"])
    best = reached.index(max(reached))
    assert best < 5
    assert torch.equal(tiny().model.conv1.weight, states[-1]["conv1.weight"])
    assert torch.equal(tiny(keep="best_test").model.conv1.weight, states[best]["conv1.weight"])


@pytest.mark.parametrize("options", [{}, {"autocast": "bf16"}, {"compile": True}], ids=str)
def test_switches_of_the_recipe_are_passed_on(folder, untrained, options):
    tiny(**options)
    ((_, recipe),) = untrained
    assert recipe == training.Recipe(epochs=1, lr=0.1, weight_decay=2e-4, batch_size=128, schedule="step", **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_doctor_looks_at_the_data_without_training(name, folder, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained"))
    found = doctor.ready(Ref(use=f"hap.harness.tasks.cifar10_{name}:task", options={"epochs": 3}), 0)
    assert (found.name, found.official) == ("cifar10", False)
    monkeypatch.setenv("HAP_DATA", str(folder))
    monkeypatch.setattr("hap.harness.tasks.data.roots", lambda root=None: [folder])
    with pytest.raises(HapError, match="CIFAR-10 not found"):
        doctor.ready(Ref(use=f"hap.harness.tasks.cifar10_{name}:task"), 0)


@pytest.mark.parametrize(("task", "depth"), [(cifar10_resnet20, 20), (cifar10_resnet32, 32), (cifar10_resnet56, 56)])
def test_a_pretrained_network_has_the_weights_of_its_checkpoint(task, depth, folder):
    made = task.task(0, smoke=True, images=5)
    expected = resnet(depth, rng=torch.Generator().manual_seed(depth))
    assert made.name == f"cifar10_resnet{depth}"
    assert all(torch.equal(expected.state_dict()[name], v) for name, v in made.model.state_dict().items())
    assert not made.model.training
    assert f"checkpoint resnet{depth}-" in made.data.note
    assert [len(labels) for _, labels in made.batches] == [5]
    assert made.train_size == FAST["train"]
    assert len(next(iter(made.train(64, training.generator(0))))[1]) == FAST["train"]
    first = data.cifar10()[0].pixels[:1]
    assert torch.allclose(made.example, normalised(first, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), atol=1e-5)


@pytest.mark.parametrize("options", [{"last": 0}, {"train_images": 0}, {"images": 0}, {"batch": 0}])
def test_counts_below_one_are_refused(folder, untrained, options):
    (name,) = options
    with pytest.raises(HapError, match=f"task: {name} must be at least 1, found 0"):
        tiny(**options)
    with pytest.raises(HapError, match=f"task: {name} must be at least 1, found 0"):
        cifar10_resnet20.task(0, **options)
