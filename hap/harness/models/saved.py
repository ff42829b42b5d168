"""A pruned model <-> a folder of two files: its weights as safetensors, and what its modules are as JSON; no pickle."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor, nn

from hap import HapError
from hap.harness.models.architecture import describe, fill, rebuild, tensors
from hap.harness.processes.files import atomic_writes
from hap.harness.spec.functions import wrong

Loaded = TypeVar("Loaded")
MODEL_SCHEMA = 1
MODEL_FIELDS = {"schema", "class", "sha256", "architecture"}


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
