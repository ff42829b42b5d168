"""The schema of reproductions/*.toml: what a paper claims and which cases decide it; does not run anything.

Every mistake is found when the file is read, in one line: file, path of the mistake (lists count from 1), rule, found.
"""

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, StringConstraints, ValidationError

from hap import HapError
from hap.harness.binding import ROLES, Ref, Spelled, Strict, build, join, mistake, resolve, wrong
from hap.harness.training import Recipe
from hap.plan import Budget

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Coupling = Literal["tied", "union"]
Metric = Literal["accuracy", "loss", "drop", "params_pruned", "macs_pruned", "speedup", "spearman", "overlap"]
STAGELESS = ("params_pruned", "macs_pruned", "speedup", "spearman", "overlap")
Stage = Literal["dense", "one_shot", "selected", "last", "best_test_epoch"]
Tier = Literal["quick", "cpu", "gpu"]
Table = Annotated[dict[str, Any] | None, BeforeValidator(lambda given: None if given is False else given)]


class Case(Strict):
    """One way to prune, resolved: with a seed it decides a result."""

    name: str
    spec: str
    task: Ref
    score: Ref | None = None
    method: Ref | None = None
    reference: Ref | None = None  # the score that the case's own is compared with
    coupling: Coupling = "union"
    implant: Ref | None = None
    budget: InstanceOf[Budget]
    recalibrate: bool = False  # the statistics of BatchNorm, after surgery
    finetune: InstanceOf[Recipe] | None = None

    @property
    def decides(self) -> dict[str, Any]:
        """Everything that decides the result but the seed, JSON-able; switches that are off are left out."""
        parts = {name: getattr(self, name) for name in ("task", "score", "method", "reference", "coupling", "implant")}
        parts = {name: part.model_dump() if isinstance(part, Ref) else part for name, part in parts.items()}
        for name, part in (("budget", self.budget), ("finetune", self.finetune)):
            # a switch that a later version adds, and that is off, must not orphan the evidence of today
            parts[name] = part and {k: v for k, v in asdict(part).items() if v is not None and v is not False}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def config(self) -> dict[str, Any]:
        """The whole case as a record keeps it."""
        return {"spec": self.spec, "case": self.name, **self.decides}

    @property
    def key(self) -> str:
        """10 hex digits that name the evidence: equal exactly when the results must be."""
        text = json.dumps(self.decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return sha256(text.encode()).hexdigest()[:10]


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


class Spec(Strict):
    """One table or figure of a paper: its cases, its seeds and what is claimed of them."""

    name: str
    title: str
    paper: str
    tier: Tier
    seeds: tuple[int, ...]
    cases: dict[str, Case]
    claims: tuple[Claim, ...]


class _CaseTable(Strict):
    like: str | None = None
    task: Spelled = None
    score: Spelled = None
    method: Spelled = None
    reference: Spelled = None
    coupling: Coupling = "union"
    implant: Spelled = None
    budget: dict[str, Any] | None = None
    finetune: Table = None


class _File(Strict):
    title: Text
    paper: Text
    tier: Tier
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    task: Spelled = None
    reference: Spelled = None
    finetune: Table = None
    cases: Annotated[dict[Name, _CaseTable], Field(min_length=1)]
    claims: tuple[Claim, ...] = ()


def find_specs(root: Path) -> list[Path]:
    """The specs of a folder, by name."""
    return sorted(root.glob("*.toml"))


def load_spec(path: Path) -> Spec:
    """A spec read, inherited, expanded and bound; HapError names the file and the path of the first mistake."""
    try:
        return _spec(path.stem, _file(_toml(path)))
    except HapError as error:
        raise HapError(" ".join(f"{path}: {error}".split())) from None


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


def _spec(name: str, file: _File) -> Spec:
    if len(set(file.seeds)) < len(file.seeds):
        raise wrong("seeds", "must not repeat", list(file.seeds))
    cases: dict[str, Case] = {}
    for raw in file.cases:
        for case in _expand(name, raw, file):
            if case.name in cases:
                raise wrong(f"cases.{raw}.budget", "must not give one case twice", case.name)
            cases[case.name] = case
    for number, claim in enumerate(file.claims, start=1):
        _claim(f"claims[{number}]", claim, cases)
    parts = {part: getattr(file, part) for part in ("title", "paper", "tier", "seeds", "claims")}
    return Spec(name=name, cases=cases, **parts)


def _claim(where: str, claim: Claim, cases: dict[str, Case]) -> None:
    for field, case in (("case", claim.case), ("against", claim.against)):
        if case is not None and case not in cases:
            raise wrong(f"{where}.{field}", f"must be a case of this spec, one of {', '.join(cases)}", case)
    if claim.metric in ("spearman", "overlap") and cases[claim.case].reference is None:
        raise wrong(f"{where}.metric", "needs a case with a reference", claim.metric)
    if claim.against == claim.case:
        raise wrong(f"{where}.against", "must be another case", claim.against)
    if "stage" in claim.model_fields_set and claim.metric in STAGELESS:
        raise wrong(f"{where}.stage", f"means nothing for {claim.metric}", claim.stage)


_Given = dict[str, tuple[str, Any]]  # field -> where it was written, value


def _inherit(name: str, cases: dict[str, _CaseTable], heirs: tuple[str, ...] = ()) -> _Given:
    table, where = cases[name], f"cases.{name}"
    if name in heirs:
        raise wrong(f"cases.{heirs[0]}.like", "must not come back to itself", " -> ".join((*heirs, name)))
    if table.like is not None and table.like not in cases:
        raise wrong(f"{where}.like", f"must be a case of this spec, one of {', '.join(cases)}", table.like)
    given = {} if table.like is None else _inherit(table.like, cases, (*heirs, name))
    own = {field: (f"{where}.{field}", getattr(table, field)) for field in table.model_fields_set - {"like"}}
    if own.keys() & {"score", "method"}:  # the heir's choice replaces either
        given = {field: value for field, value in given.items() if field not in ("score", "method")}
    return given | own


def _expand(spec: str, name: str, file: _File) -> Iterator[Case]:
    where = f"cases.{name}"
    shared = {field: (field, getattr(file, field)) for field in ("task", "reference", "finetune")}
    given = shared | _inherit(name, file.cases)
    parts: dict[str, Any] = {field: value for field, (_, value) in given.items() if value is not None}
    for needed in ("task", "budget"):
        if needed not in parts:
            raise wrong(f"{where}.{needed}", "is required")
    if len(parts.keys() & {"score", "method"}) != 1:
        raise wrong(where, "must give exactly one of score and method", sorted(parts.keys() & {"score", "method"}))
    for role in parts.keys() & ROLES.keys():
        resolve(given[role][0], role, parts[role])
    if "finetune" in parts:
        parts["finetune"] = build(given["finetune"][0], Recipe, parts["finetune"])
    for suffix, budget in _budgets(given["budget"][0], parts["budget"]):
        case = Case(**{**parts, "name": name + suffix, "spec": spec, "budget": budget})
        _implanted(where, case)
        yield case


def _implanted(where: str, case: Case) -> None:
    if case.method is not None and case.reference is not None:
        raise wrong(f"{where}.reference", "a method has no scores to compare", case.reference.use)
    if case.method is not None and case.implant is not None:
        raise wrong(f"{where}.implant", "a method brings its own implants", case.implant.use)
    if case.score is not None and (case.budget.implant > 0) != (case.implant is not None):
        found = case.implant and case.implant.use
        raise wrong(f"{where}.implant", "is given exactly when budget.implant is above 0", found)


def _budgets(where: str, table: dict[str, Any]) -> Iterator[tuple[str, Budget]]:
    lists = [field for field, value in table.items() if isinstance(value, list)]
    if not lists:
        yield "", build(where, Budget, table)
        return
    if len(lists) > 1 or not table[lists[0]]:
        raise wrong(where, "may give one list, not an empty one", table)
    for value in table[lists[0]]:
        budget = build(where, Budget, {**table, lists[0]: value})
        yield f"@{100 * value:g}", budget
