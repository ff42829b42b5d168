"""A stranger's function in the place of HAP's: in the same cases, with the same budgets, seeds and data.

What is swapped is one role of HAP's cases (`ROLES`); all else stays. The runs lie in the cache, under the sources that
decide them; committed evidence is only read. Does not know what the runs say.
"""

import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from re import sub
from typing import Literal

from pydantic import ValidationError

from hap import HapError
from hap.harness.compare.differences import Difference, Pairs
from hap.harness.make import Job, attempt, ensure
from hap.harness.processes import provenance
from hap.harness.processes.files import atomic_writes, cache
from hap.harness.processes.progress import Say, Step
from hap.harness.processes.workers import Executor, Known
from hap.harness.records import store
from hap.harness.records.record import Run
from hap.harness.spec.functions import Ref, mistake, ready, resolve
from hap.harness.spec.spec import Case, Spec
from hap.harness.train.step import memory_ran_out

Role = Literal["score", "method", "implant"]
SCHEMA = 1
ROLES: tuple[Role, ...] = ("score", "method", "implant")


@dataclass(frozen=True)
class Rival:
    """A function in a role, with what decides its runs besides the case: its sources and ours."""

    role: Role
    ref: Ref
    sources: str

    @property
    def name(self) -> str:
        """The function as a part of a file name."""
        return sub(r"[^A-Za-z0-9_.]+", "-", self.ref.use)

    @property
    def folder(self) -> Path:
        """Where its runs lie, so that an interrupted comparison goes on, and one after an edit does not."""
        return cache() / "compare" / self.sources[:16]

    def inside(self, case: Case) -> Case:
        """The case with the function in its role."""
        parts = dict.fromkeys(("score", "method", "implant")) if self.role == "method" else {}
        suffix = "".join(case.name.partition("@")[1:])
        return case.model_copy(update={**parts, self.role: self.ref, "reference": None, "name": self.name + suffix})


def rival(use: str, options: Mapping[str, object], role: Role) -> Rival:
    """The function that `use` names, checked against its role and options before anything runs."""
    try:
        ref = Ref(use=use, options=dict(options))
    except ValidationError as error:
        raise mistake("function", error) from None
    resolve(use, role, ref)
    return Rival(role, ref, sha256(f"{_sources(use)}{provenance.code()['sha256']}".encode()).hexdigest())


def baselines(spec: Spec, role: Role, stem: str | None = None) -> list[Case]:
    """HAP's cases, one a budget: those called `stem`, by default like the first of the spec that has the role."""
    having = [case for case in spec.cases.values() if role == "method" or getattr(case, role) is not None]
    if not having:
        raise HapError(f"{spec.name}: a case with a {role} is needed to put another in its place, found none")
    chosen = stem or having[0].name.partition("@")[0]
    found = [case for case in having if chosen in (case.name, case.name.partition("@")[0])]
    if not found:
        names = dict.fromkeys(case.name.partition("@")[0] for case in having)
        raise HapError(f"--against {stem}: must be a case of {spec.name} with this role, one of {', '.join(names)}")
    return found


def committed(spec: Spec, cases: Sequence[Case], results: Path, rerun: bool = False) -> dict[str, list[Run]]:
    """The evidence of these cases; HapError where there is none, or where the data here are others than its."""
    found = store.evidence(spec, results, [case.name for case in cases])
    for case in cases:
        if not found[case.name]:
            raise HapError(f"{spec.name}: committed evidence of {case.name} expected, found none; `hap run` makes it")
        run = found[case.name][0]
        here = ready(case.task, run.seed).sha256
        if here != run.data["sha256"] and not rerun:
            raise HapError(
                f"{spec.name}: the data of the committed evidence expected, sha256 {run.data['sha256'][:16]}, "
                f"found {here[:16]}; --rerun runs HAP's cases here too"
            )
    return found


def ran(rival: Rival, case: Case, seed: int, executor: Executor, step: Step) -> Run:
    """The run of a rival in the place of a case: the one that is in the cache, else made now."""
    own = rival.inside(case)
    with step(f"{own.name} seed {seed}") as say, blaming(rival):
        return attempt(Job(own, seed, rival.folder), executor, say, partial(_blamed, rival))


def reran(case: Case, seed: int, executor: Executor, step: Step) -> Run:
    """The run of a case of ours, made here, in the cache too."""
    job = Job(case, seed, cache() / "compare" / provenance.code()["sha256"][:16])
    with step(f"{case.name} seed {seed}") as say:
        return attempt(job, executor, say)


def _blamed(rival: Rival, job: Job, known: Known, say: Say) -> Run:
    with blaming(rival):
        return ensure(job, known, say)


