"""A case, how it inherits, expands and shrinks: tables of a spec -> Case; knows nothing of files, claims or seeds."""

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, InstanceOf

from hap.budget import Budget
from hap.harness.spec.functions import ROLES, Ref, Spelled, Strict, build, resolve, wrong
from hap.harness.train.recipe import Recipe

Coupling = Literal["tied", "union"]
Prune = Literal["all", "heads"]
Table = Annotated[dict[str, Any] | None, BeforeValidator(lambda given: None if given is False else given)]
Given = Mapping[str, tuple[str, Any]]  # field -> where it was written, value
SMOKE_PROBES = 2  # the fewest that have two halves


class Case(Strict):
    """One way to prune, resolved: with a seed it decides a result."""

    name: str
    spec: str
    task: Ref
    score: Ref | None = None
    method: Ref | None = None
    reference: Ref | None = None  # the score that the case's own is compared with
    coupling: Coupling = "union"
    prune: Prune = "all"  # or attention heads alone
    implant: Ref | None = None
    update: Ref | None = None  # new weights for what is left
    budget: InstanceOf[Budget]
    finetune: InstanceOf[Recipe] | None = None
    recalibrate: bool = False  # BatchNorm statistics measured anew after surgery

    @property
    def decides(self) -> dict[str, Any]:
        """Everything that decides the result but the seed, JSON-able; switches that are off are left out."""
        names = ("task", "score", "method", "reference", "coupling", "implant", "update")
        parts = {name: getattr(self, name) for name in names}
        parts = {name: part.model_dump() if isinstance(part, Ref) else part for name, part in parts.items()}
        for name, part in (("budget", self.budget), ("finetune", self.finetune)):
            # a switch that a later version adds, and that is off, must not orphan the evidence of today
            told = {k.rstrip("_"): v for k, v in asdict(part).items()} if part else {}  # `except_` as a spec spells it
            parts[name] = part and {k: v for k, v in told.items() if v is not None and v is not False}
        parts["recalibrate"] = self.recalibrate or None
        parts["prune"] = None if self.prune == "all" else self.prune
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


class CaseTable(Strict):
    """A case as a file spells it."""

    like: str | None = None
    task: Spelled = None
    score: Spelled = None
    method: Spelled = None
    reference: Spelled = None
    coupling: Coupling = "union"
    prune: Prune = "all"
    implant: Spelled = None
    update: Spelled = None
    budget: dict[str, Any] | None = None
    finetune: Table = None
    recalibrate: bool = False


def expand(spec: str, name: str, tables: Mapping[str, CaseTable], shared: Given, bind: bool) -> Iterator[Case]:
    """The cases that the table `name` stands for, one a budget; `shared` is what it has where it says nothing.

    `bind`: the functions that it names are imported, and its options checked against their signatures.
    """
    where = f"cases.{name}"
    given = {**shared, **_inherit(name, tables)}
    parts: dict[str, Any] = {field: value for field, (_, value) in given.items() if value is not None}
    for needed in ("task", "budget"):
        if needed not in parts:
            raise wrong(f"{where}.{needed}", "is required")
    if len(parts.keys() & {"score", "method"}) != 1:
        raise wrong(where, "must give exactly one of score and method", sorted(parts.keys() & {"score", "method"}))
    for role in parts.keys() & ROLES.keys() if bind else ():
        resolve(given[role][0], role, parts[role])
    if "finetune" in parts:
        parts["finetune"] = build(given["finetune"][0], Recipe, parts["finetune"])
    for suffix, budget in _budgets(given["budget"][0], parts["budget"]):
        case = Case(**{**parts, "name": name + suffix, "spec": spec, "budget": budget})
        _implanted(where, case)
        yield case


