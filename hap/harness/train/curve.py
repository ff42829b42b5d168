"""What came of a training, epoch by epoch, and which epoch is selected; does not train."""

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hap.harness.train.checkpoints import State


@dataclass(frozen=True)
class Curve:
    """What happened in each epoch: a row of numbers and the state of the model, on the CPU or on disk."""

    epochs: list[dict[str, Any]]
    snapshots: Sequence[State | Callable[[], State]]  # none where they were not asked for
    notes: list[str] = field(default_factory=list)  # what the record must say of the training
    metric: str = "accuracy"  # higher is better

    @property
    def selected(self) -> int:
        """The epoch of best validation; of equals, that of lower loss, then the earlier."""
        found = [row["validation"] for row in self.epochs]
        return max(range(len(found)), key=lambda i: (found[i][self.metric], -found[i]["loss"], -i))

    def states(self) -> Iterator[State]:
        """The snapshots, one at a time."""
        for each in self.snapshots:
            yield each() if callable(each) else each


# what is called in place of a training, (model, task, recipe, rng) -> Curve, where only its price is wanted
INSTEAD: ContextVar[Callable[..., Curve] | None] = ContextVar("INSTEAD", default=None)
