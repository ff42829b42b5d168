"""`apply` makes the smaller model of a plan; `mask` makes a model of full size that computes the same, to test it."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hap import HapError
from hap.hessian.losses import Loss
from hap.plan import Plan
from hap.structure.groups import Gone, Groups
from hap.structure.heads import recount
from hap.structure.layers import Call, axis, evaluating, first_tensor, forward, is_mixing
from hap.surgery.cut import Cut, cuts, gone, norm_behind
from hap.surgery.cut import replace as replace
from hap.surgery.cut import resize as resize
from hap.surgery.head_implants import bridge
from hap.surgery.masking import silence
from hap.surgery.patch import Patch
from hap.surgery.refit import MEMORY, Update, refit


@dataclass(frozen=True)
class Inputs:
    """The data from which an implant is computed: inputs of the layer in the dense model on calibration batches."""

    batches: Callable[[], Iterator[Tensor]]  # one input of the dense layer for each batch
    slots: Int[Tensor, "kept"]  # the input channels that the implant reads
    constant: bool  # whether a bias costs nothing: the layer has one, or the BatchNorm behind it can take it


# (dense layer, its rows, Inputs); for heads (layer behind them, its slots, Passing)
Implant = Callable[[nn.Module, Tensor, Any], nn.Module]
Layer = TypeVar("Layer", bound=nn.Module)


@torch.inference_mode(mode=False)
def apply(
    model: nn.Module,
    groups: Groups,
    plan: Plan,
    implant: Implant | None = None,
    update: Update | None = None,
    *,
    batches: Iterable[Any] = (),
    call: Call = forward,
    loss: Loss | None = None,
    memory: int = MEMORY,
) -> nn.Module:
    """A copy of the model without the rows and slots that the plan drops, with implants and updated weights.

    `implant`: makes the modules for the fate `o`; needed where the plan has such rows. `update`: makes new weights for
    layers that lost inputs; None leaves the weights. `batches`: calibration inputs, as `call` takes them, without
    targets, for implants and updates. `loss`: for an update that takes curvature. `memory`: bytes of the passes that
    wait for an update. Where the slot of a dropped row stays, a `Patch` writes zeros; a BatchNorm that only dropped
    rows feed becomes narrower with them. HapError for a plan of other groups, for an implant or batches that are
    missing, for a layer other than nn.Linear that loses all rows or slots, and for a model that cannot be copied.

    >>> from hap.plan import plan
    >>> model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 3)
    >>> groups = couple(model, trace(model, x))
    >>> small = apply(model, groups, plan(groups, torch.tensor([0.3, 0.1, 0.2, 0.4]), Budget(groups=0.5)))
    >>> [tuple(p.shape) for p in small.parameters()]
    [(2, 3), (2,), (2, 2), (2,)]
    """
    found, batches = cuts(groups, plan), list(batches)
    small = _copied(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, cut in found.items():
        module = small.get_submodule(name)
        if not isinstance(module, nn.Linear) and not (len(cut.kept) + len(cut.implanted) and len(cut.slots)):
            raise HapError(f"{name}: a {type(module).__name__} must keep a row and an input, found none in the plan")
        parts = [resize(copy.deepcopy(module), cut.kept, cut.slots)] if len(cut.kept) or not len(cut.implanted) else []
        if len(cut.implanted):
            if implant is None:
                raise HapError(f"{name}: the plan has implants, so apply() needs an implant, found none")
            inputs = _inputs(model, groups, name, cut, batches, call)
            made = implant(model.get_submodule(name), cut.implanted, inputs)
            parts.append(_absorb(small, groups, found, name, made))
        replace(small, module, _patched(module, cut, parts, device).train(module.training))
    recount(small, model, groups.feeds, {name: len(cut.kept) + len(cut.implanted) for name, cut in found.items()})
    if plan.rank is not None:
        if implant is None:
            raise HapError("the plan has implants of heads, so apply() needs an implant, found none")
        bridge(small, model, groups, plan, implant, batches, call)
    if update is not None:
        refit(small, model, groups, found, update, batches, call, loss=loss, memory=memory)
    return small


def added(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Layer -> number of the biases that an update gave it in `small`, for layers without bias in the dense model."""
    found = {}
    for name, module in model.named_modules():
        if is_mixing(module) and module.bias is None:
            own = small.get_submodule(name).named_parameters()
            found[name] = sum(p.numel() for key, p in own if key.rpartition(".")[2] == "bias")
    return {name: count for name, count in found.items() if count}


@torch.inference_mode(mode=False)
def mask(model: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    """A copy of the same size that computes what `apply` with zero implants computes, to test it: hooks write zeros.

    HapError for a plan of other groups, and for a model that cannot be copied.

    >>> from hap.plan import plan
    >>> model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 3)
    >>> groups = couple(model, trace(model, x))
    >>> chosen = plan(groups, torch.tensor([0.3, 0.1, 0.2, 0.4]), Budget(groups=0.5))
    >>> torch.allclose(mask(model, groups, chosen)(x), apply(model, groups, chosen)(x), atol=1e-6)
    True
    """
    away, implanted = gone(groups, plan)
    masked = _copied(model)
    silence(masked, groups, Gone(away.rows | implanted, away.slots))
    return masked


def _copied(model: Layer) -> Layer:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # raised by FSDP, by tensors left by an earlier pass, by locks and files
        says = (str(error).strip().splitlines() or [type(error).__name__])[0]
        do = "take off what wraps it, or drop what is no parameter and no buffer"
        raise HapError(f"apply: {type(model).__name__} cannot be copied ({says}); {do}") from error


def _patched(module: nn.Module, cut: Cut, parts: list[nn.Module], device: torch.device) -> nn.Module:
    """The single part, where it reads all inputs and writes all rows in order; else a Patch."""
    places = (cut.written.cumsum(0) - 1)[torch.cat([cut.kept, cut.implanted])]
    take, given, width = (cut.given.cumsum(0) - 1)[cut.slots], int(cut.given.sum()), int(cut.written.sum())
    if len(parts) == 1 and len(take) == given and torch.equal(places, torch.arange(width)):
        return parts[0]
    return Patch(parts, places.to(device), take.to(device), axis(module), given, width)


def _absorb(small: nn.Module, groups: Groups, cuts: dict[str, Cut], name: str, implant: nn.Module) -> nn.Module:
    """The implant, its bias moved into the BatchNorm behind it, where the layer itself has no bias."""
    bias = getattr(implant, "bias", None)
    if not isinstance(bias, Tensor) or groups.shapes[name].extras:
        return implant
    if (found := norm_behind(small, groups, cuts, name, cuts[name].implanted)) is None:
        raise HapError(f"{name}: an implant without a bias expected, for neither it nor a BatchNorm behind it has one")
    norm, slots = found
    assert norm.running_mean is not None
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
