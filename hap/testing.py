"""Checks of what a model, a score, an implant or an update must satisfy; call them in the tests of your own method.

A check returns None, or raises HapError with the rule and what it found.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hap import HapError, cost
from hap.hessian.losses import Loss
from hap.implants import zero
from hap.plan import Fate, Plan
from hap.plan import cost as planned
from hap.structure.diagnosis import refuse_random
from hap.structure.groups import Groups
from hap.structure.layers import Call, axis, failure, forward
from hap.surgery.apply import Implant, Inputs, apply, mask
from hap.surgery.cut import resize
from hap.surgery.head_implants import Passing
from hap.surgery.moments import Sums
from hap.surgery.refit import Update

Score = Callable[..., Tensor]


def random_plan(groups: Groups, rng: torch.Generator, drop: float = 0.4, implant: float = 0.2) -> Plan:
    """A plan that drops and implants groups at random, with these probabilities; one row of every layer is kept.

    A layer with a frozen row keeps that one. `rng` draws all random numbers.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> groups = couple(model, trace(model, torch.zeros(1, 4)))
    >>> random_plan(groups, torch.Generator().manual_seed(0)).rows  # keep #, implant o, drop -
    {'0': 'o#---#', '2': '##'}
    """
    draw = torch.rand(len(groups), generator=rng)
    fates = torch.full((len(groups),), int(Fate.KEEP))
    fates[draw < drop + implant] = int(Fate.IMPLANT)
    fates[draw < drop] = int(Fate.DROP)
    for s in groups.shapes.values():
        of = groups.row_group[s.rows_at]
        if s.mixing and bool((of >= 0).all()):
            fates[of[int(torch.randint(len(of), (), generator=rng))]] = int(Fate.KEEP)
    return Plan.of(groups, fates)


@torch.no_grad()
def check_groups(
    model: nn.Module, example: Any, groups: Groups, *, call: Call = forward, trials: int = 8, tolerance: float = 1e-4
) -> None:
    """On `trials` random plans: the pruned and the masked model have equal outputs, and the planned cost is true.

    `tolerance`: the largest difference of outputs, as a fraction of the largest output. HapError where outputs differ,
    a model does not run, or the number of parameters is not the predicted one.

    >>> model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(2, 4)
    >>> check_groups(model, x, couple(model, trace(model, x)))
    """
    rng = torch.Generator().manual_seed(0)
    for trial in range(trials):
        chosen = random_plan(groups, rng, drop=(0.2, 0.5, 0.8)[trial % 3])
        small, oracle = apply(model, groups, chosen, zero).eval(), mask(model, groups, chosen).eval()
        outputs = _outputs("pruned", small, example, call), _outputs("masked", oracle, example, call)
        shapes = [[tuple(t.shape) for t in tensors] for tensors in outputs]
        if shapes[0] != shapes[1]:
            raise HapError(
                f"check_groups: outputs of the masked model's shapes {shapes[1]} expected, found {shapes[0]}"
            )
        one, other = (torch.cat([t.flatten() for t in tensors]) for tensors in outputs)
        gap = float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
        if not gap <= tolerance:
            refuse_random(oracle, example, call)
            raise HapError(f"check_groups: surgery and masking differ by {gap:.1e} relative, {tolerance:.0e} allowed")
        left = planned(groups, chosen.fates(groups)).params
        if left != cost.params(small):
            raise HapError(f"check_groups: {left} parameters predicted, found {cost.params(small)}")


def check_score(score: Score, model: nn.Module, loss: Loss, batches: Iterable[Any], groups: Groups) -> None:
    """A score is one finite number per group, is the same for the same seed, and does not change the model.

    `batches`: pairs of inputs and targets; `groups`: those of `model`. HapError where one of these rules is broken.

    >>> from hap.methods import magnitude
    >>> model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(2, 4)
    >>> batches, groups = [(x, torch.tensor([0, 1]))], couple(model, trace(model, x))
    >>> check_score(magnitude, model, CrossEntropy(), batches, groups)
    >>> check_score(lambda *args, rng: torch.zeros(3), model, CrossEntropy(), batches, groups)
    Traceback (most recent call last):
    hap.HapError: check_score: 6 finite numbers expected, found (3,) or not finite
    """
    batches = list(batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    first, second = (score(model, loss, batches, groups, rng=torch.Generator().manual_seed(0)) for _ in range(2))
    if first.shape != (len(groups),) or not bool(first.isfinite().all()):
        raise HapError(f"check_score: {len(groups)} finite numbers expected, found {tuple(first.shape)} or not finite")
    if first.requires_grad:
        raise HapError("check_score: the scores carry a gradient; detach them")
    if not torch.equal(first, second):
        raise HapError("check_score: two runs with the same seed differ; draw random numbers from rng only")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    kept = modes == [m.training for m in model.modules()] and needs == [p.requires_grad for p in model.parameters()]
    if changed or not kept:
        raise HapError(f"check_score: the model was left changed ({changed[0] if changed else 'its modes'})")
    if any(p.grad is not None for p in model.parameters()):
        raise HapError("check_score: gradients were left on the parameters; use torch.autograd.grad")


@torch.no_grad()
def check_implant(implant: Implant, module: nn.Module, x: Tensor) -> None:
    """An implant gives the rows asked for, at the output positions of the module, and does not change the module.

    `x`: input of the module, [batch, channels, ...]. HapError where one of these rules is broken.

    >>> from hap.implants import centre_tap
    >>> module, x = nn.Conv2d(3, 8, 3, padding=1), torch.ones(2, 3, 5, 5)
    >>> check_implant(centre_tap, module, x)
    >>> check_implant(lambda module, rows, inputs: nn.Conv2d(len(inputs.slots), 1, 1), module, x)
    Traceback (most recent call last):
    hap.HapError: check_implant: output of shape (2, 8, 5, 5) expected, found (2, 1, 5, 5)
    """
    before = {name: value.clone() for name, value in module.state_dict().items()}
    y = module(x)
    for rows, slots in ((torch.tensor([0]), torch.arange(x.shape[1])), (torch.arange(y.shape[1]), torch.tensor([0]))):
        small = implant(module, rows, Inputs(lambda: iter([x]), slots, True))
        shape = (y.shape[0], len(rows), *y.shape[2:])
        try:
            found = tuple(small(x.index_select(1, slots)).shape)
        except Exception as error:  # an implant is foreign code and may raise anything
            raise HapError(f"check_implant: it does not run ({failure(error, small)})") from error
        if found != shape:
            raise HapError(f"check_implant: output of shape {shape} expected, found {found}")
    if any(not torch.equal(value, before[name]) for name, value in module.state_dict().items()):
        raise HapError("check_implant: the module was changed; build a new one")


def check_update(update: Update, reader: nn.Module, x: Tensor) -> None:
    """An update gives a reader with half of its inputs finite weights of the right shapes, and changes nothing.

    `x`: an input batch of the whole reader, whose outputs are the wanted ones. HapError where one of these rules is
    broken.

    >>> from hap.updates import least_squares
    >>> check_update(least_squares, nn.Linear(4, 3), torch.eye(4))
    >>> check_update(lambda reader, kept, moments: (reader.weight, torch.zeros(1)), nn.Linear(4, 3), torch.eye(4))
    Traceback (most recent call last):
    hap.HapError: check_update: a weight of shape (3, 2) and one bias per row expected, found (3, 2) and (1,)
    """
    slots = torch.arange(0, reader.get_parameter("weight").shape[1] * getattr(reader, "groups", 1), 2)
    half = resize(copy.deepcopy(reader), torch.arange(len(reader.get_parameter("weight"))), slots)
    sums, before = Sums(half), {name: value.clone() for name, value in half.state_dict().items()}
    with torch.no_grad():
        sums.add(x.index_select(axis(reader), slots), reader(x))
    given = {"weighted": sums.result()} if "weighted" in inspect.signature(update).parameters else {}
    weight, bias = update(half, slots, sums.result(), **given)
    wanted = half.get_parameter("weight").shape
    if weight.shape != wanted or bias.shape != wanted[:1]:
        found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise HapError(f"check_update: a weight of shape {tuple(wanted)} and one bias per row expected, found {found}")
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise HapError("check_update: finite weights expected, found some that are not")
    if any(not torch.equal(value, before[name]) for name, value in half.state_dict().items()):
        raise HapError("check_update: the reader was changed; return new weights")


@torch.no_grad()
def check_head_implant(implant: Implant, module: nn.Linear, x: Tensor, c: Tensor, rank: int = 2) -> None:
    """An implant of heads gives the outputs of `module` from `x`, within its rank, and does not change the module.

    `x`: [positions, slots], input of the heads; `c`: [positions, columns], input of `module`, the layer behind them.
    HapError where one of these rules is broken.

    >>> from hap.implants import low_rank
    >>> check_head_implant(low_rank, nn.Linear(6, 5), x=torch.ones(9, 4), c=torch.ones(9, 6))
    """
    before = {name: value.clone() for name, value in module.state_dict().items()}
    passing = Passing(lambda: iter([(x, c)]), x.shape[1], rank, module.bias is not None)
    for slots in (torch.tensor([0]), torch.arange(c.shape[1])):
        small = implant(module, slots, passing)
        try:
            found = tuple(small(x).shape)
        except Exception as error:  # an implant is foreign code and may raise anything
            raise HapError(f"check_head_implant: it does not run ({failure(error, small)})") from error
        if found != (len(x), module.out_features):
            raise HapError(f"check_head_implant: {(len(x), module.out_features)} numbers expected, found {found}")
        weights, most = sum(p.numel() for p in small.parameters() if p.dim() > 1), rank * (x.shape[1] + found[1])
        if weights > most:
            raise HapError(f"check_head_implant: at most the {most} weights of rank {rank} expected, found {weights}")
    if any(not torch.equal(value, before[name]) for name, value in module.state_dict().items()):
        raise HapError("check_head_implant: the module was changed; build a new one")


def _outputs(which: str, model: nn.Module, example: Any, call: Call) -> list[Tensor]:
    """The floating-point tensors in the output of a model; HapError, with the module and the cause, where it fails."""
    try:
        output = call(model, example)
    except Exception as error:  # a model is foreign code and may raise anything
        raise HapError(f"check_groups: the {which} model does not run ({failure(error, model)})") from error
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not outputs:
        kind = type(output).__name__
        raise HapError(f"check_groups: a floating-point tensor in the output expected, found a {kind}; pass call=")
    return outputs
