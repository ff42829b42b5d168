"""The conformance kit: what a model, a score, an implant or an update must satisfy to be trusted here.

Each check raises HapError with what was expected and found; use them in the tests of your own method.
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
    """A plan that drops and implants groups at random; one row of every layer is kept."""
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
    """Whether surgery and masking give one function, and cost what was foreseen, on `trials` random plans."""
    rng = torch.Generator().manual_seed(0)
    for trial in range(trials):
        chosen = random_plan(groups, rng, drop=(0.2, 0.5, 0.8)[trial % 3])
        small, oracle = apply(model, groups, chosen, zero).eval(), mask(model, groups, chosen).eval()
        found, expected = _outputs("pruned", small, example, call), _outputs("masked", oracle, example, call)
        shapes = [[tuple(t.shape) for t in each] for each in (found, expected)]
        if shapes[0] != shapes[1]:
            raise HapError(
                f"check_groups: outputs of the masked model's shapes {shapes[1]} expected, found {shapes[0]}"
            )
        one, other = (torch.cat([t.flatten() for t in each]) for each in (found, expected))
        gap = float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
        if not gap <= tolerance:
            refuse_random(oracle, example, call)
            raise HapError(f"check_groups: surgery and masking differ by {gap:.1e} relative, {tolerance:.0e} allowed")
        left = planned(groups, chosen.fates(groups)).params
        if left != cost.params(small):
            raise HapError(f"check_groups: {left} parameters foreseen, {cost.params(small)} found")


def check_score(score: Score, model: nn.Module, loss: Loss, batches: Iterable[Any], groups: Groups) -> None:
    """Whether a score is one finite number a group, repeats under a seed, and leaves the model as it was."""
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
    """Whether an implant writes the rows it is asked for, at the places of the module, and leaves the module alone."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    y = module(x)
    for rows, slots in ((torch.tensor([0]), torch.arange(x.shape[1])), (torch.arange(y.shape[1]), torch.tensor([0]))):
        made = implant(module, rows, Inputs(lambda: iter([x]), slots, True))
        shape = (y.shape[0], len(rows), *y.shape[2:])
        try:
            found = made(x.index_select(1, slots)).shape
        except Exception as error:  # whatever a stranger's forward raises
            raise HapError(f"check_implant: it does not run ({failure(error, made)})") from error
        if tuple(found) != shape:
            raise HapError(f"check_implant: output of shape {shape} expected, found {tuple(found)}")
    if any(not torch.equal(value, before[name]) for name, value in module.state_dict().items()):
        raise HapError("check_implant: the module was changed; build a new one")


def check_update(update: Update, reader: nn.Module, x: Tensor) -> None:
    """Whether an update gives a reader of half of its inputs finite weights of its shape, and changes nothing.

    `x`: a batch as the whole reader reads it. What it should write is what it writes now.
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
        raise HapError(f"check_update: a weight of shape {tuple(wanted)} and a bias a row expected, found {found}")
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise HapError("check_update: finite weights expected, found some that are not")
    if any(not torch.equal(value, before[name]) for name, value in half.state_dict().items()):
        raise HapError("check_update: the reader was changed; return new weights")


@torch.no_grad()
def check_head_implant(implant: Implant, module: nn.Linear, x: Tensor, c: Tensor, rank: int = 2) -> None:
    """Whether an implant of heads maps positions of `x` to what `module` adds for some slots of `c`, within its rank.

    `x`: [positions, slots], what the heads read; `c`: [positions, columns], what the module behind them reads.
    """
    before = {name: value.clone() for name, value in module.state_dict().items()}
    passing = Passing(lambda: iter([(x, c)]), x.shape[1], rank, module.bias is not None)
    for slots in (torch.tensor([0]), torch.arange(c.shape[1])):
        made = implant(module, slots, passing)
        try:
            found = tuple(made(x).shape)
        except Exception as error:  # whatever a stranger's forward raises
            raise HapError(f"check_head_implant: it does not run ({failure(error, made)})") from error
        if found != (len(x), module.out_features):
            raise HapError(f"check_head_implant: {(len(x), module.out_features)} numbers expected, found {found}")
        weights, most = sum(p.numel() for p in made.parameters() if p.dim() > 1), rank * (x.shape[1] + found[1])
        if weights > most:
            raise HapError(f"check_head_implant: at most the {most} weights of rank {rank} expected, found {weights}")
    if any(not torch.equal(value, before[name]) for name, value in module.state_dict().items()):
        raise HapError("check_head_implant: the module was changed; build a new one")


def _outputs(which: str, model: nn.Module, example: Any, call: Call) -> list[Tensor]:
    """The floating-point tensors of a forward pass; HapError, with the module and the cause, where it fails."""
    try:
        output = call(model, example)
    except Exception as error:  # whatever a stranger's forward raises
        raise HapError(f"check_groups: the {which} model does not run ({failure(error, model)})") from error
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not found:
        kind = type(output).__name__
        raise HapError(f"check_groups: a floating-point tensor in the output expected, found a {kind}; pass call=")
    return found