def record(
    spec: Spec, rival: Rival, pairs: Sequence[Pairs], found: Sequence[Difference], text: str, results: Path
) -> list[Path]:
    """Writes results/compare/<spec>/<function>-<key>.json, with all runs of the rival, and .md; no spec reads them."""
    keys = [rival.inside(each.case).key for each in pairs]
    stem = results / "compare" / spec.name / f"{rival.name}-{sha256(''.join(keys).encode()).hexdigest()[:10]}"
    table = {
        "schema": SCHEMA,
        "function": rival.ref.model_dump(),
        "role": rival.role,
        "sources": rival.sources,
        "spec": spec.name,
        "differences": [asdict(each) for each in found],
        "runs": [asdict(run) for each in pairs for run in each.mine],
        "against": [[run.case, run.key, run.seed, run.code["sha256"]] for each in pairs for run in each.theirs],
    }
    files = {
        stem.with_name(f"{stem.name}.json"): json.dumps(table, indent=1) + "\n",
        stem.with_name(f"{stem.name}.md"): text,
    }
    atomic_writes({file: content.encode() for file, content in files.items()})
    return list(files)


def known(spec: Spec, results: Path) -> Iterator[str]:
    """Lines on what of a spec can be compared with: HAP's cases, seeds, roles, the other methods, and its data."""
    cases = baselines(spec, "score")
    evidence = store.evidence(spec, results)
    seeds = sorted({run.seed for case in cases for run in evidence[case.name]})
    stems = dict.fromkeys(name.partition("@")[0] for name, runs in evidence.items() if runs)
    yield f"{spec.name}: {spec.title}"
    if not seeds:
        yield f"  no evidence of {', '.join(case.name for case in cases)} yet: hap run {spec.name}"
        return
    budgets = ", ".join(f"{case.name} ({case.budget.target:g} of {case.budget.unit})" for case in cases)
    yield f"  in the place of {budgets}; seeds {', '.join(map(str, seeds))}; by {spec.metric}"
    implants = any(case.implant for case in spec.cases.values())
    yield f"  ranked among {', '.join(stems)}; implants: {'yes' if implants else 'no'}"
    try:
        data = ready(cases[0].task, seeds[0])
        same = data.sha256 == evidence[cases[0].name][0].data["sha256"]
        yield f"  data: {data.name}, here{'' if same else ', but OTHERS than those of the evidence'}"
    except HapError as error:
        yield f"  data: NOT here, {error}"


def others(spec: Spec, case: Case, seeds: set[int], results: Path) -> dict[str, Sequence[Run]]:
    """The committed runs of every method at the budget and on the task of a case, where all these seeds were run."""
    same = [each for each in spec.cases.values() if (each.task, each.prune) == (case.task, case.prune)]
    named = [each.name for each in same if _budget(each) == _budget(case)]
    found = store.evidence(spec, results, named)
    chosen = {name: [run for run in runs if run.seed in seeds] for name, runs in found.items()}
    return {name: runs for name, runs in chosen.items() if len(runs) == len(seeds)}


@contextmanager
def blaming(rival: Rival) -> Iterator[None]:
    """Turns what the stranger's function raises, and what it returns and should not, into one line that names it."""
    try:
        yield
    except HapError as error:
        raise HapError(str(error) if str(error).startswith(rival.ref.use) else f"{rival.ref.use}: {error}") from None
    except (Exception, SystemExit) as error:
        homes = _homes(rival.ref.use)
        raised = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in raised if any(Path(frame.filename).is_relative_to(home) for home in homes)]
        if not frames or (isinstance(error, RuntimeError) and memory_ran_out(error)):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        at = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        raise HapError(f"{rival.ref.use}: raised {told:.300} (in {at})") from error


def _budget(case: Case) -> tuple[str, float]:
    return case.budget.unit, case.budget.target


def _homes(use: str) -> list[Path]:
    """The folder of the package, or the file of the module, that a function comes from; of a namespace, its folders."""
    name = use.partition(":")[0]
    module = sys.modules.get(name.partition(".")[0]) or sys.modules[name]
    if getattr(module, "__file__", None) is None:  # of a folder without __init__.py
        return [Path(each) for each in getattr(module, "__path__", ())]
    file = Path(str(module.__file__))
    return [file.parent if file.name == "__init__.py" else file]


def _sources(use: str) -> str:
    try:
        return "".join(
            provenance.checksum(home) if home.is_dir() else sha256(home.read_bytes()).hexdigest()
            for home in _homes(use)
        )
    except OSError as error:
        raise HapError(f"{use}: its sources must be readable (found {error.strerror}, {error.filename})") from None
