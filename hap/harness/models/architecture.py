"""What surgery made of a model, as a JSON-able record, and back; knows no files, and no weights.

A record says which modules of the class's fresh instance were narrowed or replaced, and by what. All else is what the
function that builds the original makes; what was changed by hand beside modules, parameters and buffers (a rate of
dropout, a hook) is not seen. A record may come from a stranger: all of it is checked before memory is taken.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from hap.harness.models.layers import Count, Entry, layer, make
from hap.harness.models.layers import describe as entry_of
from hap.harness.spec.functions import Strict, mistake, wrong
from hap.structure.bypass import Borrower, Lender
from hap.structure.heads import COUNTERS
from hap.structure.layers import widths
from hap.surgery.apply import replace
from hap.surgery.patch import Patch


class Architecture(Strict):
    """The whole record; flags and layouts are told where they are not what is usual."""

    types: dict[str, str]  # the class of every module of the original
    modules: dict[str, Entry]
    shared: dict[str, str]  # a tensor's further name -> its first
    strides: dict[str, tuple[Count, ...]]  # of tensors that are not contiguous
    frozen: tuple[str, ...]  # parameters that take no gradient
    training: bool
    switched: tuple[str, ...]  # modules in the other mode than the model
    counters: Annotated[
        dict[str, Count], Field(default_factory=dict)
    ]  # of the heads that are left, where a module counts them


def describe(model: nn.Module, original: nn.Module) -> dict[str, Any]:
    """What makes of `original`, a fresh instance of the class, a model of the shape of `model`; JSON-able.

    Raises HapError, with the name, where a module differs by more than surgery, and implants of known classes, change.
    """
    fresh, found, changed = _modules(original), _modules(model), dict[str, Any]()
    for name, module in fresh.items():
        if any(name.startswith(f"{outer}.") for outer in changed):
            continue
        if name not in found:
            raise wrong(name, f"must be in the pruned model, as in a fresh {type(original).__name__}")
        other = found[name]
        differs = type(module) is not type(other) or layer(module) != layer(other)
        if differs and not any(found[known] is other for known in changed):  # a module may have two names
            changed[name] = entry_of(name or "the model", other)
    own = tensors(model)
    record = Architecture(
        types={name: type(module).__name__ for name, module in fresh.items()},
        modules=changed,
        shared={name: first for name, first in _firsts(model).items() if name != first},
        strides={name: t.stride() for name, t in own.items() if t.stride() != _strides(t) and _dense(t, t.stride())},
        frozen=tuple(name for name, t in own.items() if isinstance(t, nn.Parameter) and not t.requires_grad),
        training=model.training,
        switched=tuple(name for name, module in found.items() if module.training != model.training),
        counters={
            f"{name}.{counter}": value
            for name, module in fresh.items()
            for counter, whole in _counters(module).items()
            if (value := getattr(found[name], counter)) != whole
        },
    ).model_dump(mode="json")
    again = tensors(rebuild(copy.deepcopy(original), record))
    for name in sorted(again.keys() | own.keys()):
        given, made = (tuple(each[name].shape) if name in each else None for each in (own, again))
        if given != made:
            raise wrong(name, f"must follow from the modules, which make its shape {made}", given)
    return record


def rebuild(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """The model, freshly built, brought to the shape that `describe` saw; the numbers in it are any.

    Raises HapError where the record is not one, or is of another class's modules.
    """
    try:
        read = Architecture.model_validate_json(json.dumps(record))
    except ValidationError as error:
        raise mistake("", error) from None
    found = _modules(model)
    for name in sorted(found.keys() | read.types.keys()):
        has, needed = type(found[name]).__name__ if name in found else None, read.types.get(name)
        if has != needed:
            raise wrong(name or "the model", f"must be {needed or 'absent'}, as when it was saved", has)
    _known("modules", read.modules, found.keys() - {""})
    made = {name: make(f"modules.{name}", entry, found[name]) for name, entry in read.modules.items()}
    room = sum(p.numel() for p in model.parameters())
    if (size := sum(p.numel() for module in made.values() for p in module.parameters())) > room:
        raise wrong("modules", f"must have at most the {room} parameters of the original", size)
    for name, module in made.items():
        device = next((t.device for t in found[name].parameters()), torch.device("cpu"))
        replace(model, found[name], module.to_empty(device=device))
    _join(made)
    _recount(model, read.counters)
    _share(model, read.shared)
    _arrange(model, read)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a model saves, each under the first of its names."""
    state = model.state_dict(keep_vars=True)
    return {name: state[name] for name, first in _firsts(model).items() if name == first}


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives each parameter and buffer of a rebuilt model its value, in the layout that it has and where it is.

    Raises HapError for values of other names, shapes or kinds, and for the indices of a Patch that point outside.
    """
    own = tensors(model)
    if differ := sorted(own.keys() ^ values.keys()):
        raise wrong(differ[0], "must be there" if differ[0] in own else "must not be there")
    for name, t in own.items():
        value = values[name]
        if value.shape != t.shape:
            raise wrong(name, f"must be of shape {tuple(t.shape)}", tuple(value.shape))
        if value.dtype != t.dtype and not (value.is_floating_point() and t.is_floating_point()):
            raise wrong(name, f"must be {t.dtype}", value.dtype)
        t.data = torch.empty_strided(t.shape, t.stride(), dtype=value.dtype, device=t.device).copy_(value)
    for name, module in model.named_modules():
        if isinstance(module, Patch):
            for index, width in (("places", module.width), ("take", module.given)):
                numbers = getattr(module, index).tolist()
                if len(set(numbers)) < len(numbers) or not all(0 <= number < width for number in numbers):
                    raise wrong(f"{name}.{index}", f"must be different numbers from 0 to {width - 1}", numbers)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _firsts(model: nn.Module) -> dict[str, str]:
    """The first name of the tensor that each name of the state has."""
    first, firsts = dict[int, str](), dict[str, str]()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise wrong(name, "must be a tensor to be saved", type(value).__name__)
        firsts[name] = first.setdefault(id(value), name)
    return firsts


def _counters(module: nn.Module) -> dict[str, int]:
    """The numbers in which a module counts its heads."""
    return {name: value for name in COUNTERS if type(value := getattr(module, name, None)) is int}


def _recount(model: nn.Module, counters: Mapping[str, int]) -> None:
    for name, value in counters.items():
        owner, _, counter = name.rpartition(".")
        whole = _counters(_modules(model).get(owner, nn.Identity())).get(counter, -1)
        if value > whole:
            raise wrong(f"counters.{name}", f"must be at most {whole}, as in the original", value)
        setattr(model.get_submodule(owner), counter, value)


def _join(made: Mapping[str, nn.Module]) -> None:
    """Gives each Lender and its Borrower one Relay, and checks that they fit."""
    lenders, borrowers = (
        {module.relay.name: (name, module) for name, module in made.items() if isinstance(module, kind)}
        for kind in (Lender, Borrower)
    )
    count = sum(isinstance(module, Lender | Borrower) for module in made.values())
    if lenders.keys() != borrowers.keys() or count != 2 * len(lenders):
        raise wrong("modules", "must have one Lender for each Borrower", sorted(lenders.keys() ^ borrowers.keys()))
    for relay, (name, borrower) in borrowers.items():
        lender = lenders[relay][1]
        sizes = [
            widths(each)
            for each in (*list(borrower.get_submodule("implant").modules()), borrower.layer)
            if isinstance(each, nn.Linear)
        ]
        read = widths(lender.layer)[1] if isinstance(lender.layer, nn.Linear) else -1
        if len(sizes) > 1 and (sizes[0][1] != read or sizes[-2][0] != sizes[-1][0]):
            raise wrong(f"modules.{name}.implant", f"must read {read} and write {sizes[-1][0]} numbers", sizes[:-1])
        borrower.relay = lender.relay


def _known(where: str, names: Any, known: Any) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise wrong(where, "must name what is in the model", unknown[0])


def _share(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Makes each name that shared a tensor with an earlier one share it again."""
    state = model.state_dict(keep_vars=True)
    _known("shared", [*shared, *shared.values()], state)
    for name, first in shared.items():
        owner, _, leaf = name.rpartition(".")
        if type(state[name]) is not type(state[first]) or state[name].shape != state[first].shape:
            raise wrong(f"shared.{name}", f"must be like {first}", tuple(state[name].shape))
        setattr(model.get_submodule(owner), leaf, state[first])


def _arrange(model: nn.Module, read: Architecture) -> None:
    """Layouts, gradients and modes."""
    own, found = tensors(model), _modules(model)
    _known("strides", read.strides, own)
    _known("frozen", read.frozen, dict(model.named_parameters()))
    _known("switched", read.switched, found)
    for name, t in own.items():
        strides = read.strides.get(name, _strides(t))
        if not _dense(t, strides):
            raise wrong(f"strides.{name}", f"must lay out {tuple(t.shape)} without gap or overlap", strides)
        t.data = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in read.frozen)
    for name, module in found.items():
        module.training = read.training != (name in read.switched)


def _strides(t: Tensor) -> tuple[int, ...]:
    """Those of a contiguous tensor of this shape."""
    return torch.empty(t.shape, device="meta").stride()


def _dense(t: Tensor, strides: Sequence[int]) -> bool:
    """Whether each element has a place of its own and no place is empty; an axis of one element may have any stride."""
    if len(strides) != t.dim():
        return False
    steps = sorted((step, n) for step, n in zip(strides, t.shape, strict=True) if n > 1)
    step = 1
    for found, n in steps:
        if found != step:
            return False
        step *= n
    return True
