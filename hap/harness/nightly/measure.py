"""What a night measures: specs with fresh seeds, the works of the benchmarks -> rows of the history; judges nothing.

A run is deterministic under its seed, so the seeds of a spec would say the same every night and nothing of chance. A
night draws as many seeds from its own name: its numbers are new samples of what the spec says, and the same night
begun again repeats them.
"""

import json
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from hap import HapError
from hap.harness.make import Job, alone, attempt
from hap.harness.nightly import speed
from hap.harness.nightly.history import SPEED, Row
from hap.harness.processes import provenance
from hap.harness.processes.files import atomic_write, cache, caching
from hap.harness.processes.progress import Say, Step
from hap.harness.processes.workers import Executor, Known
from hap.harness.records.record import Run
from hap.harness.spec.functions import ready
from hap.harness.spec.spec import STAGELESS, Case, Claim, Spec, require
from hap.harness.task import MissingData
from hap.harness.train.loop import threads
from hap.harness.verdicts.measures import value

WATCHED = ("one_shot", "selected")  # stages whose main metric is kept of every case, claimed or not


@dataclass
class Made:
    """What came of a night: rows, what was left out and why, and what broke with its traceback."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)


def name(taken: Iterable[str], today: str | None = None) -> str:
    """The name of a new night: the date in UTC, and a number where the history has that."""
    day = today or datetime.now(UTC).strftime("%Y-%m-%d")
    names, number, found = set(taken), 1, day
    while found in names:
        number += 1
        found = f"{day}.{number}"
    return found


def checked(night: str) -> str:
    """The name, which is that of a folder too; HapError where it could be one anywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", night):
        raise HapError(f"--night {night}: must be of letters, digits, '.', '_' and '-', the first a letter or digit")
    return night


