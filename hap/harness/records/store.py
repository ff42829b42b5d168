"""Run <-> results/<spec>/<case>-<key>/seed<k>.json, and a pruned model <-> a folder: whole or not at all.

Does not know what a run means. A file lock, which the system releases when a process dies, keeps two processes from
making the same record. A model is two files, its weights as safetensors and what its modules are as JSON; nothing is
pickled.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor, nn

import hap.harness.run as procedure
from hap import HapError
from hap.harness.models.architecture import describe, fill, rebuild, tensors
from hap.harness.processes import ranks
from hap.harness.processes.files import atomic_write, atomic_writes, cache, is_locked, locked
from hap.harness.records import outcomes
from hap.harness.records.parts import Parts
from hap.harness.run import Run
from hap.harness.spec.functions import mistake, wrong
from hap.harness.spec.spec import Case, Spec
from hap.harness.train.loop import Say, silent

STAGES = ("dense", "one_shot", "selected", "last", "best_test_epoch")
Loaded = TypeVar("Loaded")
MODEL_SCHEMA = 1
MODEL_FIELDS = {"schema", "class", "sha256", "architecture"}


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


def ensure(case: Case, seed: int, results: Path, *, again: bool = False, say: Say = silent) -> Run:
    """The record of a case and a seed: the one that is there, else made now; `again` makes it anew.

    A fine-tuning that was killed goes on from its last epoch, which lies in the cache until the record is there.
    """
    file = path(results, case, seed)
    if ranks.shared(file.exists) and not again:
        return ranks.shared(partial(load, file))
    training = cache() / "training" / case.spec / f"{case.name}-{case.key}-seed{seed}"
    with (
        ranks.held(partial(locked, file)),
        ranks.held(partial(locked, training)),
    ):  # two may write to two places, and train the same
        if again or not ranks.shared(file.exists):  # another process may have made it while this one waited
            made = procedure.run(case, seed, say=say, keep=training)
            ranks.shared(partial(save, made, results))
        ranks.shared(partial(shutil.rmtree, training, ignore_errors=True))
    return ranks.shared(partial(load, file))


def busy(results: Path, case: Case, seed: int) -> bool:
    """Whether another process is making this record."""
    return is_locked(path(results, case, seed))


def evidence(spec: Spec, results: Path, cases: Sequence[str | None] | None = None) -> dict[str, list[Run]]:
    """The records there are of a spec, or of some of its cases, by case and in the order of the seeds."""
    wanted = [case for case in spec.cases.values() if cases is None or case.name in cases]
    files = {case.name: [path(results, case, seed) for seed in spec.seeds] for case in wanted}
    return {name: [load(file) for file in each if file.exists()] for name, each in files.items()}


def save_model(model: nn.Module, original: nn.Module, folder: Path | str) -> Path:
    """Writes a pruned model as model.safetensors and model.json, and returns the folder.

    `original`: a fresh instance of the class, as the function will make it that is given to `load_model`. HapError
    where the model is more than surgery, and implants of known modules, make of it; or where it cannot be written.
    """
    folder = Path(folder)
    record, weights = folder / "model.json", folder / "model.safetensors"
    try:
        architecture = describe(model, original)
        values = {name: t.detach().cpu().clone().contiguous() for name, t in tensors(model).items()}
        content = pack(values)
    except (HapError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise HapError(f"{weights}: the model cannot be saved: {' '.join(str(error).split())}") from None
    table = {
        "schema": MODEL_SCHEMA,
        "class": f"{type(original).__module__}.{type(original).__qualname__}",
        "sha256": sha256(content).hexdigest(),
        "architecture": architecture,
    }
    atomic_writes({weights: content, record: (json.dumps(table, indent=1) + "\n").encode()})
    return folder


def load_model(folder: Path | str, build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `save_model` wrote, to the last bit, where `build` makes a fresh instance of the original class.

    HapError names the file, the rule and what was found where one is missing, damaged, or of another class.
    """
    folder = Path(folder)
    record, weights = folder / "model.json", folder / "model.safetensors"
    table = _checked(record, lambda: _model_table(record.read_bytes()))
    values = _checked(weights, lambda: _weights(weights.read_bytes(), table["sha256"]))
    fresh = build()
    if not isinstance(fresh, nn.Module):
        raise HapError(f"{folder}: build must return a module (found {type(fresh).__name__})")
    model = _checked(record, lambda: rebuild(fresh, table["architecture"]))
    _checked(weights, lambda: fill(model, values))
    return model


def _checked(file: Path, step: Callable[[], Loaded]) -> Loaded:
    try:
        return step()
    except OSError as error:
        raise HapError(f"{file}: a saved model must be readable (found {error.strerror})") from None
    except HapError as error:
        raise HapError(f"{file}: damaged, or of another model: {error}") from None


def _weights(content: bytes, digest: Any) -> dict[str, Tensor]:
    if (found := sha256(content).hexdigest()) != digest:
        raise wrong("sha256", f"must be that in model.json, {digest!s:.16}", found[:16])
    try:
        return unpack(content)
    except SafetensorError as error:
        raise wrong("file", "must be safetensors", str(error)) from None


def _model_table(content: bytes) -> dict[str, Any]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise wrong("file", "must be JSON", str(error)) from None
    if not isinstance(table, dict) or table.get("schema") != MODEL_SCHEMA:
        found = table.get("schema") if isinstance(table, dict) else table
        raise wrong("schema", f"must be {MODEL_SCHEMA}", found)
    if table.keys() != MODEL_FIELDS:
        raise wrong("fields", f"must be {', '.join(sorted(MODEL_FIELDS))}", sorted(table))
    if not isinstance(table["architecture"], dict):
        raise wrong("architecture", "must be a table", table["architecture"])
    return table


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
        run = TypeAdapter(Run).validate_json(content, strict=True)
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
