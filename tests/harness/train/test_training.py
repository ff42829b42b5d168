from dataclasses import replace
from functools import partial

import pytest
import torch
from small import RECIPE, epoch, net, small
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hap import HapError
from hap.harness.tasks import data
from hap.harness.tasks.data import Images, Normalise
from hap.harness.train.loop import Curve, Event, Recipe, fit, generator, learning_rate, snapshot, threads


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("batch_size", 0),
        ("schedule", "triangle"),
        ("optimiser", "sgd"),
        ("clip", 0.0),
        ("warmup_epochs", 4.0),
    ],
)
def test_an_impossible_recipe_is_refused_by_the_name_of_the_field(field, value):
    with pytest.raises(HapError, match=rf"^recipe: {field} must be .*, found "):
        replace(RECIPE, **{field: value})


def test_nesterov_needs_momentum():
    with pytest.raises(HapError, match="nesterov must be false without momentum"):
        Recipe(1, 0.1, momentum=0.0, nesterov=True)


def test_training_learns_and_leaves_one_row_and_one_snapshot_an_epoch():
    model = net()
    curve = fit(model, small(), replace(RECIPE, epochs=10), rng=generator(0))
    assert [row["epoch"] for row in curve.epochs] == list(range(10))
    assert set(curve.epochs[0]) == {"epoch", "lr", "train_loss", "validation", "seconds"}
    assert curve.epochs[-1]["validation"]["accuracy"] > 95
    assert curve.epochs[-1]["train_loss"] < curve.epochs[0]["train_loss"] / 2
    assert len(curve.snapshots) == 10
    assert all(torch.equal(curve.snapshots[-1][name], value) for name, value in model.state_dict().items())
    assert not torch.equal(curve.snapshots[0]["0.weight"], curve.snapshots[-1]["0.weight"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loop_is_plain_sgd():
    """The oracle is torch's unfused optimiser with the schedule set by hand; it shares the order of the batches."""
    ours, theirs = net(), net()
    fit(ours, small(), RECIPE, rng=generator(3))
    optimiser = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=False, fused=False)
    rng = generator(3)
    for number in range(3):
        theirs.train()
        for step, (inputs, targets) in enumerate(epoch(20, rng)):
            optimiser.param_groups[0]["lr"] = learning_rate(RECIPE, number + step / 4, 1 / 4)
            optimiser.zero_grad()
            F.cross_entropy(theirs(inputs), targets).backward()
            optimiser.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_adamw_is_that_of_torch_and_spares_biases_and_norms_with_gradients_clipped():
    """The oracle is torch's unfused AdamW on two sets of parameters, and its clipping; it shares the batches.

    Without BatchNorm, before which a bias has no gradient but noise, of which Adam makes steps.
    """
    recipe = replace(RECIPE, optimiser="adamw", lr=1e-2, weight_decay=0.3, clip=0.05, schedule="linear")
    ours, theirs = (nn.Sequential(model[0], *model[2:]) for model in (net(), net()))
    fit(ours, small(), recipe, rng=generator(3))
    flat = [{"params": [p for p in theirs.parameters() if (p.dim() < 2) == spared]} for spared in (False, True)]
    flat[1]["weight_decay"] = 0.0
    optimiser = torch.optim.AdamW(flat, lr=0.0, weight_decay=0.3, foreach=False, fused=False)
    rng, norms = generator(3), []
    for number in range(3):
        theirs.train()
        for step, (inputs, targets) in enumerate(epoch(20, rng)):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(recipe, number + step / 4, 1 / 4)
            optimiser.zero_grad()
            F.cross_entropy(theirs(inputs), targets).backward()
            norms.append(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)))
            optimiser.step()
    assert max(norms) > 0.05  # or nothing was clipped
    assert any(p.dim() < 2 for p in theirs.parameters())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def dropping():
    """A network with dropout, whose masks come from torch's global stream."""
    model = net()
    return nn.Sequential(*model[:-1], nn.Dropout(0.3), model[-1])


def test_dropout_is_of_the_seed_and_leaves_the_global_stream_alone():
    ends, states = [], []
    for noise, seed in ((5, 1), (6, 1), (5, 2)):
        model, task = dropping(), small()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        ends.append(fit(model, task, RECIPE, rng=generator(seed)).snapshots[-1])
        states.append(torch.equal(before, torch.get_rng_state()))
    assert all(states)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not all(torch.equal(value, ends[2][name]) for name, value in ends[0].items())


def test_dropout_draws_new_masks_in_each_epoch(monkeypatch):
    drawn, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda value: drawn.append(value) or seed(value))
    fit(dropping(), small(), RECIPE, rng=generator(0))
    assert len(set(drawn)) == RECIPE.epochs


def test_the_epoch_is_selected_by_the_metric_of_the_task():
    rows = [{"validation": {"accuracy": a, "f1": f, "loss": 0.1}} for a, f in ((9.0, 1.0), (8.0, 3.0), (7.0, 2.0))]
    assert [Curve(rows, [], metric=metric).selected for metric in ("accuracy", "f1")] == [0, 1]


