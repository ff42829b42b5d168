"""The schema of reproductions/*.toml: what a paper claims and which cases decide it; does not run anything.

Every mistake is found when the file is read, in one line: file, path of the mistake (lists count from 1), rule, found.
"""

import json
import math
import os
import tomllib
from itertools import pairwise
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
IMAGELESS = ("loss", "params_pruned", "macs_pruned", "speedup", "spearman", "overlap")  # no image has its own
STAGELESS = ("params_pruned", "macs_pruned", "speedup", "spearman", "overlap")
Stage = Literal["dense", "one_shot", "selected", "last", "best_test_epoch"]
PAPER = "paper"  # the family of the claims that the paper makes itself
Tier = Literal["quick", "cpu", "gpu"]
Percent = Annotated[float, Field(ge=0, le=100)]


class Claim(Strict):
    """One sentence of a source as a comparison that evidence can decide.

    `over`: "seeds" is about this test set, as a number of a paper's table is; "seeds and images" is about new images
    too. `family`: the claims that are corrected together; "paper" for those that the paper makes. `effect`: how far the
    truth is taken to lie from `value`, on the side that is claimed, in the unit of the metric; of "==", on either side.
    It says what `hap power` reckons with, and decides no verdict.
    """

    text: Text
    source: Text
    case: str
    metric: Metric
    stage: Stage = "selected"
    op: Literal["<=", ">=", "=="]
    value: float
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    over: Literal["seeds", "seeds and images"]
    family: Text
    effect: Annotated[float, Field(ge=0)] | None = None
    against: str | None = None
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    known: Text | None = None


class Assumed(Strict):
    """What a metric is taken to vary by where there are no records to see it from; decides no verdict.

    In the unit of the metric, percent points for shares; what is of images only where a claim is over images.
    """

    seeds: Annotated[float, Field(ge=0)]  # standard deviation of what is claimed from seed to seed, images aside
    images: Annotated[int, Field(ge=2)] | None = None  # of the test set
    disagree: Percent = 0.0  # of the images one of both is right and the other is not
    persistent: Annotated[float, Field(ge=0, le=1)] = 0.1  # the part of these that is the same for all seeds


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
    looks: tuple[int, ...] = ()  # how many of the seeds are there when it is judged, where that is more than once
    stand_in: str | None = None  # for what of the paper its model and its data stand
    regrouped: str | None = None  # why claims are of other families than when the evidence was made
    assumed: dict[str, Assumed] = Field(default={})  # by metric, or "metric stage"
    minutes: float | None = None  # that a record is taken to need where there is none

    @property
    def stops(self) -> tuple[int, ...]:
        """How many of its seeds are there at each look; once all of them where it does not say."""
        return tuple(look for look in self.looks if look <= len(self.seeds)) or (len(self.seeds),)

    @property
    def first(self) -> tuple[int, ...]:
        """The seeds of the first look; all where there is one."""
        return self.seeds[: self.stops[0]]


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
    looks: tuple[int, ...] = ()
    stand_in: Text | None = None
    regrouped: Text | None = None
    assumed: dict[str, Assumed] = Field(default={})
    minutes: Annotated[float, Field(gt=0)] | None = None


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
    if "looks" in table:
        raise wrong("looks", "is a part of seeds, as in seeds = {looks = [3, 6, 12]}", table["looks"])
    if isinstance(table.get("seeds"), dict):
        looks = _looks(table["seeds"])
        table = {**table, "seeds": list(range(looks[-1])), "looks": looks}
    try:
        return _File.model_validate_json(json.dumps(table))
    except ValidationError as error:
        raise mistake("", error) from None


def _looks(given: dict[str, Any]) -> list[int]:
    """How many seeds there are at each look; the seeds are 0, 1, 2, ..."""
    looks = found if isinstance(found := given.get("looks"), list) else []
    whole = bool(looks) and all(type(look) is int for look in looks)
    if given.keys() != {"looks"} or not whole or any(later <= look for look, later in pairwise([1, *looks])):
        raise wrong("seeds", "must be a list, or {looks = [...]} with two or more seeds, more at each look", given)
    return looks


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
        if file.stand_in is not None:
            _stands_in(f"claims[{number}]", claim)
    tasks = sorted({case.task.use for case in cases.values()})
    for number, base in enumerate(file.bases, start=1):
        if base.task not in tasks:
            raise wrong(f"bases[{number}].task", f"must be that of a case, one of {', '.join(tasks)}", base.task)
    own = ("task", "reference", "finetune", "cases")  # what is in the cases
    parts = {part: getattr(file, part) for part in _File.model_fields if part not in own}
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
    if claim.over == "seeds and images" and claim.metric in IMAGELESS:
        raise wrong(f"{where}.over", f'must be "seeds" for {claim.metric}', claim.over)
    if "stage" in claim.model_fields_set and claim.metric in STAGELESS:
        raise wrong(f"{where}.stage", f"means nothing for {claim.metric}", claim.stage)


def _stands_in(where: str, claim: Claim) -> None:
    """What a stand-in shows is not of the paper: the paper is no source of it, and no such claim is the paper's own."""
    if claim.source.startswith("["):
        raise wrong(f"{where}.source", "must not be a reference, for a stand-in shows nothing of it", claim.source)
    if claim.family == PAPER:
        raise wrong(f"{where}.family", "must not be that of the paper in a stand-in", claim.family)