def begin(taken: Iterable[str], specs: Iterable[Spec], made: Made, night: str | None = None) -> str:
    """The night to measure: the one that is named, else one of these specs that was interrupted, else a new one.

    Runs of other code are not today's: a night that it began is dropped and noted, and refused where it is named.
    """
    asked = {"specs": sorted(spec.name for spec in specs), "code": provenance.code()["sha256"]}
    chosen = None
    for place in sorted(cache().glob("nightly/*/night.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        begun, found = place.parent.name, _begun(place)
        if begun in taken or found.get("specs") != asked["specs"] or (night is not None and begun != night):
            continue
        if found.get("code") == asked["code"]:
            chosen = chosen or begun
        elif night is not None:
            raise HapError(f"--night {night}: was begun by other code; choose another name")
        else:
            made.notes.append(f"night {begun} was begun by other code and never ended: its runs are dropped")
            forget(begun)
    chosen = night or chosen or name(taken)
    atomic_write(folder(chosen) / "night.json", json.dumps(asked).encode())
    return chosen


def _begun(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        found = None  # written by a disk that was full
    return found if isinstance(found, dict) else {}


def seeds(night: str, spec: Spec) -> list[int]:
    """As many seeds as the spec has, drawn from the names of the night and the spec."""
    texts = [f"{night}/{spec.name}/{i}" for i in range(len(spec.first))]
    return [int.from_bytes(sha256(text.encode()).digest()[:4], "big") for text in texts]


def folder(night: str) -> Path:
    """Where the records of a night lie until its rows are in the history."""
    return cache() / "nightly" / night


def forget(night: str) -> None:
    """Removes the records of a night, whose rows are in the history."""
    shutil.rmtree(folder(night), ignore_errors=True)


def runnable(specs: Mapping[Path, Spec], notes: list[str]) -> dict[Path, Spec]:
    """Those of the specs that this machine can run; `notes` takes why the others are left out."""
    found = {}
    for path, spec in specs.items():
        try:
            require(spec)
            for task in {str(case.task): case.task for case in spec.cases.values()}.values():
                ready(task, spec.seeds[0])
            found[path] = spec
        except MissingData as error:
            notes.append(f"{spec.name} is left out: {error}")
    return found


def parts(specs: Iterable[Spec], timed: bool) -> int:
    """How many steps a night of these specs has."""
    return sum(len(spec.cases) * len(spec.first) for spec in specs) + timed


def measure(
    night: str, specs: Mapping[Path, Spec], root: Path | None, made: Made, executor: Executor, step: Step
) -> None:
    """Runs every case of the specs with the seeds of the night, then the works of the checkout `root`, into `made`.

    What breaks is noted, be it the process that makes a record, and the rest goes on.
    """
    place = folder(night)
    wanted = [
        (path, spec, case, seed)
        for path, spec in specs.items()
        for seed in seeds(night, spec)
        for case in spec.cases.values()
    ]
    with caching(place / "cache"):
        for path, spec, case, seed in wanted:
            command = alone(path, case, seed, Path("elsewhere"))  # what the night keeps goes when it is over
            job = Job(case, seed, place / "results", alone=command)
            with _surviving(f"{spec.name} {job.name}", made), step(f"{spec.name} {job.name}") as say:
                made.rows.extend(of_run(night, spec, case, attempt(job, executor, say)))
        if root is not None:
            with _surviving("benchmarks", made), step("benchmarks") as say:
                made.rows.extend(executor(of_works, night, root, say=say))


def of_run(night: str, spec: Spec, case: Case, run: Run) -> Iterator[Row]:
    """The rows of a record: a row for each claim it bears on, and of what is watched and not claimed."""
    where = {"device": run.environment["device"], "cpu": provenance.processor()}
    where |= {part: run.environment[part] for part in ("threads", "torch")}
    for claim in watched(spec, case):
        yield Row(
            night=night,
            spec=spec.name,
            claim=claim.text,
            case=case.name,
            key=case.key,
            metric=claim.metric,
            stage="" if claim.metric in STAGELESS else claim.stage,
            seed=run.seed,
            value=float(value(run, claim)),
            commit=run.code["commit"],
            dirty=run.code["dirty"],
            code=run.code["sha256"],
            machine=where,
            data=run.data["sha256"],
        )


def watched(spec: Spec, case: Case) -> list[Claim]:
    """The claims that a case decides, and without a text the main metric at each stage of WATCHED."""
    found = [claim for claim in spec.claims if case.name in (claim.case, claim.against)]
    seen = {(claim.metric, claim.stage) for claim in found}
    for stage in WATCHED:
        if (spec.metric, stage) not in seen:
            of: dict[str, Any] = {"case": case.name, "metric": spec.metric, "stage": stage, "op": ">=", "value": 0.0}
            found.append(Claim.model_construct(text="", source="", against=None, **of))
    return found


def of_works(night: str, root: Path, known: Known, say: Say) -> list[Row]:
    """The rows of the benchmarks, a ratio each."""
    with threads(speed.THREADS):
        found = speed.ratios(speed.works(root), speed.product())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    where: dict[str, str | int] = {"device": device, "cpu": provenance.processor(), "threads": speed.THREADS}
    where["torch"] = torch.__version__
    code = provenance.code()
    return [
        Row(
            night=night,
            spec=SPEED,
            claim="",
            case=work,
            key="",
            metric="ratio",
            stage="",
            seed=None,
            value=ratio,
            commit=code["commit"],
            dirty=code["dirty"],
            code=code["sha256"],
            machine=where,
            data="",
        )
        for work, ratio in found.items()
    ]


@contextmanager
def _surviving(what: str, made: Made) -> Iterator[None]:
    """Notes what breaks within it; whatever a stranger's function raises, the other parts of the night go on."""
    try:
        yield
    except MissingData as error:
        made.notes.append(f"{what} is left out: {error}")
    except HapError as error:
        made.broken.append((what, str(error)))
    except Exception:
        made.broken.append((what, traceback.format_exc()))
