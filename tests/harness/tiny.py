"""A workload and a score for tests of whole nights and comparisons: a tiny network, trained in a split second."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from hap.harness.task import Data, Task
from hap.harness.tasks.data import calibration, epoch, measure
from hap.harness.tasks.digits_preresnet import NORMALISE, digits
from hap.hessian.losses import CrossEntropy
from hap.methods import hessian_trace

SIGN = 1  # of `signed`; -1 is the error that a night must find

SPEC = """
title = "A tiny network on the digits"
paper = "none: a test"
tier = "quick"
seeds = [0, 1, 2]
task = "tiny:task"

[cases.hap]
score = "tiny:signed"
budget = {params = [0.5, 0.7]}

[[claims]]
text = "Half of the network is enough"
source = "a test"
case = "hap@50"
metric = "accuracy"
stage = "one_shot"
op = ">="
value = 50
over = "seeds"
family = "sizes"
effect = 5
"""


def task(seed: int) -> Task:
    """A network of three layers, trained for 60 steps."""
    splits, source = digits()
    train, loss, rng = splits["train"], CrossEntropy(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = [
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        ]
        model = nn.Sequential(*conv, nn.Flatten(), nn.Linear(256, 10))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        batch = train.pixels[at := torch.randint(len(train.labels), (128,), generator=rng)]
        optimiser.zero_grad()
        F.cross_entropy(model(NORMALISE(batch)), train.labels[at]).backward()
        optimiser.step()

    def evaluate(model, split, seen=None):
        return measure(model, loss.call, splits[split], NORMALISE, seen=seen)

    return Task(
        name="tiny",
        model=model.eval(),
        loss=loss,
        batches=calibration(train, NORMALISE, 128, 128, rng),
        train=partial(epoch, train, normalise=NORMALISE, pad=0, flip=False),
        train_size=len(train.labels),
        evaluate=evaluate,
        example=NORMALISE(train.pixels[:1]),
        data=source,
        threads=1,
    )


def ready(**options) -> Data:
    return digits()[1]


def signed(model, loss, batches, groups, *, rng):
    """The sensitivity of HAP, with a sign that a test can turn."""
    return SIGN * hessian_trace(model, loss, batches, groups, rng=rng)
