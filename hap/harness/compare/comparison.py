"""A stranger's function -> a spec with one more case, which is like HAP's but for one role, and the runs of its cases.

The spec claims, for each budget and stage, that the function is better than HAP's; the ordinary judge decides that. The
runs of the function lie in the cache, under the sha256 of its sources and of ours: an interrupted comparison goes on,
and an edit makes new runs. Committed evidence is only read.
"""

import json
import math
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from re import sub
from shutil import rmtree
from typing import Any

from pydantic import ValidationError

from hap import HapError
from hap.harness.make import Job, attempt, ensure
from hap.harness.processes import provenance
from hap.harness.processes.files import atomic_write, atomic_writes, cache
from hap.harness.processes.progress import Say, Step
from hap.harness.processes.workers import Executor, Known
from hap.harness.records import store
from hap.harness.records.record import Run
from hap.harness.spec.functions import Ref, mistake, ready, resolve
from hap.harness.spec.spec import Case, Claim, Spec, Stage, load_spec
from hap.harness.train.step import memory_ran_out
from hap.harness.verdicts.measures import Runs
from hap.plan import Budget

ROLES = ("score", "method", "implant")
WHEN: dict[Stage, str] = {"one_shot": "before fine-tuning", "selected": "after fine-tuning"}
CONFIDENCE = 0.975  # of each of two bounds, which together are a 95 % interval
PAGE = "comparison.md"


@dataclass(frozen=True)
class Rival:
    """A function in a role, and the sha256 of what decides its runs besides the case: its sources and ours."""

    role: str
    ref: Ref
    sources: str

    @property
    def name(self) -> str:
        """The name of its case."""
        return sub(r"[^a-z0-9_.]+", "-", self.ref.use.lower()).lstrip("-_.") or "yours"

    @property
    def folder(self) -> Path:
        """The folder of its runs."""
        return cache() / "compare" / self.sources[:16]


def rival(use: str, options: Mapping[str, object], role: str) -> Rival:
    """The function that `use` names; HapError where it cannot be called in this role with these options."""
    try:
        ref = Ref(use=use, options=dict(options))
    except ValidationError as error:
        raise mistake("function", error) from None
    resolve(use, role, ref)
    return Rival(role, ref, sha256(f"{_sources(use)}{provenance.code()['sha256']}".encode()).hexdigest())


def stem(case: Case) -> str:
    """The name of a case without its budget."""
    return case.name.partition("@")[0]


def baselines(spec: Spec, role: str, name: str | None = None) -> list[Case]:
    """HAP's cases, one a budget: those of this name, by default that of the first case of the spec with the role."""
    having = [case for case in spec.cases.values() if role == "method" or getattr(case, role) is not None]
    if not having:
        raise HapError(f"{spec.name}: a case with a {role} is needed to put another in its place, found none")
    chosen = name or stem(having[0])
    found = [case for case in having if chosen in (case.name, stem(case))]
    if not found:
        names = ", ".join(dict.fromkeys(map(stem, having)))
        raise HapError(f"--against {name}: must be a case of {spec.name} with this role, one of {names}")
    return found


def alike(case: Case, other: Case) -> bool:
    """Whether two cases prune as much of the same network."""
    first, second = ((each.task, each.prune, *_amount(each.budget)) for each in (case, other))
    return first == second


def _amount(budget: Budget) -> tuple[Any, ...]:
    return budget.unit, budget.target, budget.ratios, budget.only, budget.except_


def committed(spec: Spec, cases: Sequence[Case], results: Path, rerun: bool) -> dict[str, list[Run]]:
    """The evidence of these cases, and of all cases that are alike, for the seeds that these cases share.

    HapError where there is none or, without `rerun`, where the data here are not those of the evidence.
    """
    wanted = [each.name for each in spec.cases.values() if any(alike(each, case) for case in cases)]
    found = store.evidence(spec, results, wanted)
    seeds = set.intersection(*({run.seed for run in found[case.name]} for case in cases))
    if not seeds:
        lacking = next((case.name for case in cases if not found[case.name]), "one seed in all cases")
        raise HapError(f"{spec.name}: committed evidence of {lacking} expected, found none; `hap run` makes it")
    for case in cases:
        old, here = found[case.name][0].data["sha256"], ready(case.task, min(seeds)).sha256
        if old != here and not rerun:
            raise HapError(
                f"{spec.name}: the data of the committed evidence expected, sha256 {old[:16]}, found {here[:16]}; "
                "--rerun runs HAP's cases here too"
            )
    shared = {name: [run for run in runs if run.seed in seeds] for name, runs in found.items()}
    return {name: runs for name, runs in shared.items() if len(runs) == len(seeds)}


