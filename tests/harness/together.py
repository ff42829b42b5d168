"""A program for several ranks: what each part of a run gives, with the work shared; rank 0 writes it to a file.

    torchrun --nproc-per-node 2 together.py FILE

`measured()` is the same in one process.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hap.cost import params
from hap.harness.batchnorm import recalibrate
from hap.harness.processes import ranks
from hap.harness.supplied import Share
from hap.harness.task import Data, Task
from hap.harness.tasks.data import Images, Normalise, calibration, epoch, measure
from hap.harness.train.loop import Recipe, fit, generator, snapshot
from hap.hessian.accumulate import Curvature, merge
from hap.hessian.losses import CrossEntropy
from hap.methods import hessian_trace
from hap.structure.groups import couple
from hap.structure.tracing import trace

NORMALISE = Normalise((0.5,), (0.25,))
IMAGES, BATCH = 67, 16  # the last batch has 3: an odd number, for two ranks
RECIPE = Recipe(epochs=2, lr=0.1, batch_size=BATCH, clip=1.0, schedule="cosine")
RECIPES = {
    "plain": RECIPE,
    "whole": Recipe(epochs=1, lr=0.1, batch_size=BATCH),
    "micro": Recipe(epochs=1, lr=0.1, batch_size=BATCH, micro_batch=8),
    "micro and plain": Recipe(epochs=1, lr=0.1, batch_size=BATCH, micro_batch=4),
    "distil": Recipe(epochs=1, lr=0.1, batch_size=BATCH, distil=0.5),
    # Adam makes a step of any gradient, also of one that is nothing but rounding, as that of a bias before BatchNorm
    "adamw and plain": Recipe(epochs=1, lr=0.01, batch_size=BATCH, optimiser="adamw"),
    "stabilised": Recipe(epochs=1, lr=0.1, batch_size=BATCH, stabilise=True),
}


class Unused(nn.Module):
    """A layer whose weight no output needs, as what surgery leaves of a layer without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = nn.Parameter(torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


def net(batchnorm: bool = True, seed: int = 0) -> nn.Sequential:
    """Convolutions, with BatchNorm or without, and a parameter of no elements."""
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2)]
    layers += [nn.BatchNorm2d(8, momentum=None), nn.ReLU(), Unused(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    kept = [layer for layer in layers if batchnorm or not isinstance(layer, nn.BatchNorm2d)]
    model = nn.Sequential(*kept, nn.Linear(8, 5))
    rng = generator(seed, "init")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.dim() == 1) + 0.5 * torch.randn(p.shape, generator=rng))
    return model.eval()


def images() -> Images:
    """Noise of five brightnesses."""
    rng = generator(0, "images")
    labels = torch.randint(5, (IMAGES,), generator=rng)
    noise = torch.randint(50, (IMAGES, 1, 8, 8), generator=rng)
    return Images((noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def task(model: nn.Module | None = None, weight: Tensor | None = None) -> Task:
    """A workload of them."""
    data, loss = images(), CrossEntropy(weight=weight)
    return Task(
        name="noise",
        model=net() if model is None else model,
        loss=loss,
        batches=calibration(data, NORMALISE, 50, 12, generator(0, "calibration")),  # 5 batches, the last of 2
        train=lambda size, rng: epoch(data, size, rng, normalise=NORMALISE, pad=1, flip=True),
        train_size=IMAGES,
        evaluate=lambda model, which: measure(model, loss.call, data, NORMALISE, batch_size=10),
        example=NORMALISE(data.pixels[:1]),
        data=Data("noise", "0" * 64, True, "drawn"),
    )


def whole(found: Curvature) -> Curvature:
    """The curvature of all ranks' batches."""
    return merge(ranks.gathered(found))


def scores(made: Task, **options: object) -> list[float]:
    """The relative Hessian trace of the channels, each rank measuring its share."""
    groups = couple(made.model, trace(made.model, made.example), "union")
    rng = generator(0, "score")
    batches = Share(made.batches, rng)
    return hessian_trace(made.model, made.loss, batches, groups, rng=rng, merge=whole, **options).tolist()


def trained(recipe: Recipe, weight: Tensor | None = None, keep: Path | None = None, batchnorm: bool = True) -> dict:
    """The weights after a training, and its rows."""
    student = net(batchnorm, seed=1)
    curve = fit(student, task(weight=weight), recipe, rng=generator(0, "train"), keep=keep)
    rows = [[row["train_loss"], row["validation"]["loss"], row["validation"]["accuracy"]] for row in curve.epochs]
    states = [float(sum(value.double().sum() for value in state.values())) for state in curve.states()]
    state = {name: value.double().flatten().tolist() for name, value in snapshot(student).items()}
    return {"rows": rows, "state": state, "sums": states, "notes": curve.notes}


def measured(folder: Path) -> dict:
    """All of it."""
    weights = torch.tensor([0.2, 1.0, 2.0, 1.5, 0.7])
    made = task()
    recalibrated = task()
    recalibrate(recalibrated.model, recalibrated.batches, recalibrated.loss.call)
    short = Recipe(epochs=1, lr=0.1, batch_size=IMAGES - 1)  # leaves a batch of one sample, fewer than ranks
    return {
        "world": ranks.world(),
        "params": params(made.model),
        "exact": scores(made),
        "one batch": scores(replace(made, batches=made.batches[:1])),
        "plain net": scores(task(net(batchnorm=False))),
        "weighted": scores(task(weight=weights)),
        "drawn": scores(made, columns=1),
        "probes": scores(made, curvature="hutchinson", probes=200),
        "probes of one batch": scores(replace(made, batches=made.batches[:1]), curvature="hutchinson", probes=200),
        "evaluate": made.evaluate(made.model, "test"),
        "recalibrated": recalibrated.evaluate(recalibrated.model, "test"),
        "trained": {name: trained(recipe, batchnorm="plain" not in name[1:]) for name, recipe in RECIPES.items()},
        "trained weighted": trained(RECIPE, weights),
        "kept": trained(RECIPE, keep=folder / "kept"),
        "short": trained(short)["notes"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.joined():
        found = measured(Path(sys.argv[1]).parent)
        ranks.agreed("what came out", json.dumps({**found, "evaluate": None}))
        if ranks.rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))