def test_nothing_within_an_epoch_waits_for_the_device():
    """Ops that read a value back, or make a tensor of numbers, are as many for 3 steps as for 10.

    What a CPU cannot show: copies of tensors that lie there already.
    """
    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "lift_fresh")
    counts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += function.overloadpacket.__name__ in waiting
            return function(*args, **(kwargs or {}))

    images = Images(torch.randint(256, (48, 3, 8, 8), dtype=torch.uint8), torch.randint(2, (48,)))
    draw = partial(data.epoch, images, normalise=Normalise((0.5,) * 3, (0.2,) * 3), pad=2, flip=True)
    for batch_size in (16, 16, 5):  # the first time, constants are made
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        task = small(model=net(), train=draw, train_size=48, evaluate=lambda *_: {"accuracy": 0.0, "loss": 0.0})
        counts.append(0)
        with Watch():
            fit(model, task, replace(RECIPE, epochs=1, batch_size=batch_size, autocast="bf16"), rng=generator(0))
    assert counts[1] == counts[2]


def test_one_seed_gives_one_result_bit_for_bit_and_another_seed_another():
    first, second, third = (fit(net(), small(), RECIPE, rng=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first.snapshots[-1][name], value) for name, value in second.snapshots[-1].items())
    assert not torch.equal(first.snapshots[-1]["0.weight"], third.snapshots[-1]["0.weight"])


def test_the_global_generator_decides_nothing():
    torch.manual_seed(5)
    first = fit(net(), small(), RECIPE, rng=generator(1))
    torch.manual_seed(6)
    second = fit(net(), small(), RECIPE, rng=generator(1))
    assert all(torch.equal(first.snapshots[-1][name], value) for name, value in second.snapshots[-1].items())


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear", "constant"])
def test_the_schedules_are_those_of_torch(schedule):
    """The oracle is torch.optim.lr_scheduler, stepped each iteration; it cannot see the warm-up."""
    steps, recipe = 5, Recipe(epochs=8, lr=0.4, schedule=schedule)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler = {
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(optimiser, [4 * steps, 6 * steps]),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 8 * steps),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, 8 * steps),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0),
    }[schedule]()
    for iteration in range(8 * steps):
        assert learning_rate(recipe, iteration / steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimiser.step()
        scheduler.step()


def test_the_warm_up_rises_to_the_rate_and_never_starts_at_zero():
    recipe = Recipe(epochs=4, lr=1.0, schedule="constant", warmup_epochs=2)
    rates = [learning_rate(recipe, i / 4, 1 / 4) for i in range(10)]
    assert rates == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1, 1])


def test_a_loss_that_is_no_number_stops_with_epoch_rate_and_advice():
    def poisoned(batch_size, rng):
        poisoned.epochs += 1
        for inputs, targets in epoch(batch_size, rng):
            yield inputs * (float("nan") if poisoned.epochs == 2 else 1), targets

    poisoned.epochs = 0
    rule = r"small: .* found nan in epoch 2 of 3 at learning rate 0\.1; lower the learning rate or warm up longer"
    with pytest.raises(HapError, match=rule):
        fit(net(), small(train=poisoned), replace(RECIPE, schedule="constant"), rng=generator(0))


@pytest.mark.parametrize(
    ("found", "selected"),
    [
        ([(90, 1.0), (92, 1.0), (91, 0.1)], 1),
        ([(92, 1.0), (92, 0.5), (91, 0.1)], 1),
        ([(92, 0.5), (92, 0.5), (92, 0.5)], 0),
    ],
)
def test_selection_takes_accuracy_then_loss_then_the_earlier(found, selected):
    rows = [{"validation": {"accuracy": accuracy, "loss": loss}} for accuracy, loss in found]
    assert Curve(rows, []).selected == selected


def test_progress_is_a_line_with_a_fraction():
    events = []
    fit(net(), small(), RECIPE, rng=generator(0), say=events.append)
    assert [event.fraction for event in events] == pytest.approx([1 / 3, 2 / 3, 1])
    assert events[0].startswith("epoch 1/3: loss ")
    assert Event("trace").fraction is None


def test_a_task_says_how_many_threads_train_it():
    seen = []

    def watched(batch_size, rng):
        seen.append(torch.get_num_threads())
        return epoch(batch_size, rng)

    with threads(2):
        fit(net(), small(train=watched, threads=1), replace(RECIPE, epochs=1, warmup_epochs=0), rng=generator(0))
        assert torch.get_num_threads() == 2
        fit(net(), small(train=watched), replace(RECIPE, epochs=1, warmup_epochs=0), rng=generator(0))
    assert seen == [1, 2]


def test_a_snapshot_is_a_copy():
    model = net()
    kept = snapshot(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert kept["0.weight"].abs().sum() > 0


def test_purposes_have_streams_of_their_own():
    draws = [
        torch.rand(3, generator=generator(seed, purpose)).tolist()
        for seed, purpose in [(0, "a"), (0, "b"), (1, "a"), (0, "a")]
    ]
    assert draws[0] == draws[3]
    assert len({tuple(drawn) for drawn in draws}) == 3
