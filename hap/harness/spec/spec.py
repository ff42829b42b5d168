"""The schema of reproductions/*.toml: what a paper claims and which cases decide it; does not run anything.

Every mistake is found when the file is read, in one line: file, path of the mistake (lists count from 1), rule, found.
"""

import json
import math
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from hap import HapError
from hap.harness.spec.cases import Case as Case
from hap.harness.spec.cases import CaseTable, Table, expand
from hap.harness.spec.functions import Spelled, Strict, join, mistake, wrong

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Main = Literal["accuracy", "f1", "matthews"]  # in percent, higher is better
Metric = Literal[Main, "loss", "drop", "params_pruned", "macs_pruned", "speedup", "spearman", "overlap"]
STAGELESS = ("params_pruned", "macs_pruned", "speedup", "spearman", "overlap")
Stage = Literal["dense", "one_shot", "selected", "last", "best_test_epoch"]
Tier = Literal["quick", "cpu", "gpu"]
Percent = Annotated[float, Field(ge=0, le=100)]


class Claim(Strict):
    """One sentence of a source as a comparison that evidence can decide."""

    text: Text
    source: Text
    case: str
    metric: Metric
    stage: Stage = "selected"
    op: Literal["<=", ">=", "=="]
    value: float
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    against: str | None = None
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    known: Text | None = None


class Reported(Strict):
    """A row of someone else's table, as published: shown beside ours, never judged, part of no key."""

    method: Text
    model: Text
    data: Text
    dense: Percent | None = None  # accuracy, where the source gives it
    accuracy: Percent
    params_pruned: Percent | None = None
    macs_pruned: Percent | None = None  # or of FLOPs: the share is the same
    note: Text | None = None
    source: Text


class Base(Strict):
    """The published test accuracy of a dense network, which `lint` holds its records to; part of no key."""

    task: Text  # the function of the workload
    accuracy: Percent
    tolerance: Percent
    source: Text


class Spec(Strict):
    """One table or figure of a paper: its cases, its seeds and what is claimed of them."""

    name: str
    title: str
    paper: str
    tier: Tier
    seeds: tuple[int, ...]
    cases: dict[str, Case]
    claims: tuple[Claim, ...]
    metric: Main = "accuracy"  # that tables and figures show
    reported: tuple[Reported, ...] = ()
    bases: tuple[Base, ...] = ()
    needs: str | None = None  # the machine and the time that its runs take


class _File(Strict):
    title: Text
    paper: Text
    tier: Tier
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    task: Spelled = None
    reference: Spelled = None
    finetune: Table = None
    cases: Annotated[dict[Name, CaseTable], Field(min_length=1)]
    claims: tuple[Claim, ...] = ()
    metric: Main = "accuracy"
    reported: tuple[Reported, ...] = ()
    bases: tuple[Base, ...] = ()
    needs: Text | None = None


def require(spec: Spec) -> None:
    """MissingData where a spec needs a GPU and there is none; HAP_DEVICE overrules, for those who have the days."""
    if spec.tier != "gpu" or os.environ.get("HAP_DEVICE"):
        return
    import torch

    from hap.harness.task import MissingData

    if not torch.cuda.is_available():
        raise MissingData(
            f"{spec.name}: a GPU expected ({spec.needs or 'its tier is gpu'}), found none; --smoke rehearses it on a "
            "CPU, and HAP_DEVICE=cpu runs it there all the same"
        )


def find_specs(root: Path) -> list[Path]:
    """The specs of a folder, by name."""
    return sorted(root.glob("*.toml"))


def load_spec(path: Path, bind: bool = True) -> Spec:
    """A spec read, inherited, expanded and bound; HapError names the file and the path of the first mistake.

    `bind=False` imports none of the functions that it names, nor torch for them, and so does not see that one is
    missing or takes other options: enough for whoever reads records and runs nothing.
    """
    try:
        return _spec(path.stem, _file(_toml(path)), bind)
    except HapError as error:
        raise HapError(" ".join(f"{path}: {error}".split())) from None
    except (RecursionError, OverflowError) as error:
        raise HapError(f"{path}: must have no number and no nesting without end ({error})") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong("file", "must be readable", error.strerror) from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise wrong("file", "must be TOML in UTF-8", str(error)) from None
    _plain("", table)
    return table


def _plain(where: str, value: Any) -> None:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value, start=1)
        for name, part in pairs:
            _plain(join(where, name), part)
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise wrong(where, "must be a string, a finite number, true, false, a list or a table", str(value))


def _file(table: dict[str, Any]) -> _File:
    try:
        return _File.model_validate_json(json.dumps(table))
    except ValidationError as error:
        raise mistake("", error) from None


def _spec(name: str, file: _File, bind: bool) -> Spec:
    if len(set(file.seeds)) < len(file.seeds):
        raise wrong("seeds", "must not repeat", list(file.seeds))
    shared = {field: (field, getattr(file, field)) for field in ("task", "reference", "finetune")}
    cases: dict[str, Case] = {}
    for raw in file.cases:
        for case in expand(name, raw, file.cases, shared, bind):
            if case.name in cases:
                raise wrong(f"cases.{raw}.budget", "must not give one case twice", case.name)
            cases[case.name] = case
    for number, claim in enumerate(file.claims, start=1):
        _claim(f"claims[{number}]", claim, cases)
    tasks = sorted({case.task.use for case in cases.values()})
    for number, base in enumerate(file.bases, start=1):
        if base.task not in tasks:
            raise wrong(f"bases[{number}].task", f"must be that of a case, one of {', '.join(tasks)}", base.task)
    shown = ("title", "paper", "tier", "seeds", "claims", "metric", "reported", "bases", "needs")
    parts = {part: getattr(file, part) for part in shown}
    return Spec(name=name, cases=cases, **parts)


def _claim(where: str, claim: Claim, cases: dict[str, Case]) -> None:
    for field, case in (("case", claim.case), ("against", claim.against)):
        if case is not None and case not in cases:
            raise wrong(f"{where}.{field}", f"must be a case of this spec, one of {', '.join(cases)}", case)
    compared = [cases[case] for case in (claim.case, claim.against) if case is not None]
    if claim.metric in ("spearman", "overlap") and any(case.reference is None for case in compared):
        raise wrong(f"{where}.metric", "needs cases with a reference", claim.metric)
    if claim.against == claim.case:
        raise wrong(f"{where}.against", "must be another case", claim.against)
    if "stage" in claim.model_fields_set and claim.metric in STAGELESS:
        raise wrong(f"{where}.stage", f"means nothing for {claim.metric}", claim.stage)
