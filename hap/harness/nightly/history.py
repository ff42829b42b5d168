"""The history of the nights: JSON lines, one row a claim, case, metric and seed; only ever added to.

A file is read whole or not at all, and written whole or not at all, so that a damaged line is told and mended by a
person, and neither a crash nor a full disk costs a night. Does not know what a regression is.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from hap import HapError
from hap.harness.processes.files import atomic_write, locked
from hap.harness.spec.functions import mistake, wrong
from hap.harness.spec.spec import Metric

SCHEMA = 1
PER_NIGHT = ("speedup", "ratio")  # timings of one night share its load: their median is one number
SPEED = "speed"  # stands where a row of a benchmark has no spec


class Series(NamedTuple):
    """What is compared from night to night; timings are of one machine, other numbers of one kind of device."""

    spec: str
    case: str
    key: str
    metric: str
    stage: str
    data: str
    machine: str

    @property
    def name(self) -> str:
        """The series as a person names it; its key, data and machine are left out."""
        return "/".join(part for part in (self.spec, self.case, self.metric, self.stage) if part)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of one night."""

    schema: int = SCHEMA
    night: str
    spec: str
    claim: str  # the text of the claim that the number bears on; empty where none does
    case: str
    key: str
    metric: Literal[Metric, "ratio"]
    stage: str
    seed: int | None
    value: float
    commit: str | None
    dirty: bool
    code: str  # sha256
    machine: dict[str, str | int]  # device, cpu, threads, torch
    data: str  # sha256

    @property
    def series(self) -> Series:
        """The series that the row belongs to."""
        parts = ("device", "cpu", "threads") if self.metric in PER_NIGHT else ("device",)
        machine = ", ".join(str(self.machine.get(part)) for part in parts)
        return Series(self.spec, self.case, self.key, self.metric, self.stage, self.data, machine)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A change that a person accepts: what a series was before this line is compared with no more."""

    schema: int = SCHEMA
    accepted: str  # the name of a series
    why: str


class Night(NamedTuple):
    """What a series was in one night: a number a seed, or one alone; and of which commit and torch."""

    name: str
    commit: str
    torch: str
    values: list[float]


def load(file: Path) -> list[Row | Accepted]:
    """The lines of a history, none where there is no file; HapError names the first that is damaged."""
    if not file.exists():
        return []
    found = list[Row | Accepted]()
    for number, line in enumerate(_lines(file), start=1):
        try:
            found.append(_read(line))
        except HapError as error:
            raise HapError(
                f"{file}: line {number}: {error}; nothing was changed: mend the line, or take it out"
            ) from None
    return found


def append(file: Path, rows: Iterable[Row | Accepted]) -> None:
    """Adds lines, all or none; another process that adds at the same time is waited for."""
    added = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows).encode()
    with locked(file):
        load(file)  # nothing is put behind a damaged line
        atomic_write(file, b"".join(line + b"\n" for line in _lines(file)) + added)


def series(lines: Sequence[Row | Accepted]) -> dict[Series, list[Night]]:
    """Each series with its nights in their order, from where its last change was accepted."""
    seeds: dict[Series, dict[str, dict[int | None, list[Row]]]] = {}
    for line in lines:
        if isinstance(line, Accepted):
            seeds = {each: nights for each, nights in seeds.items() if each.name != line.accepted}
        else:
            # a number that bears on several claims has a row for each
            seeds.setdefault(line.series, {}).setdefault(line.night, {}).setdefault(line.seed, []).append(line)
    return {each: [_night(name, rows, each.metric) for name, rows in nights.items()] for each, nights in seeds.items()}


def nights(lines: Sequence[Row | Accepted]) -> list[str]:
    """The names of the nights, in their order."""
    return list(dict.fromkeys(line.night for line in lines if isinstance(line, Row)))


def _night(name: str, seeds: Mapping[int | None, list[Row]], metric: str) -> Night:
    from statistics import median

    rows = [rows[-1] for rows in seeds.values()]
    values = [row.value for row in rows]
    commit = f"{(rows[0].commit or 'an unknown commit')[:10]}{' with changes' if rows[0].dirty else ''}"
    torch = str(rows[0].machine.get("torch", "unknown"))
    return Night(name, commit, torch, [median(values)] if metric in PER_NIGHT else values)


def _lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().splitlines() if file.exists() else []
    except OSError as error:
        raise HapError(f"{file}: a history must be readable (found {error.strerror})") from None


def _read(line: bytes) -> Row | Accepted:
    try:
        table: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong("damaged", "must be JSON", str(error)) from None
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise wrong("schema", f"must be {SCHEMA}", table.get("schema") if isinstance(table, dict) else table)
    kind: type[Row] | type[Accepted] = Accepted if "accepted" in table else Row
    if strange := table.keys() ^ set(kind.__dataclass_fields__):
        raise wrong("fields", f"must be exactly those of {kind.__name__}", sorted(strange))
    try:
        row = TypeAdapter[Row | Accepted](kind).validate_json(line, strict=True)
    except ValidationError as error:
        raise mistake("", error) from None
    if isinstance(row, Row) and not math.isfinite(row.value):
        raise wrong("value", "must be a finite number", row.value)
    return row
