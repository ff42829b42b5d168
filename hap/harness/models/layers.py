"""The sizes of one module as an entry of a record, and the module of an entry; knows nothing of models or files.

An entry may come from a stranger: only the classes named here are built, and no memory is taken, for a module is made
on torch's meta device.
"""

import copy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn

from hap.harness.spec.functions import Strict, mistake, wrong
from hap.structure.bypass import Borrower, Lender, Relay
from hap.structure.layers import axis, widths
from hap.surgery.patch import Patch

LAYERS: dict[str, Any] = {kind: getattr(nn, kind) for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d")}
LAYERS |= {f"{norm}{d}d": getattr(nn, f"{norm}{d}d") for norm in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)}
PLAIN: dict[str, Any] = {"Identity": nn.Identity, "ReLU": nn.ReLU}
Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class Linear(Strict):
    """A linear layer."""

    kind: Literal["Linear"]
    like: str | None  # the class of the original, where it is a subclass of the kind
    in_features: Count
    out_features: Count
    bias: bool


class Conv(Strict):
    """A convolution."""

    kind: Literal["Conv1d", "Conv2d", "Conv3d"]
    like: str | None
    in_channels: Size
    out_channels: Size
    kernel_size: tuple[Size, ...]
    stride: tuple[Size, ...]
    padding: tuple[Count, ...] | Literal["same", "valid"]
    dilation: tuple[Size, ...]
    groups: Size
    bias: bool
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]


