"""What this machine can run: versions, device, and for each spec whether its data is here; changes nothing."""

import platform
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch

from hap import HapError, __version__
from hap.harness.binding import Ref
from hap.harness.spec import Spec, load_spec
from hap.harness.tasks import Data


def lines(specs: Sequence[Path]) -> Iterator[str]:
    """A line for the machine's every part, each workload, and each spec."""
    yield f"hap {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    yield f"device: {device()}"
    found: dict[str, HapError | None] = {}
    for path in specs:
        try:
            spec = load_spec(path)
        except HapError as error:
            yield f"spec {path.stem}: NO, {error}"
            continue
        for task in {str(case.task): case.task for case in spec.cases.values()}.values():
            if str(task) not in found:
                found[str(task)], told = _look(task, spec.seeds[0])
                yield told
        yield f"spec {spec.name}: {_fit(spec, found)}"


def device() -> str:
    """The device there is, and the threads of the CPU."""
    threads = f"CPU with {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {threads}" if torch.cuda.is_available() else f"no GPU, {threads}"


def ready(task: Ref, seed: int) -> Data:
    """The data of a workload, read; a task module may offer `ready(**options)` where its task takes long to make."""
    quick = getattr(import_module(task.use.partition(":")[0]), "ready", None)
    data = quick(**task.options) if quick is not None else task.load()(seed, **task.options).data
    assert isinstance(data, Data)
    return data


def _look(task: Ref, seed: int) -> tuple[HapError | None, str]:
    try:
        data = ready(task, seed)
    except HapError as error:  # missing or damaged: the error says where it was looked for and how to get it
        return error, f"workload {task.use}: NO, {error}"
    copy = "official" if data.official else "UNOFFICIAL copy"
    return None, f"workload {task.use}: found {data.name} ({copy}), sha256 {data.sha256[:16]}, {data.note}"


def _fit(spec: Spec, found: dict[str, HapError | None]) -> str:
    if any(found[str(case.task)] for case in spec.cases.values()):
        return "NO, its workload is missing"
    if spec.tier == "gpu" and not torch.cuda.is_available():
        return "NO, it needs a GPU"
    return f"yes: hap run {spec.name}"
