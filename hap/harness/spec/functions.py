"""Functions and dataclasses named or filled in by a file, checked before anything runs; knows nothing of specs."""

import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from hap import HapError

if TYPE_CHECKING:
    import hap.harness.task  # it needs torch, which a spec that is only read does not

Built = TypeVar("Built")
Function = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*$")]

# what a caller hands over: positional names, then keywords; the rest of a signature are the options of a spec
Role = tuple[tuple[str, ...], tuple[str, ...]]
ROLES: dict[str, Role] = {
    "task": (("seed",), ()),
    "score": (("model", "loss", "batches", "groups"), ("rng",)),
    "reference": (("model", "loss", "batches", "groups"), ("rng",)),
    "method": (("task", "groups", "budget"), ("rng",)),
    "implant": (("module", "rows", "inputs"), ()),
    "update": (("reader", "kept", "moments"), ()),
}
OFFERED = {"pruned", "halves", "fit", "weighted"}  # what a caller hands over to a function that asks for it


class Strict(BaseModel):
    """Frozen, without conversions, without unknown fields."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Ref(Strict):
    """A function by name, "package.module:function", with the options a spec gives it."""

    use: Function
    options: dict[str, Any] = {}

    def load(self) -> Callable[..., Any]:
        """The function itself, imported."""
        return pkgutil.resolve_name(self.use)  # type: ignore[no-any-return]


def _spelled(given: Any) -> Any:
    if isinstance(given, str):
        return {"use": given}
    if isinstance(given, dict):
        use = {"use": given["use"]} if "use" in given else {}
        return {**use, "options": {name: value for name, value in given.items() if name != "use"}}
    return None if given is False else given


# as a file spells it: a string, a table {use = ..., option = ...}, or false
Spelled = Annotated[Ref | None, BeforeValidator(_spelled)]


def wrong(where: str, rule: str, *found: Any) -> HapError:
    """The one line of a mistake: its path, the rule, and what was found if anything was."""
    text = repr(found[0]) if found else ""
    shown = f" (found {text if len(text) <= 160 else text[:157] + '...'})" if found else ""
    return HapError(f"{where}: {rule}{shown}")


def join(*steps: int | str) -> str:
    """The path of a place in a file; lists count from 1."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps if step not in ("", "[key]"))
    return text.removeprefix(".")


def mistake(where: str, error: ValidationError) -> HapError:
    """The first mistake that pydantic found, as one line."""
    first = error.errors()[0]
    steps = [step + 1 if isinstance(step, int) else step for step in first["loc"]]
    rule = {"extra_forbidden": "unknown field", "missing": "is required"}.get(first["type"], first["msg"])
    return wrong(join(where, *steps), rule, *([] if first["type"] == "missing" else [first["input"]]))


def resolve(where: str, role: str, ref: Ref) -> None:
    """Checks that `ref` names a function that can be called in this role with these options."""
    try:
        function = ref.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
        raise wrong(where, f"must name a function that exists ({type(error).__name__}: {error})", ref.use) from None
    if not callable(function):
        raise wrong(where, "must name a function", ref.use)
    _bind(where, function, ROLES[role], ref.options)


def ready(task: Ref, seed: int) -> "hap.harness.task.Data":
    """The data of a workload, read; a task module may offer `ready(**options)` where its task takes long to make."""
    from hap.harness.task import Data

    quick = getattr(import_module(task.use.partition(":")[0]), "ready", None)
    data = quick(**task.options) if quick is not None else task.load()(seed, **task.options).data
    assert isinstance(data, Data)
    return data


def build(where: str, cls: type[Built], table: dict[str, Any]) -> Built:
    """The dataclass `cls` filled in from a table."""
    _bind(where, cls, ((), ()), table)
    try:
        return cls(**table)
    except HapError as error:
        named = set(re.findall(r"\w+", str(error))) & table.keys()
        raise HapError(f"{join(where, *named) if len(named) == 1 else where}: {error}") from None


def _bind(where: str, function: Callable[..., Any], role: Role, table: dict[str, Any]) -> None:
    positional, keywords = role
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # some builtins have none
        raise wrong(where, str(error)) from None
    names = [name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    options = [name for name in names[len(positional) :] if name not in {*keywords, *OFFERED}]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    for name, value in table.items():
        if name not in options and not (open_ended and name not in names):
            raise wrong(join(where, name), f"unknown option; {_known(options)}", value)
    try:
        signature.bind(*positional, **dict.fromkeys(keywords), **table)
    except TypeError as error:
        raise wrong(where, f"cannot be called with what it is given: {error}", table) from None
    for name, value in table.items():
        if name in signature.parameters:
            _check(join(where, name), signature.parameters[name].annotation, value)


def _adapter(annotation: Any) -> Any:
    try:
        return _kept(annotation)
    except TypeError:  # it has a part that cannot be hashed
        return TypeAdapter(annotation)


_kept = cache(TypeAdapter)  # many options have the same type


def _known(options: list[str]) -> str:
    return f"known are {', '.join(options)}" if options else "none is known"


def _check(where: str, annotation: Any, value: Any) -> None:
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return
    try:
        adapter = _adapter(annotation)
    except PydanticUserError:  # a type of the function's own, which only the function can judge
        return
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise mistake(where, error) from None
