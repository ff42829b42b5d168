"""Functions that a spec of the tests can name, a spec that reads, and runs made up of numbers."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

SPEC = """
title = "A made-up table"
paper = "[Yu22]"
tier = "quick"
seeds = [0, 1, 2]
task = {use = "fakes:task", width = 8}

[finetune]
epochs = 2
lr = 0.1

[assumed]
accuracy = {seeds = 0.1}
params_pruned = {seeds = 0.5}

[cases.hap]
score = {use = "fakes:score", curvature = "exact"}
implant = "fakes:implant"
budget = {params = 0.7, implant = 0.1}

[cases.random]
like = "hap"
score = "fakes:random"

[[claims]]
text = "more than 70 % of the parameters go"
source = "[Yu22] abstract"
case = "hap"
metric = "params_pruned"
op = ">="
value = 70
over = "seeds"
family = "sizes"
effect = 2

[[claims]]
text = "hap is no worse than random"
source = "the suite"
case = "hap"
against = "random"
metric = "accuracy"
op = ">="
value = 0
tolerance = 0.5
over = "seeds and images"
family = "sanity"
effect = 0
"""


def task(seed: int, *, width: int = 4) -> None:
    """A workload with one option."""


def hungry_task(seed: int, *, width: int) -> None:
    """A workload with an option that must be given."""


def shrinkable_task(seed: int, *, width: int = 4, smoke: bool = False) -> None:
    """A workload that can be made small."""


def score(model, loss, batches, groups, *, rng, curvature: Literal["exact", "hutchinson"] = "exact", probes: int = 3):
    """A score with typed options."""


def random(model, loss, batches, groups, *, rng):
    """A score without options."""


def noisy(model, loss, batches, groups, *, rng, pruned=None, halves=None, probes: int = 3):
    """A score that is offered what is pruned, and a place for its halves."""


def open_score(model, loss, batches, groups, **options):
    """A score that takes anything."""


def no_rng(model, loss, batches, groups):
    """A score that forgot the generator."""


def method(task, groups, budget, *, rng, steps: int = 1):
    """A method with one option."""


def probing_method(task, groups, budget, *, rng, probes: int = 300):
    """A method with many probes by default."""


def implant(module, rows, inputs):
    """An implant."""


not_a_function = 3
LARGE = 10**15  # samples of a test set


def write_spec(folder: Path, text: str = SPEC, name: str = "table") -> Path:
    """A spec under reproductions/ of `folder`."""
    path = folder / "reproductions" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def edited(record, *steps, to):
    """A copy of a record with one part replaced."""
    copied = json.loads(json.dumps(record))
    part = copied
    for step in steps[:-1]:
        part = part[step]
    part[steps[-1]] = to
    return copied


def without(record, *steps):
    """A copy of a record with one part left out."""
    copy = json.loads(json.dumps(record))
    part = copy
    for step in steps[:-1]:
        part = part[step]
    del part[steps[-1]]
    return copy


def unpadded(text):
    """Tables in Markdown with one space around each cell."""
    return "\n".join(re.sub(r" *(?<!\\)\| *", " | ", line).strip() for line in text.split("\n"))


def fake_run(case: Any, seed: int, **changes: Any) -> Any:
    """A record of `case` whose numbers depend on nothing but `seed`; `changes` overrides fields."""
    from hap.harness.records.record import Run

    def stage(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "loss": 1 - accuracy / 100}

    made = Run(
        schema=1,
        spec=case.spec,
        case=case.name,
        key=case.key,
        seed=seed,
        config=case.config,
        metrics={
            "dense": stage(95.0),
            "one_shot": stage(60.0 + seed),
            "selected": stage(94.0 + seed / 10),
            "last": stage(94.0),
            "best_test_epoch": stage(94.5 + seed / 10),
        },
        epochs=[
            {"epoch": 0, "lr": 0.1, "train_loss": 0.5, "validation": stage(94.0), "test": stage(94.0), "seconds": 1.0}
        ],
        plan={},
        cost={
            "dense": {"params": 1000, "macs": 5000, "latency_seconds": {"1": 0.001, "64": 0.020}},
            "pruned": {"params": 280, "macs": 2000, "latency_seconds": {"1": 0.001, "64": 0.010}},
        },
        seconds={
            "task": 1.0,
            "trace": 0.1,
            "score": 2.0 + seed,
            "plan": 0.1,
            "apply": 0.1,
            "finetune": 9.0,
            "evaluate": 1.0,
        },
        environment={"python": "3.11"},
        code={"commit": "abc", "dirty": False, "sha256": "0" * 64},
        # a test set so large that its error is none
        data={"name": "digits", "sha256": "1" * 64, "official": True, "note": "", "test_samples": LARGE},
        created="2026-11-21T12:00:00+00:00",
    )
    return replace(made, **changes)


def with_accuracy(run: Any, stage: str, accuracy: float, loss: float | None = None) -> Any:
    """The run with another accuracy, and loss, at one stage."""
    measured = {"accuracy": accuracy, "loss": 1 - accuracy / 100 if loss is None else loss}
    return replace(run, metrics={**run.metrics, stage: measured})


REPORTED = """
[[reported]]
method = "GReg-1"
model = "ResNet56"
data = "CIFAR-10"
dense = 93.36
accuracy = 93.2
params_pruned = 49.82
macs_pruned = 50
note = "3 runs | mean"
source = "arXiv 2012.09243, table 1"

[[reported]]
method = "HRank"
model = "ResNet56"
data = "CIFAR-10"
dense = 93.26
accuracy = 93.17
source = "made up <for a test>"
"""


GIVEN: dict[str, list[float]] = {}  # scores of rows by layer, for `given`


def row_scores(model, rng) -> dict[str, Any]:
    """A random score for each row of each convolution and linear layer, some equal, some negative."""
    import torch
    from torch import nn

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {name: (torch.randn(len(m.weight), generator=rng) * 8).round() / 8 for name, m in layers.items()}


def by_row(model, loss, batches, groups, *, rng):
    """A score that sums `row_scores` over a group."""
    return _spread(model, groups, row_scores(model, rng))


def given(model, loss, batches, groups, *, rng):
    """A score that sums GIVEN over a group."""
    import torch

    return _spread(model, groups, {name: torch.tensor(values) for name, values in GIVEN.items()})


def _spread(model, groups, rows):
    import torch

    values = {}
    for name, scores in rows.items():
        values[f"{name}.weight"] = torch.zeros_like(model.get_submodule(name).weight.detach())
        values[f"{name}.weight"].flatten(1)[:, 0] = scores
    return groups.reduce(values)
