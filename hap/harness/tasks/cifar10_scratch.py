"""CIFAR-10 and a network trained from scratch by the published recipe; the workloads beside this name which."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hap.harness.task import Data, Task
from hap.harness.tasks import cifar10, data, nets
from hap.harness.tasks.cache import Trained, cached
from hap.harness.tasks.cifar10 import HELD_OUT, SMOKE, few, split, workload
from hap.harness.tasks.data import Normalise, epoch
from hap.harness.train import loop as training
from hap.harness.train import recipe as recipes
from hap.harness.train import step as stepping
from hap.hessian import losses

NORMALISE = Normalise((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def trained(
    name: str,
    build: Callable[..., nn.Module],
    seed: int,
    *,
    images: int = 512,
    batch: int = 128,
    last: int | None = None,
    train_images: int | None = None,
    epochs: int = 200,
    held_out: int = HELD_OUT,
    keep: Literal["last", "best_test"] = "last",
    autocast: str | None = None,
    compile: bool = False,
    lr: float = 0.1,
    smoke: bool = False,
    fit: training.Fit | None = None,
) -> Task:
    """The network of `build`, trained with this seed where its weights are not in the cache; the rest as `pretrained`.

    SGD with momentum 0.9, learning rate 0.1 and a tenth of it at 50 and 75 % of the epochs, weight decay 2e-4, batches
    of 128 [HAP-code, README]. `held_out`: the last training images, for validation; 0 trains on all 50,000 as
    published, and validation then says little. `smoke`: SMOKE images and one epoch, the same way.
    """
    splits, source = split(held_out, smoke)
    plan: dict[str, Any] = {"epochs": 1 if smoke else epochs, "lr": lr, "weight_decay": 2e-4, "batch_size": 128}
    recipe = training.Recipe(**plan, autocast=autocast, compile=compile)
    model = build(rng=training.generator(seed, "init"))
    rest: dict[str, Any] = {"images": few(images, smoke), "batch": batch, "last": last and few(last, smoke)}
    made = workload(name, model, splits, source, NORMALISE, seed, **rest, train_images=train_images)
    decides = [name, recipe, NORMALISE, held_out, keep, SMOKE if smoke else None, source.sha256]
    sources = [nets, data, cifar10, training, stepping, recipes, losses, sys.modules[__name__]]
    whole = partial(epoch, splits["train"], normalise=NORMALISE, pad=4, flip=True)
    learner = replace(made, train=whole, train_size=len(splits["train"].labels))
    found = cached(name, seed, decides, sources, partial(_trained, learner, recipe, seed, keep, fit))
    made.model.load_state_dict(found.weights)
    made.model.eval()
    return replace(made, notes=tuple(found.notes))


def ready(**options: object) -> Data:
    """The data of such a task, without training its model."""
    return data.cifar10()[2]


def _trained(
    task: Task, recipe: training.Recipe, seed: int, keep: str, fit: training.Fit | None, folder: Path
) -> Trained:
    rng, best = training.generator(seed, "train"), keep == "best_test"
    curve = (fit or training.fit)(task.model, task, recipe, rng=rng, keep=folder, snapshots=best)
    if not best:
        return Trained(training.snapshot(task.model), curve.notes)

    def on_test(state: training.State) -> float:
        task.model.load_state_dict(state)
        return task.evaluate(task.model, "test")["accuracy"]

    # upstream: the epoch that is best on the test set is kept, so the dense accuracy that is reported is selected on it
    return Trained(max(curve.states(), key=on_test), curve.notes)
