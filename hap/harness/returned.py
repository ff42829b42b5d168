"""What a method returned, held against the budget that it was given, its plan against its model.

A method may train and compensate, so its weights cannot be held against those of a mask; sizes can.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hap import HapError
from hap.cost import macs, params
from hap.harness.task import Task
from hap.harness.train.step import memory_ran_out
from hap.plan import UNITS, Budget, Plan
from hap.structure.groups import Groups
from hap.structure.layers import evaluating

NEAR = 1e-9
ROUNDING = 1e-12  # 1 - 0.9 is less than 0.1


def accepted(use: str, task: Task, groups: Groups, budget: Budget, found: Any) -> tuple[nn.Module, Plan]:
    """The model and the plan that the method `use` returned, what it removes worked out again from its rows."""
    try:
        pruned, given = _pair(task, found)
        chosen = _planned(groups, budget, given)
        # upstream: a ratio of channels counts those of the classifier, which stay: `published` may miss one of groups
        if budget.unit != "groups" and short(budget, chosen.removed):
            found = f"{chosen.removed[budget.unit]:.6f}"
            raise HapError(f"a plan that removes {budget.target:g} of the {budget.unit} expected, found {found}")
    except HapError as error:
        raise HapError(f"{use}: {error}") from None
    agree(use, task, pruned, chosen)
    runs(use, task, pruned)
    if budget.unit == "macs":
        left, whole = (macs(model, task.example, call=task.loss.call) for model in (pruned, task.model))
        _same(use, "MACs", chosen.removed["macs"], 1 - left / whole)
    return pruned, chosen


def short(budget: Budget, removed: Mapping[str, float]) -> bool:
    """Whether a plan that removes these shares misses the budget."""
    return removed.get(budget.unit, 1.0) + ROUNDING < budget.target


def agree(name: str, task: Task, pruned: nn.Module, chosen: Plan) -> None:
    """Raises HapError where the model lacks more or fewer parameters than its plan removes, less what it adds."""
    whole = params(task.model)
    planned = chosen.removed["params"] - sum(chosen.added.values()) / whole
    _same(name, "parameters", planned, 1 - params(pruned) / whole)


def runs(name: str, task: Task, pruned: nn.Module) -> None:
    """Raises HapError where the model does not take the example of the task, or gives what the dense one does not."""
    try:
        shapes = [_shapes(task, model) for model in (task.model, pruned)]
    except Exception as error:  # whatever the forward pass of a stranger's model raises
        if isinstance(error, RuntimeError) and memory_ran_out(error):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise HapError(f"{name}: a model that takes the example of {task.name} expected, found {told:.300}") from error
    if shapes[0] != shapes[1]:
        raise HapError(f"{name}: a model with outputs of shape {shapes[0]} expected, as before, found {shapes[1]}")


def _pair(task: Task, found: Any) -> tuple[nn.Module, Plan]:
    match found:
        case (nn.Module() as pruned, Plan() as chosen):
            if pruned is task.model:
                raise HapError("a pruned copy of the model expected, found the model itself")
            return pruned, chosen
    raise HapError(f"a model and its Plan expected, found {type(found).__name__}")


def _planned(groups: Groups, budget: Budget, given: Plan) -> Plan:
    """The plan of these rows, under the budget that was asked for and not the one that it names."""
    try:
        told = Plan.from_json(json.loads(json.dumps(given.to_json())))
    except (TypeError, ValueError) as error:
        raise HapError(f"a plan that JSON can hold expected, found {type(error).__name__}: {error}") from None
    asked = {name: value for name, value in asdict(budget).items() if value is not None}
    more = {name: value for name, value in told.budget.items() if name not in UNITS}
    return replace(Plan.of(groups, told.fates(groups), more | asked), added=told.added)


def _same(name: str, what: str, planned: float, found: float) -> None:
    if abs(found - planned) > NEAR:
        raise HapError(
            f"{name}: the pruned model must be the one planned, with {planned:.6f} of the {what} removed "
            f"(found {found:.6f})"
        )


@torch.no_grad()
def _shapes(task: Task, model: nn.Module) -> list[list[int]]:
    with evaluating(model):
        return [[*leaf.shape] for leaf in tree_leaves(task.loss.call(model, task.example)) if isinstance(leaf, Tensor)]