def written(path: Path, rival: Rival, cases: Sequence[Case], evidence: Runs) -> Path:
    """The file, in the cache, of the spec that compares a function with these cases of the spec of `path`."""
    table, theirs = tomllib.loads(path.read_text("utf-8")), stem(cases[0])
    tables, needed = table["cases"], {name.partition("@")[0] for name in evidence}
    while more := {tables[name]["like"] for name in needed if "like" in tables[name]} - needed:
        needed |= more
    off = dict.fromkeys(("reference", "implant", "update") if rival.role == "method" else ("reference",), False)
    mine = {"like": theirs, **off, rival.role: {"use": rival.ref.use, **rival.ref.options}}
    pairs = [(case.model_copy(update={"name": rival.name + case.name.removeprefix(theirs)}), case) for case in cases]
    found = claims(pairs, table.get("metric", "accuracy"), f"`hap compare`, sources {rival.sources[:16]}")
    head = {name: part for name, part in table.items() if name not in ("cases", "claims", "reported", "bases")}
    head |= {"title": f"{rival.ref.use} in the place of {theirs}, {path.stem}"}
    head |= {"seeds": [run.seed for run in evidence[cases[0].name]]}
    sections = [("", head), *((f"[cases.{json.dumps(name)}]", tables[name]) for name in tables if name in needed)]
    sections += [(f"[cases.{json.dumps(rival.name)}]", mine)]
    sections += [("[[claims]]", each.model_dump(exclude_defaults=True)) for each in found]
    text = "\n\n".join("\n".join([title, *(f"{k} = {_toml(v)}" for k, v in each.items())]) for title, each in sections)
    file = rival.folder / "specs" / sha256(text.encode()).hexdigest()[:10] / path.name
    atomic_write(file, f"{text.lstrip()}\n".encode())
    return file


def claims(pairs: Sequence[tuple[Case, Case]], metric: str, source: str) -> tuple[Claim, ...]:
    """That the first of each pair of cases is better, before fine-tuning and, where there is one, after it."""
    what: dict[str, Any] = {"source": source, "metric": metric, "op": ">=", "value": 0.0, "confidence": CONFIDENCE}
    what |= {"over": "seeds and images", "family": "comparison"}
    places = [(*pair, stage) for pair in pairs for stage in WHEN if stage == "one_shot" or pair[1].finetune]
    return tuple(
        Claim(text=f"{a.name} is better than {b.name} {WHEN[at]}", case=a.name, against=b.name, stage=at, **what)
        for a, b, at in places
    )


def pairs(spec: Spec) -> list[tuple[Case, Case]]:
    """The cases that the claims of a comparison compare: the function's and HAP's."""
    names = dict.fromkeys((claim.case, str(claim.against)) for claim in spec.claims)
    return [(spec.cases[mine], spec.cases[theirs]) for mine, theirs in names]


def made(spec: Spec, rival: Rival, evidence: Runs, rerun: bool, executor: Executor, step: Step) -> Runs:
    """The evidence with the runs of the function and, with `rerun`, new ones of HAP: from the cache, else made now."""
    runs, ours = dict(evidence), cache() / "compare" / provenance.code()["sha256"][:16]
    for mine, theirs in pairs(spec):
        with blaming(rival):
            work = partial(_blamed, rival)
            runs[mine.name] = [_made(Job(mine, seed, rival.folder), executor, step, work) for seed in spec.seeds]
        if rerun:
            runs[theirs.name] = [_made(Job(theirs, seed, ours), executor, step, ensure) for seed in spec.seeds]
    return runs


def _made(job: Job, executor: Executor, step: Step, work: Callable[..., Run]) -> Run:
    with step(job.name) as say:
        return attempt(job, executor, say, work)


def _blamed(rival: Rival, job: Job, known: Known, say: Say) -> Run:
    with blaming(rival):  # in the process that makes the record, for a traceback stays there
        return ensure(job, known, say)


def name(spec: Spec) -> str:
    """The name of the folder where a comparison is recorded."""
    both = [case for pair in pairs(spec) for case in pair]
    return f"{spec.name}-{stem(both[0])}-{sha256(''.join(case.key for case in both).encode()).hexdigest()[:10]}"


def record(file: Path, runs: Runs, text: str, results: Path) -> list[Path]:
    """Writes results/compare/<name>/: the spec, the page, and records as those of any spec; returns the first two."""
    folder = results / "compare" / name(load_spec(file))
    rmtree(folder, ignore_errors=True)  # else records stay of cases as they were when it was last recorded
    for run in (run for each in runs.values() for run in each):
        store.save(run, folder)
    files = {folder / file.name: file.read_bytes(), folder / PAGE: text.encode()}
    atomic_writes(files)
    return list(files)


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
        what = " ".join(f"{type(error).__name__}: {error}".split())
        at = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        raise HapError(f"{rival.ref.use}: raised {what:.300} (in {at})") from error


def _toml(value: Any) -> str:
    """A value of JSON as TOML on one line; HapError for null, infinity and NaN, which no spec has."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise HapError(f"--options: a string, finite number, true, false, list or table expected, found {value}")
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)} = {_toml(part)}' for name, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _homes(use: str) -> list[Path]:
    """The folders of the package, or the file of the module, that a function comes from."""
    found = find_spec(use.partition(":")[0].partition(".")[0])
    assert found is not None, "it was imported before"
    return [Path(each) for each in found.submodule_search_locations or [str(found.origin)]]


def _sources(use: str) -> str:
    try:
        return "".join(
            provenance.checksum(home) if home.is_dir() else sha256(home.read_bytes()).hexdigest()
            for home in _homes(use)
        )
    except OSError as error:
        raise HapError(f"{use}: its sources must be readable (found {error.strerror}, {error.filename})") from None
