"""Workloads: a module a workload, a function `task(seed, *, options) -> Task` in it; knows nothing of pruning."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hap import HapError
from hap.hessian.losses import CrossEntropy

# takes the class that was said of each sample of a split, in its order, and the true ones
Seen = Callable[[Tensor, Tensor], None]


class MissingData(HapError):  # noqa: N818  (the CLI and the tests say what is missing, not that it is an error)
    """A data set or checkpoint that is not on this machine: what was looked for, where, and how to get it."""


@dataclass(frozen=True)
class Data:
    """Which bytes a task read, for the record."""

    name: str
    sha256: str
    official: bool
    note: str


@dataclass(frozen=True)
class Task:
    """A trained model and everything needed to score it, fine-tune it and judge it."""

    name: str
    model: nn.Module  # the trained dense model, eval mode
    loss: CrossEntropy
    batches: Sequence[tuple[Any, Tensor]]  # calibration: training samples without augmentation
    train: Callable[[int, torch.Generator], Iterator[tuple[Any, Tensor]]]  # one epoch, shuffled and augmented
    train_size: int  # the samples of one such epoch, so that a schedule can count its steps
    # "validation" | "test" -> accuracy (percent), loss (nats); to one that takes `seen: Seen` it is offered
    evaluate: Callable[..., dict[str, float]]
    example: Any  # one sample, batch axis of 1
    data: Data
    notes: tuple[str, ...] = ()  # what a record must say of how the model was trained
    metric: str = "accuracy"  # of those that `evaluate` gives, what epochs are selected by
    test_samples: int | None = None  # of the test set, for the error that its size leaves
    sharded: bool = False  # whether `train` gives each rank its own part of a batch, not all of it
    threads: int | None = None  # CPU threads that serve this size best; None leaves torch's setting