class Norm(Strict):
    """A channelwise normalisation."""

    kind: Literal["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]
    like: str | None
    num_features: Size
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool


class Plain(Strict):
    """A module without sizes."""

    kind: Literal["Identity", "ReLU"]


class Several(Strict):
    """Modules one after another, as an implant may be."""

    kind: Literal["Sequential"]
    parts: "tuple[Part, ...]"


Part = Annotated[Linear | Conv | Norm | Plain | Several, Field(discriminator="kind")]


class Patched(Strict):
    """A Patch; of its indices the number, for their values lie with the weights."""

    kind: Literal["Patch"]
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    axis: Literal[1, -1]
    given: Size
    width: Size
    places: Count
    take: Count


class Lent(Strict):
    """The first layer of heads that an implant stands in for."""

    kind: Literal["Lender"]
    layer: Part
    relay: str


class Borrowed(Strict):
    """The layer behind such heads, and the implant."""

    kind: Literal["Borrower"]
    layer: Part
    implant: Part
    relay: str


Entry = Annotated[Linear | Conv | Norm | Plain | Several | Patched | Lent | Borrowed, Field(discriminator="kind")]


def layer(module: nn.Module) -> Any:
    """The sizes of a module that surgery narrows; None of any other."""
    kind = next((kind for kind, known in LAYERS.items() if isinstance(module, known)), "")
    if not kind:
        return None
    entry: Any = Linear if kind == "Linear" else Conv if kind.startswith("Conv") else Norm
    own = {name: getattr(module, name) for name in entry.model_fields.keys() - {"kind", "like"}}
    own |= {"bias": own["bias"] is not None} if "bias" in own else {}
    try:
        return entry(kind=kind, like=None if type(module) is LAYERS[kind] else named(module), **own)
    except ValidationError as error:
        raise mistake(named(module), error) from None


def describe(where: str, module: nn.Module) -> Any:
    """The entry of a module that surgery put there; HapError for a class that is not known."""
    if isinstance(module, Patch):
        numbers = {name: getattr(module, name) for name in ("axis", "given", "width")}
        numbers |= {name: len(getattr(module, name)) for name in ("places", "take")}
        return Patched(kind="Patch", parts=_parts(f"{where}.parts", module.parts), **numbers)
    if isinstance(module, Lender | Borrower):
        return _around(where, module)
    if type(module) is nn.Sequential:
        return Several(kind="Sequential", parts=_parts(where, module))
    if type(module) in PLAIN.values():
        return Plain.model_validate({"kind": type(module).__name__})
    entry = layer(module)
    if entry is None:
        known = ", ".join(["Patch", "Lender", "Borrower", "Sequential", *PLAIN, *LAYERS])
        raise wrong(where, f"must be as in the original or one of {known} to be saved", named(module))
    return entry


def make(where: str, entry: Any, origin: nn.Module) -> nn.Module:
    """The module of an entry, without memory; `origin` is what it replaces in the original."""
    if isinstance(entry, Plain):
        return PLAIN[entry.kind]()  # type: ignore[no-any-return]
    if isinstance(entry, Lent):
        return Lender(make(f"{where}.layer", entry.layer, origin), Relay(entry.relay))
    if isinstance(entry, Borrowed):
        layer, implant = (make(f"{where}.{name}", getattr(entry, name), origin) for name in ("layer", "implant"))
        return Borrower(layer, implant, Relay(entry.relay))
    if isinstance(entry, Several | Patched):
        parts = [make(f"{where}.parts[{i}]", part, origin) for i, part in enumerate(entry.parts, start=1)]
        return nn.Sequential(*parts) if isinstance(entry, Several) else _patch(where, entry, parts, origin)
    given = entry.model_dump(exclude={"kind", "like"})
    if any(len(value) != int(entry.kind[-2]) for value in given.values() if isinstance(value, tuple)):
        raise wrong(where, f"must have {entry.kind[-2]} numbers for each size, as a {entry.kind} has", given)
    try:
        fresh = LAYERS[entry.kind](**given, device="meta")
    except (RuntimeError, TypeError, ValueError) as error:
        raise wrong(where, f"must have the sizes of a {entry.kind}", str(error).partition("\n")[0]) from None
    if entry.like is None:
        return fresh  # type: ignore[no-any-return]
    if entry.like != named(origin):
        raise wrong(f"{where}.like", f"must be {named(origin)}, the class of the original", entry.like)
    made = copy.deepcopy(origin)
    changed = {*given, "_parameters", "_buffers", "_reversed_padding_repeated_twice"}
    vars(made).update({name: value for name, value in vars(fresh).items() if name in changed})
    return made


def named(module: nn.Module) -> str:
    """The class of a module with its place."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _around(where: str, module: Lender | Borrower) -> Lent | Borrowed:
    own = ["layer"] if isinstance(module, Lender) else ["layer", "implant"]
    parts = {}
    for name in own:
        parts[name] = describe(f"{where}.{name}", getattr(module, name))
        if not isinstance(parts[name], Linear | Conv | Norm | Plain | Several):
            raise wrong(f"{where}.{name}", "must be a layer, or several, to be saved", parts[name].kind)
    kind = Lent if isinstance(module, Lender) else Borrowed
    return kind(kind=type(module).__name__, relay=module.relay.name, **parts)  # type: ignore[arg-type]


def _parts(where: str, modules: Any) -> tuple[Any, ...]:
    for i, module in enumerate(modules):
        if isinstance(module, Patch):
            raise wrong(f"{where}.{i}", "must not be a Patch within another module to be saved")
    return tuple(describe(f"{where}.{i}", module) for i, module in enumerate(modules))


def _patch(where: str, entry: Patched, parts: list[nn.Module], origin: nn.Module) -> Patch:
    if layer(origin) is None or entry.axis != axis(origin):
        raise wrong(where, "must stand for a layer, along the axis of its channels", f"{named(origin)}, {entry.axis}")
    rows, slots = widths(origin)
    for name, most in (("places", entry.width), ("take", entry.given), ("width", rows), ("given", slots)):
        if getattr(entry, name) > most:
            raise wrong(f"{where}.{name}", f"must be at most {most}", getattr(entry, name))
    sizes = [widths(part) for part in parts if layer(part) is not None]
    wrote, read = sum(part[0] for part in sizes), {part[1] for part in sizes}
    if len(sizes) == len(parts) and (wrote != entry.places or read != {entry.take}):
        raise wrong(f"{where}.parts", f"must write {entry.places} rows and read {entry.take} inputs", sizes)
    places, take = (torch.empty(number, dtype=torch.long, device="meta") for number in (entry.places, entry.take))
    return Patch(parts, places, take, entry.axis, entry.given, entry.width)
