"""The one training loop: SGD, a schedule, validation after each epoch, selection; does not know what it trains.

Nothing within an epoch waits for the device: the data lies there, and the loss is read when the epoch is over. With a
folder, every epoch is kept there, and a training that was killed goes on from the last one to the same result. Several
ranks share each batch, and end with what one would have, but for rounding.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hap import HapError
from hap.harness.batchnorm import synchronised
from hap.harness.processes import ranks
from hap.harness.processes.progress import Event, Say, silent
from hap.harness.processes.provenance import code, environment
from hap.harness.processes.workers import Broken
from hap.harness.task import Task
from hap.harness.train.checkpoints import Keeper, Point
from hap.harness.train.checkpoints import State as State
from hap.harness.train.ema import averaging
from hap.harness.train.exact import exactly as exactly
from hap.harness.train.exact import undetermined
from hap.harness.train.recipe import Recipe as Recipe
from hap.harness.train.recipe import learning_rate as learning_rate
from hap.harness.train.step import Stepper, dropping, memory_ran_out, optimiser
from hap.harness.train.step import threads as threads
from hap.structure.kernels import sound


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


Fit = Callable[..., Curve]  # what trains a model, called as `fit` is


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    rng: torch.Generator,
    say: Say = silent,
    keep: Path | None = None,
    snapshots: bool = True,
) -> Curve:
    """Trains the model in place and returns the curve; HapError if the loss stops being a number.

    `keep`: a folder for each epoch, which must be this training's own; what is whole there is gone on from.
    `snapshots`: whether the curve has the model after each epoch.
    """
    if recipe.distil is not None and task.model is model:
        raise HapError(f"{task.name}: recipe.distil needs a dense model to learn from, found the model that is trained")
    with threads(task.threads), exactly(), synchronised(model), sound(model):
        trainer = _Trainer(model, task, recipe, rng, say)
        keeper = None if keep is None else Keeper(keep, trainer.identity(snapshots), snapshots)
        states = trainer.resume(keeper)
        point = trainer.point()
        for epoch in range(len(trainer.rows), recipe.epochs + recipe.stabilise):
            trainer.epoch(epoch, point)
            point = trainer.point()
            if keeper is not None:
                ranks.shared(partial(keeper.save, point))
            if snapshots:
                states.append(_kept(keeper, epoch + 1) if keeper is not None else point.model)
    return Curve(trainer.rows, states, trainer.step.notes, task.metric)


@dataclass
class _Trainer:
    """A training between two epochs."""

    model: nn.Module
    task: Task
    recipe: Recipe
    rng: torch.Generator
    say: Say
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.step = Stepper(self.model, self.task, recipe, recipe.micro_batch or recipe.batch_size)
        self.optimiser = optimiser(self.model, recipe)

    def epoch(self, number: int, before: Point) -> None:
        """One epoch; again from `before` with smaller micro-batches where memory runs out, told once.

        Likewise with ops that have no deterministic algorithm, where the model calls any.
        """
        start, told = time.perf_counter(), len(self.step.notes)
        while True:
            try:
                loss, lr = self._pass(number) if number < self.recipe.epochs else self._stabilise()
                break
            except RuntimeError as error:
                line = undetermined(error)
                if line is None and not memory_ran_out(error):
                    raise
                # the other ranks are still waiting for this one, and would not begin the epoch again
                if line is not None:
                    self.step.accept(line)
                elif ranks.world() > 1 or not self.step.halve():
                    raise Broken(
                        f"{self.task.name}: memory ran out with micro-batches of {self.step.micro_batch} samples "
                        f"({' '.join(str(error).split())[:120]})"
                    ) from None
            self._restore(before)
            torch.cuda.empty_cache()
        if not math.isfinite(loss):
            raise HapError(
                f"{self.task.name}: the training loss must be finite, found {loss} in epoch {number + 1} of "
                f"{self.recipe.epochs} at learning rate {lr:.3g}; lower the learning rate or warm up longer"
            )
        found = self.task.evaluate(self.model, "validation")
        row = {"epoch": number, "lr": lr, "train_loss": loss, "validation": found}
        self.rows.append({**row, "seconds": time.perf_counter() - start})
        for note in self.step.notes[told:]:
            self.say(Event(f"warning: {note}"))
        self.say(
            Event(_line(self.rows[-1], self.recipe, self.task.metric), min(1.0, len(self.rows) / self.recipe.epochs))
        )

    def point(self) -> Point:
        """Where the training is, copied."""
        kept = {
            f"{name}.{i}": value.detach().to("cpu", copy=True)
            for i, found in self.optimiser.state_dict()["state"].items()
            for name, value in found.items()
            if isinstance(value, torch.Tensor)
        }
        trainer = {**kept, "rng": self.rng.get_state()}
        return Point(list(self.rows), snapshot(self.model), trainer, self.step.micro_batch, list(self.step.notes))

    def resume(self, keeper: Keeper | None) -> list[State | Callable[[], State]]:
        """Goes to the last epoch that was kept, and says so; the snapshots so far."""
        if keeper is None:
            return []
        point = ranks.shared(keeper.load)
        for line in keeper.told:
            self.say(Event(f"warning: {line}"))
        if point is None:
            ranks.shared(keeper.clear)
            return []
        self._restore(point)
        self.rows, self.step.micro_batch = list(point.rows), point.micro_batch
        self.step.notes += point.notes
        self.say(Event(f"goes on after epoch {len(self.rows)} of {self.recipe.epochs}"))
        return [_kept(keeper, i + 1) for i in range(len(self.rows))] if keeper.every else []

    def identity(self, snapshots: bool) -> str:
        """A digest of everything that decides the result, the code included."""
        task = self.task
        decides: list[Any] = [asdict(self.recipe), task.name, task.data.sha256, task.train_size, task.threads]
        decides += [snapshots, ranks.world()]
        machine = environment(next(self.model.parameters()).device)
        total = sha256(json.dumps([decides, machine, code()["sha256"]], sort_keys=True).encode())
        for state in (snapshot(self.model), {"rng": self.rng.get_state()}):
            for name, value in state.items():
                total.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def _restore(self, point: Point) -> None:
        self.model.load_state_dict(point.model)
        self.rng.set_state(point.trainer["rng"])
        self.optimiser.state.clear()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        for key, value in point.trainer.items():
            name, _, number = key.rpartition(".")
            if name:
                parameter = parameters[int(number)]
                # in the parameter's memory format
                kept = torch.empty_like(parameter).copy_(value) if value.dim() else value.clone().to(parameter.device)
                self.optimiser.state[parameter][name] = kept

    def _pass(self, epoch: int) -> tuple[float, float]:
        """Mean loss over the samples of one epoch, and its last learning rate."""
        self.model.train()
        steps = math.ceil(self.task.train_size / self.recipe.batch_size)
        total, samples, lr = torch.zeros(()), 0, self.recipe.lr
        self.optimiser.zero_grad(set_to_none=True)
        with dropping(self.model, self.rng), averaging(self.model, self.optimiser, self.recipe.ema):
            for step, (inputs, targets, whole) in enumerate(self._batches()):
                lr = learning_rate(self.recipe, epoch + step / steps, 1 / steps)
                for group in self.optimiser.param_groups:
                    group["lr"] = lr
                loss = self.step(inputs, targets, whole)
                if self.recipe.clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                # kept on the device: reading it here would make every step wait for the last
                total = total.to(loss.device) + loss * whole
                samples += whole
        return float(ranks.summed(total)) / samples, lr

    def _batches(self) -> Iterator[tuple[Any, Tensor, int]]:
        """This rank's part of each batch of an epoch, and how many samples the batch has."""
        left = self.task.train_size
        for inputs, targets in self.task.train(self.recipe.batch_size, self.rng):
            whole = min(left, self.recipe.batch_size) if self.task.sharded else len(targets)
            left -= whole
            if whole < ranks.world():
                self.step.note(f"batches of fewer than {ranks.world()} samples, one a rank, were left out")
                continue
            yield *((inputs, targets) if self.task.sharded else ranks.part(inputs, targets)), whole

    @torch.no_grad()
    def _stabilise(self) -> tuple[float, float]:
        """A pass in train mode without a step: the statistics of BatchNorm become those of the final weights.

        # upstream: does so after fine-tuning, and reports the better of the best epoch and this one.
        """
        self.model.train()
        total, samples = torch.zeros(()), 0
        for inputs, targets, whole in self._batches():
            loss = self.task.loss(self.model, (inputs, targets))
            total, samples = total.to(loss.device) + loss * len(targets), samples + whole
        return float(ranks.summed(total)) / samples, 0.0


def snapshot(model: nn.Module) -> State:
    """A copy of the model's state on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def generator(seed: int, purpose: str = "") -> torch.Generator:
    """A stream of random numbers that belongs to this seed and this purpose alone."""
    digest = sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _kept(keeper: Keeper, number: int) -> Callable[[], State]:
    """The model after an epoch, from the disk of rank 0."""
    return partial(ranks.shared, partial(keeper.model, number))


def _line(row: dict[str, Any], recipe: Recipe, metric: str) -> str:
    found = row["validation"]
    return (
        f"epoch {row['epoch'] + 1}/{recipe.epochs}: loss {row['train_loss']:.3f}, "
        f"validation {found[metric]:.2f} % (lr {row['lr']:.2g})"
    )
