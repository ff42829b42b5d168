"""The one training loop: SGD, a schedule, validation after each epoch, selection; does not know what it trains."""

import math
from dataclasses import dataclass

from hap import HapError

SCHEDULES = ("step", "cosine", "constant")


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
