"""Carry a plan out: `apply` gives a smaller ordinary module, `mask` the same function at full size, its oracle."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from hap import HapError
from hap.plan import Fate, Plan, by_row, dropped
from hap.structure.groups import Gone, Groups, components
from hap.structure.heads import recount
from hap.structure.layers import Call, axis, evaluating, first_tensor, forward
from hap.surgery.head_implants import bridge
from hap.surgery.masking import silence
from hap.surgery.patch import Patch


@dataclass(frozen=True)
class Inputs:
    """What an implant may look at: the inputs of the layer in the dense model, over the calibration batches."""

    batches: Callable[[], Iterator[Tensor]]  # each as the dense layer sees it
    slots: Int[Tensor, "kept"]  # of them, those the implant will be given
    constant: bool  # whether a bias costs nothing: the layer has one, or a BatchNorm follows that takes it


# the dense layer and which of its rows; of heads the layer behind them and which of its slots
Implant = Callable[[nn.Module, Tensor, Any], nn.Module]  # the last: Inputs, or of heads Passing
Layer = TypeVar("Layer", bound=nn.Module)


class Cut(NamedTuple):
    """What becomes of one module; indices into its own rows and slots."""

    kept: Int[Tensor, "kept"]  # rows computed as before
    implanted: Int[Tensor, "implanted"]
    written: Bool[Tensor, "rows"]  # rows that are there to be read, computed or zero
    slots: Int[Tensor, "slots_kept"]
    given: Bool[Tensor, "slots"]  # slots that are there to be read


@torch.inference_mode(mode=False)
def apply(
    model: nn.Module,
    groups: Groups,
    plan: Plan,
    implant: Implant | None = None,
    *,
    batches: Iterable[Any] = (),
    call: Call = forward,
) -> nn.Module:
    """A copy of the model without what the plan drops, and with implants where it says so.

    `batches`: calibration inputs, as `call` takes them and without targets, for implants that look at them. Where the
    coupling leaves a dropped row's slot alive, a `Patch` writes zeros; a BatchNorm that only dropped rows feed is
    narrowed with them. Raises HapError for a plan of other groups, and for a layer that loses all it has.
    """
    cuts, batches = _cuts(groups, plan), list(batches)
    small = _copied(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, cut in cuts.items():
        module = small.get_submodule(name)
        if not isinstance(module, nn.Linear) and not (len(cut.kept) + len(cut.implanted) and len(cut.slots)):
            raise HapError(f"{name}: a {type(module).__name__} must keep a row and an input, found none in the plan")
        parts = [resize(copy.deepcopy(module), cut.kept, cut.slots)] if len(cut.kept) or not len(cut.implanted) else []
        if len(cut.implanted):
            if implant is None:
                raise HapError(f"{name}: the plan has implants, so apply() needs an implant, found none")
            inputs = _inputs(model, groups, name, cut, batches, call)
            made = implant(model.get_submodule(name), cut.implanted, inputs)
            parts.append(_absorb(small, groups, cuts, name, made))
        replace(small, module, _patched(module, cut, parts, device).train(module.training))
    recount(small, model, groups.feeds, {name: len(cut.kept) + len(cut.implanted) for name, cut in cuts.items()})
    if plan.rank is not None:
        if implant is None:
            raise HapError("the plan has implants of heads, so apply() needs an implant, found none")
        bridge(small, model, groups, plan, implant, batches, call)
    return small


@torch.inference_mode(mode=False)
def mask(model: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    """A copy of the same size that computes what `apply` with zero implants computes: the oracle of the tests."""
    gone, implanted = _gone(groups, plan)
    masked = _copied(model)
    silence(masked, groups, Gone(gone.rows | implanted, gone.slots))
    return masked


def _copied(model: Layer) -> Layer:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of FSDP, of tensors that an earlier pass has left, of locks and files
        says = (str(error).strip().splitlines() or [type(error).__name__])[0]
        do = "take off what wraps it, or drop what is no parameter and no buffer"
        raise HapError(f"apply: {type(model).__name__} cannot be copied ({says}); {do}") from error


def resize(module: Layer, rows: Tensor, slots: Tensor) -> Layer:
    """Keep only these rows and slots of a convolution, linear or channelwise layer, in place and in its format."""
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.dim() == 0:
            continue  # num_batches_tracked
        cut = value.detach().index_select(0, rows.to(value.device))
        if value.dim() > 1 and getattr(module, "groups", 1) == 1:
            cut = cut.index_select(1, slots.to(value.device))
        if value.dim() == 4 and not value.is_contiguous():
            cut = cut.contiguous(memory_format=torch.channels_last)
        trained = isinstance(value, nn.Parameter)
        setattr(module, name, nn.Parameter(cut, requires_grad=value.requires_grad) if trained else cut)
    if isinstance(module, _ConvNd):  # of a grouped one whole groups go
        module.groups = max(1, len(slots) * module.groups // module.in_channels)
    wide = {
        "out_features": rows,
        "out_channels": rows,
        "num_features": rows,
        "in_features": slots,
        "in_channels": slots,
    }
    for name in wide.keys() & vars(module).keys():
        setattr(module, name, len(wide[name]))
    return module


def _gone(groups: Groups, plan: Plan) -> tuple[Gone, Tensor]:
    fates = plan.fates(groups)
    gone = groups.gone(dropped(groups, fates, plan.rank))
    able = torch.cat([torch.full((s.rows,), s.implantable) for s in groups.shapes.values()])
    return gone, (by_row(groups, fates) == Fate.IMPLANT) & able & ~gone.rows


def _cuts(groups: Groups, plan: Plan) -> dict[str, Cut]:
    """Rows and slots that share a wire (a position of some tensor) are there as long as one of them is alive."""
    gone, implanted = _gone(groups, plan)
    n = len(gone.rows)
    wire = components(n + len(gone.slots), groups.feeds.edges[0], groups.feeds.edges[1] + n)
    alive = torch.zeros(n + len(gone.slots), dtype=torch.bool)
    alive[wire[~torch.cat([gone.rows, gone.slots])]] = True
    alive[wire[n:][groups.feeds.padded_slots]] = True
    there = alive[wire]
    cuts = {}
    for name, s in groups.shapes.items():
        rows, slots = s.rows_at, s.slots_at
        kept = (~gone.rows[rows] & ~implanted[rows]).nonzero()[:, 0]
        read = (~gone.slots[slots]).nonzero()[:, 0]
        cut = Cut(kept, implanted[rows].nonzero()[:, 0], there[:n][rows], read, there[n:][slots])
        if len(kept) < s.rows or len(cut.slots) < s.slots:
            cuts[name] = cut
    return cuts


def _patched(module: nn.Module, cut: Cut, parts: list[nn.Module], device: torch.device) -> nn.Module:
    """One part alone where nothing is selected or scattered, else a Patch."""
    places = (cut.written.cumsum(0) - 1)[torch.cat([cut.kept, cut.implanted])]
    take, given, width = (cut.given.cumsum(0) - 1)[cut.slots], int(cut.given.sum()), int(cut.written.sum())
    if len(parts) == 1 and len(take) == given and torch.equal(places, torch.arange(width)):
        return parts[0]
    return Patch(parts, places.to(device), take.to(device), axis(module), given, width)


def _absorb(small: nn.Module, groups: Groups, cuts: dict[str, Cut], name: str, implant: nn.Module) -> nn.Module:
    """Move the implant's bias into the BatchNorm that reads it, where the layer itself has none."""
    bias = getattr(implant, "bias", None)
    if not isinstance(bias, Tensor) or groups.shapes[name].extras:
        return implant
    norm_name, slots = groups.norm_behind(name, cuts[name].implanted)
    norm = small.get_submodule(norm_name)
    norm = norm.parts[0] if isinstance(norm, Patch) else norm
    if not isinstance(norm, _BatchNorm | _InstanceNorm) or norm.running_mean is None:
        raise HapError(f"{name}: an implant without a bias expected, for neither it nor a BatchNorm behind it has one")
    # the norm may have been narrowed already: the order of modules in a model is not the order of the data
    if norm_name in cuts and norm.num_features == len(cuts[norm_name].kept):
        slots = torch.searchsorted(cuts[norm_name].kept, slots)
    with torch.no_grad():
        norm.running_mean[slots] -= bias.detach()
    implant.register_parameter("bias", None)
    return implant


def _inputs(model: nn.Module, groups: Groups, name: str, cut: Cut, batches: Iterable[Any], call: Call) -> Inputs:
    module = model.get_submodule(name)
    norm = groups.norm_behind(name, cut.implanted)[0]
    tracked = bool(norm) and getattr(model.get_submodule(norm), "running_mean", None) is not None

    def seen() -> Iterator[Tensor]:
        held: list[Tensor] = []
        with module.register_forward_pre_hook(
            lambda _, args, kwargs: held.append(first_tensor(args, kwargs).detach()), with_kwargs=True
        ):
            for batch in batches:
                with torch.no_grad(), evaluating(model):
                    call(model, batch)
                yield from held
                held.clear()

    return Inputs(seen, cut.slots, tracked or getattr(module, "bias", None) is not None)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in another's place, under each of its names."""
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
