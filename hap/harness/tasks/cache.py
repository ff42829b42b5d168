"""Trained weights kept on disk under everything that decides them; knows nothing of how they are trained."""

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from hap.harness.processes import ranks
from hap.harness.processes.files import atomic_write, cache, locked


class Trained(NamedTuple):
    """What came of a training."""

    weights: dict[str, Tensor]
    notes: list[str]  # what the record of a run must say of it


def cached(
    name: str,
    seed: int,
    decides: Sequence[object],
    sources: Sequence[ModuleType],
    train: Callable[[Path], Trained],
) -> Trained:
    """What `train(folder)` gave, from $HAP_CACHE or ./.hap where they lie undamaged.

    The folder is for what a training that is killed goes on from; it goes when the weights are there.

    Named by the seed, the values in `decides`, the text of the modules in `sources` and the version of torch: a change
    of any of them trains anew.
    """
    texts = [repr(value) for value in decides] + [inspect.getsource(module) for module in sources]
    key = sha256("\0".join([torch.__version__, str(seed), *texts]).encode()).hexdigest()[:16]
    file = cache() / f"{name}-seed{seed}-{key}.safetensors"
    found = partial(_undamaged, file)
    content = ranks.shared(found)
    if content is None:
        with ranks.held(partial(locked, file)):
            content = ranks.shared(found) or _made(file, train)  # another process may have been faster
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return Trained(load(content), json.loads(header["__metadata__"]["notes"]))


def _made(file: Path, train: Callable[[Path], Trained]) -> bytes:
    folder = file.with_suffix(".training")
    weights, notes = train(folder)
    content = save({key: value.contiguous() for key, value in weights.items()}, {"notes": json.dumps(notes)})

    def keep() -> bytes:
        atomic_write(file, content)
        atomic_write(_beside(file), sha256(content).hexdigest().encode())
        shutil.rmtree(folder, ignore_errors=True)
        return content

    return ranks.shared(keep)


def _undamaged(file: Path) -> bytes | None:
    try:
        content, expected = file.read_bytes(), _beside(file).read_bytes()
    except OSError:
        return None
    return content if sha256(content).hexdigest().encode() == expected.strip() else None


def _beside(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")
