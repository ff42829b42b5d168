"""The one training loop: SGD, a schedule, validation after each epoch, selection; does not know what it trains."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from hap import HapError
from hap.harness.tasks import Task

SCHEDULES = ("step", "cosine", "constant")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that decides the result but the seed."""

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128
    schedule: str = "step"  # "step" (a tenth at 50 and 75 %), "cosine" or "constant"
    warmup_epochs: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Refuses a recipe that cannot be followed."""
        for name, rule, holds in self._rules():
            if not holds:
                raise HapError(f"recipe: {name} must be {rule}, found {getattr(self, name)!r}")

    def _rules(self) -> list[tuple[str, str, bool]]:
        return [
            ("epochs", "at least 1", self.epochs >= 1),
            ("lr", "positive and finite", 0 < self.lr < math.inf),
            ("momentum", "in [0, 1)", 0 <= self.momentum < 1),
            ("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("schedule", f"one of {', '.join(SCHEDULES)}", self.schedule in SCHEDULES),
            ("warmup_epochs", f"in [0, epochs = {self.epochs}]", 0 <= self.warmup_epochs <= self.epochs),
            ("nesterov", "false without momentum", not self.nesterov or self.momentum > 0),
        ]


class Event(str):
    """A line of progress; `fraction` of the stage is done, where that is known."""

    fraction: float | None

    def __new__(cls, text: str, fraction: float | None = None) -> "Event":
        """A string that carries the fraction."""
        event = super().__new__(cls, text)
        event.fraction = fraction
        return event


Say = Callable[[Event], None]


def silent(event: Event) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Curve:
    """What happened in each epoch: a row of numbers and the state of the model, on the CPU."""

    epochs: list[dict[str, Any]]
    snapshots: list[State]

    @property
    def selected(self) -> int:
        """The epoch of best validation accuracy; of equals, that of lower loss, then the earlier."""
        found = [row["validation"] for row in self.epochs]
        return max(range(len(found)), key=lambda i: (found[i]["accuracy"], -found[i]["loss"], -i))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(model: nn.Module, task: Task, recipe: Recipe, *, rng: torch.Generator, say: Say = silent) -> Curve:
    """Trains the model in place and returns the curve; HapError if the loss stops being a number."""
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )
    curve = Curve([], [])
    with threads(task.threads):
        for epoch in range(recipe.epochs):
            row = _row(model, task, recipe, optimiser, epoch, rng)
            curve.epochs.append(row)
            curve.snapshots.append(snapshot(model))
            say(Event(_line(row, recipe), (epoch + 1) / recipe.epochs))
    return curve


def _row(
    model: nn.Module, task: Task, recipe: Recipe, optimiser: torch.optim.SGD, epoch: int, rng: torch.Generator
) -> dict[str, Any]:
    start = time.perf_counter()
    loss, lr = _epoch(model, task, recipe, optimiser, epoch, rng)
    if not math.isfinite(loss):
        raise HapError(
            f"{task.name}: the training loss must be finite, found {loss} in epoch {epoch + 1} of {recipe.epochs} "
            f"at learning rate {lr:.3g}; lower finetune.lr or set finetune.warmup_epochs"
        )
    row = {"epoch": epoch, "lr": lr, "train_loss": loss, "validation": task.evaluate(model, "validation")}
    return {**row, "seconds": time.perf_counter() - start}


def _epoch(
    model: nn.Module, task: Task, recipe: Recipe, optimiser: torch.optim.SGD, epoch: int, rng: torch.Generator
) -> tuple[float, float]:
    """Mean loss over the samples of one epoch, and its last learning rate."""
    model.train()
    steps = math.ceil(task.train_size / recipe.batch_size)
    total, samples, lr = torch.zeros(()), 0, recipe.lr
    for step, (inputs, targets) in enumerate(task.train(recipe.batch_size, rng)):
        lr = optimiser.param_groups[0]["lr"] = learning_rate(recipe, epoch + step / steps, 1 / steps)
        loss = task.loss(model, (inputs, targets))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        # kept on the device: reading it here would make every step wait for the last
        total = total.to(loss.device) + loss.detach() * len(targets)
        samples += len(targets)
    optimiser.zero_grad(set_to_none=True)
    return float(total) / samples, lr


def learning_rate(recipe: Recipe, epochs: float, ahead: float = 0.0) -> float:
    """The learning rate after `epochs`, fractions included; a warm-up counts the step `ahead` as taken."""
    done = epochs / recipe.epochs
    factor = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
    }[recipe.schedule]
    warm = min(1.0, (epochs + ahead) / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    return recipe.lr * factor * warm


def snapshot(model: nn.Module) -> State:
    """A copy of the model's state on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def generator(seed: int, purpose: str = "") -> torch.Generator:
    """A stream of random numbers that belongs to this seed and this purpose alone."""
    digest = sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _line(row: dict[str, Any], recipe: Recipe) -> str:
    found = row["validation"]
    return (
        f"epoch {row['epoch'] + 1}/{recipe.epochs}: loss {row['train_loss']:.3f}, "
        f"validation {found['accuracy']:.2f} % (lr {row['lr']:.2g})"
    )
