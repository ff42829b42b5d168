"""How to train, as a spec gives it: everything that decides the result but the seed; does not train."""

import math
from dataclasses import dataclass
from itertools import pairwise

from hap import HapError

SCHEDULES = ("step", "cosine", "linear", "constant")


@dataclass(frozen=True)
class Recipe:
    """How to train. What is off is None or False, so that a switch that is added orphans no evidence."""

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128
    schedule: str = "step"  # "step" (a tenth at the milestones), "cosine", "linear" (to 0) or "constant"
    warmup_epochs: float = 0.0
    nesterov: bool = False
    autocast: str | None = None  # "bf16": convolutions and products in bfloat16, weights and loss in float32
    compile: bool = False  # torch.compile; without a compiler training goes on uncompiled, and says so
    micro_batch: int | None = None  # at most so many samples in one pass, the gradients of a batch added up
    distil: float | None = None  # the share of the loss that is against the dense model's outputs [Hinton15]
    temperature: float | None = None  # of the distillation; None is 4
    optimiser: str | None = None  # "adamw", whose decay spares biases and norms; None is SGD
    clip: float | None = None  # the largest norm of a step's gradient
    milestones: list[int] | None = None  # the epochs of the steps; None is 50 and 75 % of all
    label_smoothing: float | None = None  # of the loss that is trained on, and of no other
    ema: float | None = None  # decay a step of the weights' average, which is what is validated and selected
    stabilise: bool = False  # upstream: a last pass over the training data renews the statistics of BatchNorm

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
            ("autocast", "'bf16' where it is given", self.autocast in (None, "bf16")),
            ("micro_batch", "at least 1", self.micro_batch is None or self.micro_batch >= 1),
            ("optimiser", "'adamw' where it is given", self.optimiser in (None, "adamw")),
            ("nesterov", "false with adamw", not self.nesterov or self.optimiser is None),
            ("clip", "positive and finite", self.clip is None or 0 < self.clip < math.inf),
            ("distil", "above 0 and at most 1", self.distil is None or 0 < self.distil <= 1),
            ("temperature", "positive and finite", self.temperature is None or 0 < self.temperature < math.inf),
            ("milestones", "rising whole numbers from 1 on", _rising(self.milestones)),
            ("milestones", "left out where schedule is not step", not self.milestones or self.schedule == "step"),
            ("label_smoothing", "above 0 and below 1", self.label_smoothing is None or 0 < self.label_smoothing < 1),
            ("ema", "above 0 and below 1", self.ema is None or 0 < self.ema < 1),
            ("temperature", "left out without distil", self.temperature is None or self.distil is not None),
        ]


def learning_rate(recipe: Recipe, epochs: float, ahead: float = 0.0) -> float:
    """The learning rate after `epochs`, fractions included; a warm-up counts the step `ahead` as taken.

    Not torch.optim.lr_scheduler: its schedules are recursive, so that they drift from these by 2e-12, and have a state
    that a checkpoint would have to keep.
    """
    done = epochs / recipe.epochs
    steps = [each / recipe.epochs for each in recipe.milestones or ()] or [0.5, 0.75]
    factor = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "step": 0.1 ** sum(done >= each for each in steps),
    }[recipe.schedule]
    warm = min(1.0, (epochs + ahead) / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    return recipe.lr * factor * warm


def _rising(milestones: list[int] | None) -> bool:
    if milestones is None:
        return True
    return bool(milestones) and all(a < b for a, b in pairwise([0, *milestones]))