def smoke(case: Case) -> Case:
    """The case shrunk, to see each stage at work: a task with a `smoke` option, few probes, one epoch, not compiled.

    Its key is that of the full case only where there was nothing to shrink.
    """
    refs = {role: few(ref)[1] for role in ("score", "reference", "method") if (ref := getattr(case, role)) is not None}
    task, finetune = case.task, case.finetune
    if "smoke" in _options(task):
        options = {name: value for name, value in task.options.items() if name != "compile"}
        task = task.model_copy(update={"options": {**options, "smoke": True}})
    if finetune is not None:
        finetune = replace(finetune, epochs=1, warmup_epochs=min(finetune.warmup_epochs, 1), compile=False)
    return case.model_copy(update={**refs, "task": task, "finetune": finetune})


def _inherit(name: str, cases: Mapping[str, CaseTable], heirs: tuple[str, ...] = ()) -> Given:
    table, where = cases[name], f"cases.{name}"
    if name in heirs:
        raise wrong(f"cases.{heirs[0]}.like", "must not come back to itself", " -> ".join((*heirs, name)))
    if table.like is not None and table.like not in cases:
        raise wrong(f"{where}.like", f"must be a case of this spec, one of {', '.join(cases)}", table.like)
    given: Given = {} if table.like is None else _inherit(table.like, cases, (*heirs, name))
    own = {field: (f"{where}.{field}", getattr(table, field)) for field in table.model_fields_set - {"like"}}
    if own.keys() & {"score", "method"}:  # the heir's choice replaces either
        given = {field: value for field, value in given.items() if field not in ("score", "method")}
    return {**given, **own}


def few(ref: Ref) -> tuple[float, Ref]:
    """A function with few probes, and how many times as many it has; an exact curvature draws none."""
    options = {**_options(ref), **ref.options}
    probes = None if options.get("curvature") == "exact" else options.get("probes")
    if not isinstance(probes, int) or probes <= SMOKE_PROBES:
        return 1.0, ref
    return probes / SMOKE_PROBES, ref.model_copy(update={"options": {**ref.options, "probes": SMOKE_PROBES}})


def _options(ref: Ref) -> dict[str, Any]:
    """The options that the function of `ref` names, with their defaults."""
    return {name: each.default for name, each in inspect.signature(ref.load()).parameters.items()}


def _implanted(where: str, case: Case) -> None:
    if case.method is not None and case.reference is not None:
        raise wrong(f"{where}.reference", "a method has no scores to compare", case.reference.use)
    if case.method is not None and case.implant is not None:
        raise wrong(f"{where}.implant", "a method brings its own implants", case.implant.use)
    if case.method is not None and case.update is not None:
        raise wrong(f"{where}.update", "a method brings its own updates", case.update.use)
    if case.score is not None and (case.budget.implant > 0) != (case.implant is not None):
        found = case.implant and case.implant.use
        raise wrong(f"{where}.implant", "is given exactly when budget.implant is above 0", found)
    ranked = case.prune == "heads" and case.budget.implant > 0
    if (case.budget.rank is not None) != ranked:
        raise wrong(f"{where}.budget.rank", "is given exactly when heads become implants", case.budget.rank)


def _budgets(where: str, table: dict[str, Any]) -> Iterator[tuple[str, Budget]]:
    """The budgets of a table, one for each number of the list that stands in the place of one number."""
    table = {"except_" if field == "except" else field: value for field, value in table.items()}
    shares = table.get("ratios")
    shares = shares if isinstance(shares, dict) else {}
    lists = [(f, v) for f, v in table.items() if isinstance(v, list) and f not in ("only", "except_")]
    lists += [(glob, value) for glob, value in shares.items() if isinstance(value, list)]
    if not lists:
        yield "", build(where, Budget, table)
        return
    if len(lists) > 1 or not lists[0][1]:
        raise wrong(where, "may give one list, not an empty one", table)
    name, values = lists[0]
    for value in values:
        one = {"ratios": {**shares, name: value}} if name in shares else {name: value}
        budget = build(where, Budget, {**table, **one})
        yield f"@{100 * value:g}", budget
