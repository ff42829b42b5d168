"""A task and a training of milliseconds: a perceptron that learns the sign of a sum."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from hap.harness.task import Data, Task
from hap.harness.train.loop import Recipe, generator
from hap.hessian.losses import CrossEntropy

INPUTS = torch.randn(64, 6, generator=generator(0, "inputs"))
TARGETS = (INPUTS[:, :3].sum(1) > 0).long()


def net(seed=0):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator(seed, str(parameter.shape)))
    return model


def epoch(batch_size, rng):
    for part in torch.randperm(len(INPUTS), generator=rng).split(batch_size):
        yield INPUTS[part], TARGETS[part]


def evaluate(model, split):
    assert split == "validation", "training must not look at the test set"
    model.eval()
    logits = model(INPUTS).detach()
    return {
        "accuracy": 100 * float((logits.argmax(1) == TARGETS).float().mean()),
        "loss": float(F.cross_entropy(logits, TARGETS)),
    }


def small(**changes):
    task = Task(
        name="small",
        model=net(),
        loss=CrossEntropy(),
        batches=[(INPUTS, TARGETS)],
        train=epoch,
        train_size=64,
        evaluate=evaluate,
        example=INPUTS[:1],
        data=Data("small", "0" * 64, True, ""),
    )
    return replace(task, **changes)


RECIPE = Recipe(epochs=3, lr=0.1, batch_size=20, schedule="cosine", warmup_epochs=0.5)
