"""Where a training was after each epoch, on disk: safetensors and JSON, whole or not at all; does not train.

An epoch is two files of tensors (the model; what the optimiser and the random numbers need) and then one of JSON that
names their sha256, so that a process killed at any moment leaves the last epoch that is complete. The last two epochs
are kept whole, so that damage to the last loses an epoch and not the run; of earlier ones the model alone, where asked
for, and damage to one of those begins the training anew.
"""

import json
import shutil
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hap.harness.processes.files import atomic_write

State = dict[str, Tensor]
SCHEMA = 1
KEPT = 2  # epochs that can be gone on from


class Foreign(ValueError):  # noqa: N818  (it is a file, not an error)
    """What another training kept."""


class Point(NamedTuple):
    """A training after an epoch."""

    rows: list[dict[str, Any]]  # of the epochs so far
    model: State
    trainer: State  # what else decides how it goes on
    micro_batch: int
    notes: list[str]


@dataclass
class Keeper:
    """The folder of one training; `identity` names everything that decides it."""

    folder: Path
    identity: str
    every: bool  # whether the model after each epoch is kept
    told: list[str] = field(default_factory=list)

    def save(self, point: Point) -> None:
        """Adds the last epoch of `point`; HapError, and nothing lost, where the disk is full."""
        number = len(point.rows)
        files = {"model": save(_whole(point.model)), "trainer": save(_whole(point.trainer))}
        for name, content in files.items():
            atomic_write(self._file(number, f"{name}.safetensors"), content)
        written = {
            "schema": SCHEMA,
            "identity": self.identity,
            "rows": point.rows,
            "micro_batch": point.micro_batch,
            "notes": point.notes,
            "sha256": {name: sha256(content).hexdigest() for name, content in files.items()},
        }
        atomic_write(self._file(number, "json"), (json.dumps(written) + "\n").encode())
        self._forget(number - KEPT)

    def load(self) -> Point | None:
        """The last epoch that is whole; None where there is none. What was passed over is told in `told`."""
        for number in sorted(self._numbers(), reverse=True):
            try:
                return self._read(number)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                found = " ".join(str(error).split())[:120]
                self.told.append(f"{self._file(number, 'json')}: passed over, {type(error).__name__}: {found}")
                if isinstance(error, Foreign):  # then all of them are
                    break
        return None

    def model(self, number: int) -> State:
        """The model after epoch `number`, which counts from 1."""
        return self._part(number, "model", json.loads(self._file(number, "json").read_bytes()))

    def clear(self) -> None:
        """Removes the folder: what came of the training is kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, number: int) -> Point:
        table = json.loads(self._file(number, "json").read_bytes())
        if table["schema"] != SCHEMA or table["identity"] != self.identity:
            raise Foreign("of another training: its code, data, recipe, seed or machine differs")
        if len(table["rows"]) != number:
            raise ValueError(f"{number} epochs expected, found {len(table['rows'])}")
        for earlier in range(1, number) if self.every else ():
            self.model(earlier)
        model, trainer = (self._part(number, name, table) for name in ("model", "trainer"))
        return Point(table["rows"], model, trainer, table["micro_batch"], table["notes"])

    def _part(self, number: int, name: str, table: dict[str, Any]) -> State:
        content = self._file(number, f"{name}.safetensors").read_bytes()
        if sha256(content).hexdigest() != table["sha256"][name]:
            raise ValueError(f"the sha256 of {name} in epoch {number} is not the one noted")
        return load(content)

    def _forget(self, last: int) -> None:
        """Drops what the epochs up to `last` need no more."""
        for number in self._numbers():
            if number <= last:
                self._file(number, "trainer.safetensors").unlink(missing_ok=True)
                for name in () if self.every else ("json", "model.safetensors"):
                    self._file(number, name).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        return [int(file.name[6:10]) for file in self.folder.glob("epoch-[0-9][0-9][0-9][0-9].json")]

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"epoch-{number:04}.{suffix}"


def _whole(state: State) -> State:
    return {name: value.contiguous() for name, value in state.items()}
