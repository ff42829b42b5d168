"""The 1,797 handwritten digits inside scikit-learn, and a small PreResNet that is trained on them when first needed."""

import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hap.harness.task import Data, Seen, Task
from hap.harness.tasks import data, nets
from hap.harness.tasks.cache import Trained, cached
from hap.harness.tasks.data import Images, Normalise, calibration, device, digest, epoch, measure
from hap.harness.train import loop as training
from hap.harness.train import recipe
from hap.harness.train import step as stepping
from hap.hessian import losses
from hap.hessian.losses import CrossEntropy

# no wider than the digits need: at 16, 32, 64 channels even random pruning costs nothing, and nothing can be compared
DEPTH, WIDTHS = 20, (8, 16, 32)
RECIPE = training.Recipe(epochs=20, lr=0.1, weight_decay=5e-4, batch_size=64, schedule="cosine", warmup_epochs=1)
NORMALISE = Normalise((0.305,), (0.376,), white=16.0)
SPLITS = {"train": 1077, "validation": 270, "test": 450}


def task(seed: int, *, images: int = 512, batch: int = 128, fit: training.Fit | None = None) -> Task:
    """A PreResNet-20 trained with this seed, and `images` calibration images that the seed draws.

    The digits fill their 8x8 images, so there is no augmentation: a shift by one pixel cuts strokes off, and cost 1 to
    2 points of test accuracy (98 against 99.4 %). One thread: such small layers gain nothing from a second.
    """
    splits, source = digits()
    splits = {name: Images(*(part.to(device()) for part in images)) for name, images in splits.items()}
    train, loss = splits["train"], CrossEntropy()

    def evaluate(model: nn.Module, split: str, seen: Seen | None = None) -> dict[str, float]:
        return measure(model, loss.call, splits[split], NORMALISE, seen=seen)

    made = Task(
        name="digits_preresnet",
        model=_network(training.generator(seed, "init")).to(device()),
        loss=loss,
        batches=calibration(train, NORMALISE, images, batch, training.generator(seed, "calibration")),
        train=partial(epoch, train, normalise=NORMALISE, pad=0, flip=False),
        train_size=len(train.labels),
        evaluate=evaluate,
        example=NORMALISE(train.pixels[:1]),
        data=source,
        test_samples=SPLITS["test"],
        threads=1,
    )
    decides = [DEPTH, WIDTHS, RECIPE, NORMALISE, SPLITS, source.sha256]
    sources = [nets, data, training, stepping, recipe, losses, sys.modules[__name__]]
    found = cached(made.name, seed, decides, sources, partial(_trained, made, seed, fit))
    made.model.load_state_dict(found.weights)
    made.model.eval()
    return replace(made, notes=tuple(found.notes))


def ready(**options: object) -> Data:
    """The data of the task, without training its model."""
    return digits()[1]


def _trained(task: Task, seed: int, fit: training.Fit | None, keep: Path) -> Trained:
    rng = training.generator(seed, "train")
    curve = (fit or training.fit)(task.model, task, RECIPE, rng=rng, keep=keep, snapshots=False)
    return Trained(training.snapshot(task.model), curve.notes)


def _network(rng: torch.Generator) -> nn.Module:
    # channels last: a third faster here
    return nets.preresnet(DEPTH, WIDTHS, channels=1, rng=rng).to(memory_format=torch.channels_last)


@cache
def digits() -> tuple[dict[str, Images], Data]:
    """The images of each split, and which data they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # the same on every version of numpy
    parts = torch.split(order, list(SPLITS.values()))
    splits = {name: Images(pixels[part], labels[part]) for name, part in zip(SPLITS, parts, strict=True)}
    return splits, Data("digits", digest([pixels, labels]), True, "sklearn.datasets.load_digits: 1,797 images of 8x8")
