"""Run <-> results/<spec>/<case>-<key>/seed<k>.json, whole or not at all; does not know what a run means.

It does not know how a run is made.
"""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hap import HapError
from hap.harness.processes.files import atomic_write
from hap.harness.records import outcomes
from hap.harness.records.parts import Parts
from hap.harness.records.record import Run
from hap.harness.spec.functions import mistake, wrong
from hap.harness.spec.spec import Case, Spec

RUN = TypeAdapter(Run)
STAGES = ("dense", "one_shot", "selected", "last", "best_test_epoch")


def path(results: Path, case: Case, seed: int) -> Path:
    """Where the evidence of a case and a seed lies."""
    return results / case.spec / f"{case.name}-{case.key}" / f"seed{seed}.json"


def load(file: Path) -> Run:
    """The record of a file; HapError names the file, the rule and what was found if it is damaged or foreign."""
    try:
        run = _read(file.read_bytes())
        _belongs(run, file)
        run = replace(run, outcomes=outcomes.attached(run.outcomes, file.resolve().parents[1]))
    except OSError as error:
        raise HapError(f"{file}: a record must be readable (found {error.strerror})") from None
    except HapError as error:
        raise HapError(f"{file}: damaged record: {error}; delete it or run again with --again") from None
    return run


def save(run: Run, results: Path) -> Path:
    """Writes a record whole or not at all, and returns where."""
    file = results / run.spec / f"{run.case}-{run.key}" / f"seed{run.seed}.json"
    table = asdict(run) | {"outcomes": outcomes.detached(run.outcomes, file.parents[1])}
    atomic_write(file, (json.dumps(table, indent=1) + "\n").encode())
    return file


def evidence(spec: Spec, results: Path, cases: Sequence[str | None] | None = None) -> dict[str, list[Run]]:
    """The records there are of a spec, or of some of its cases, by case and in the order of the seeds."""
    wanted = [case for case in spec.cases.values() if cases is None or case.name in cases]
    folders = {case.name: path(results, case, 0).parent for case in wanted}  # a key takes longer than a look at a disk
    files = {name: [folder / f"seed{seed}.json" for seed in spec.seeds] for name, folder in folders.items()}
    return {name: [load(file) for file in each if file.exists()] for name, each in files.items()}


def _read(content: bytes) -> Run:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise wrong("file", "must be JSON", str(error)) from None
    if not isinstance(table, dict) or table.get("schema") != Run.schema:
        raise wrong("schema", f"must be {Run.schema}", table.get("schema") if isinstance(table, dict) else table)
    needed = {field.name for field in fields(Run) if field.default_factory is MISSING}
    if unknown := (table.keys() - {field.name for field in fields(Run)}) | (needed - {"schema"} - table.keys()):
        raise wrong("fields", "must be exactly those of a Run", sorted(unknown))
    try:
        run = RUN.validate_json(content, strict=True)
    except ValidationError as error:
        raise mistake("", error) from None
    _whole(run)
    try:
        Parts.model_validate(run, from_attributes=True)
    except ValidationError as error:
        raise mistake("", error) from None
    return run


def _whole(run: Run) -> None:
    for where, parts, needed in (("metrics", run.metrics, STAGES), ("cost", run.cost, ("dense", "pruned"))):
        if missing := set(needed) - parts.keys():
            raise wrong(where, f"must have {', '.join(needed)}; missing", sorted(missing))
    for stage in STAGES:
        if missing := {"accuracy", "loss"} - run.metrics[stage].keys():
            raise wrong(f"metrics.{stage}", "must have accuracy and loss; missing", sorted(missing))


def _belongs(run: Run, file: Path) -> None:
    case, _, key = file.parent.name.rpartition("-")
    place = {"spec": file.parent.parent.name, "case": case, "key": key, "seed": file.stem.removeprefix("seed")}
    for field, value in place.items():
        if str(getattr(run, field)) != value:
            raise wrong(field, f"must be that of its path, {value}", getattr(run, field))
