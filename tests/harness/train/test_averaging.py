"""Averages of weights against a plain loop, beside the optimiser, through a kill, and where they are off."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import SPEC, write_spec
from small import INPUTS, RECIPE, TARGETS, epoch, net, small
from test_checkpoints import LONG, Killed, equal, go, killed_in
from test_stepping import gradients, plain, starved
from torch import nn
from torch.nn import functional as F

from hap import HapError
from hap.harness.spec.spec import find_specs, load_spec
from hap.harness.train.loop import fit, generator
from hap.harness.train.recipe import Recipe, learning_rate

ROOT = Path(__file__).parents[3]
DECAY = 0.8


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize("optimiser", [None, "adamw"])
def test_what_is_validated_and_kept_is_the_average_and_training_goes_on_from_the_weights(optimiser):
    """The oracle steps with torch's optimiser and averages by hand, statistics of BatchNorm too.

    Without BatchNorm for Adam: a bias before one has no gradient but noise, of which Adam makes steps.
    """
    recipe = replace(RECIPE, ema=DECAY, optimiser=optimiser, lr=0.05)
    ours, theirs, shown = net(), net(), []
    if optimiser:
        ours, theirs = (nn.Sequential(model[0], *model[2:]) for model in (ours, theirs))
    task = small()

    def evaluate(model, split):
        shown.append(state(model))
        return task.evaluate(model, split)

    curve = fit(ours, small(evaluate=evaluate), recipe, rng=generator(3))
    flat = [{"params": [p for p in theirs.parameters() if (p.dim() < 2) == spared]} for spared in (False, True)]
    if optimiser:
        flat[1]["weight_decay"] = 0.0
        stepper = torch.optim.AdamW(flat, lr=0.0, weight_decay=1e-4, foreach=False, fused=False)
    else:
        stepper = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=False, fused=False)
    rng, average = generator(3), None
    for number in range(3):
        theirs.train()
        for step, (inputs, targets) in enumerate(epoch(20, rng)):
            for group in stepper.param_groups:
                group["lr"] = learning_rate(recipe, number + step / 4, 1 / 4)
            stepper.zero_grad()
            F.cross_entropy(theirs(inputs), targets).backward()
            stepper.step()
            now = state(theirs)
            average = average or now
            average = {name: DECAY * a + (1 - DECAY) * now[name] for name, a in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(shown[number][name], value, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(curve.snapshots[number][name], value, rtol=1e-4, atol=1e-5)
    assert max(float((average[name] - value).abs().max()) for name, value in state(theirs).items()) > 1e-3
    for name, value in state(ours).items():
        assert torch.equal(value, curve.snapshots[-1][name])


@pytest.mark.parametrize("optimiser", [None, "adamw"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_average_goes_on_bit_for_bit_where_a_training_was_killed(tmp_path, number, optimiser):
    recipe = replace(LONG, ema=DECAY, optimiser=optimiser, stabilise=True)
    with pytest.raises(Killed):
        go(tmp_path, recipe=recipe, train=killed_in(number))
    found = go(tmp_path, recipe=recipe)
    assert (f"goes on after epoch {number - 1} of 6" in found[2]) == (number > 1)
    equal(found, go(None, recipe=recipe))


def test_an_epoch_that_is_begun_anew_for_want_of_memory_averages_anew():
    recipe, model, oracle = replace(RECIPE, ema=DECAY), starved(5, net()), net()
    fit(model, small(), recipe, rng=generator(0))
    fit(oracle, small(), replace(recipe, micro_batch=5), rng=generator(0))
    assert all(torch.equal(value, oracle.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_norm_without_a_scale_keeps_its_own_statistics():
    def bare():
        model = net()
        model[1] = nn.BatchNorm1d(16, affine=False)
        return model

    averaged, plainly = bare(), bare()
    fit(averaged, small(), replace(RECIPE, ema=DECAY), rng=generator(0))
    fit(plainly, small(), RECIPE, rng=generator(0))
    assert torch.equal(averaged[1].running_mean, plainly[1].running_mean)
    assert not torch.equal(averaged[0].weight, plainly[0].weight)


def test_no_decay_to_speak_of_is_the_last_step_and_the_training_is_the_same():
    averaged, plainly = net(), net()
    fit(averaged, small(), replace(RECIPE, ema=1e-9), rng=generator(0))
    fit(plainly, small(), RECIPE, rng=generator(0))
    for name, value in plainly.state_dict().items():
        torch.testing.assert_close(averaged.state_dict()[name], value)


@pytest.mark.parametrize("micro", [64, 24])
def test_smoothed_labels_are_trained_on(micro):
    """The oracle is torch's own smoothing."""
    model = plain()
    loss, found = gradients(model, label_smoothing=0.2, micro_batch=micro)
    expected = F.cross_entropy(model(INPUTS), TARGETS, label_smoothing=0.2)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for grad, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    assert loss != pytest.approx(gradients(plain())[0], rel=1e-3)


def test_the_published_steps_are_at_epochs_of_their_own():
    recipe = Recipe(epochs=120, lr=1.0, milestones=[30, 60])
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [30, 60])
    for number in range(120):
        assert learning_rate(recipe, number) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimiser.step()
        scheduler.step()
    assert learning_rate(replace(recipe, epochs=1), 0.9) == 1.0  # as a rehearsal shortens it


@pytest.mark.parametrize(
    "wrong",
    [
        {"ema": 0.0},
        {"ema": 1.0},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"milestones": []},
        {"milestones": [0, 3]},
        {"milestones": [6, 3]},
        {"milestones": [3], "schedule": "cosine"},
    ],
)
def test_an_impossible_option_is_refused_by_its_name(wrong):
    name = next(iter(wrong))
    with pytest.raises(HapError, match=rf"^recipe: {name} must be .*, found "):
        Recipe(epochs=3, lr=0.1, **wrong)


def test_options_that_are_off_move_no_key_and_those_that_are_on_do(tmp_path):
    """The key of the digits as they were committed before there were these options."""
    (digits,) = (path for path in find_specs(ROOT / "reproductions") if path.stem == "digits")
    folders = {path.parent.name for path in (ROOT / "results" / "digits").glob("*/seed0.json")}
    keys = {f"{case.name}-{case.key}" for case in load_spec(digits).cases.values()}
    assert keys <= folders
    told = {f"{option}\n": None for option in ("", "ema = 0.9", "label_smoothing = 0.1", "milestones = [1]")}
    for option in told:
        spec = SPEC.replace("[finetune]\n", f"[finetune]\n{option}")
        told[option] = load_spec(write_spec(tmp_path, spec)).cases["hap"].key
    assert len(set(told.values())) == 4
