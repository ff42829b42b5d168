"""The functions that a case names, called: what a score and a method are given, and what they must return.

A method may train and compensate, so its weights cannot be compared with those of a mask; sizes can. Scores do not
depend on the budget unless their function asks what the budget prunes: those that did not ask are known to all cases of
the same task, score and seed.
"""

import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hap import HapError
from hap.budget import UNITS, Budget
from hap.cost import macs, params
from hap.harness.processes import ranks
from hap.harness.processes.progress import Event, Say
from hap.harness.processes.workers import Known
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Case
from hap.harness.task import Task
from hap.harness.train.exact import determined, undetermined
from hap.harness.train.loop import generator
from hap.harness.train.step import memory_ran_out
from hap.hessian.accumulate import Curvature, merge
from hap.methods import DETERMINED
from hap.methods import agree as overlap
from hap.plan import Fate, Plan, plan
from hap.structure.groups import Groups
from hap.structure.layers import evaluating

NEAR = 1e-9
ROUNDING = 1e-12  # 1 - 0.9 is less than 0.1
Value = TypeVar("Value")


@dataclass(frozen=True)
class Dense:
    """What is known of the dense model of one task and seed, which is the same for all cases that prune it."""

    task: Ref
    seed: int
    known: Known

    def once(self, make: Callable[[], Value], *what: object) -> Value:
        """What is known of this model under the name `what`, parts that JSON can hold; made now if it is not known."""
        return cast(Value, self.known[key]) if (key := self.key(*what)) in self.known else self.keep(make(), *what)

    def keep(self, value: Value, *what: object) -> Value:
        """Makes it known, and returns it."""
        self.known[self.key(*what)] = value
        return value

    def key(self, *what: object) -> str:
        """The name in the table of everything that is known."""
        return json.dumps([self.task.model_dump(), self.seed, *what], sort_keys=True)


class Scored(NamedTuple):
    """What a score gave."""

    scores: Tensor
    halves: Tensor | None  # [2, groups], by either half of its random draws
    warnings: list[str]
    seconds: float  # of the score alone, also where it was known already
    ranking: dict[str, float]  # compared with those of a reference, and of its halves with each other


def scored(case: Case, task: Task, groups: Groups, dense: Dense, say: Say) -> Scored:
    """The scores of the groups by the score of a case, its warnings, and its ranking compared with a reference's."""
    assert case.score is not None
    found = _known_scores(case, case.score, "prune", task, groups, dense)
    ranking, lines = dict[str, float](), list(found.warnings)
    if found.halves is not None:
        ranking["agreement"] = overlap(*(_pruned(case, groups, half) for half in found.halves))
        if ranking["agreement"] < DETERMINED:
            lines.append(f"the two halves of the probes agree on {ranking['agreement']:.0%} of what is pruned")
    if case.reference is not None:
        reference = _known_scores(case, case.reference, "reference", task, groups, dense)
        ranking |= _compared(case, groups, found.scores, reference.scores)
    for line in lines:
        say(Event(f"warning: {line}"))
    return found._replace(ranking=ranking, warnings=lines)


def _known_scores(case: Case, ref: Ref, purpose: str, task: Task, groups: Groups, dense: Dense) -> Scored:
    """The scores of a function, once for all budgets unless it asks what the budget prunes."""
    what, asked = ("scores", ref.model_dump(), case.coupling, case.prune), list[Tensor]()

    def pruned(scores: Tensor) -> Tensor:
        asked.append(scores)
        return _pruned(case, groups, scores)

    if (key := dense.key(*what)) in dense.known:
        return cast(Scored, dense.known[key])
    found = _scores(ref, task, groups, generator(dense.seed, purpose), pruned)
    return found if asked else dense.keep(found, *what)


def _scores(ref: Ref, task: Task, groups: Groups, rng: torch.Generator, pruned: Callable[[Tensor], Tensor]) -> Scored:
    """What a function gives that is called as a score, with what it asks for by the names of its parameters."""
    halves, told, function, start = list[Tensor](), list[str](), ref.load(), time.perf_counter()
    offered = {"pruned": pruned, "halves": halves.append, "merge": _merged}
    given = {name: each for name, each in offered.items() if name in inspect.signature(function).parameters}
    batches = Share(task.batches, rng) if "merge" in given else task.batches  # then each rank measures its share
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        call = partial(function, task.model, task.loss, batches, groups, rng=rng, **given, **ref.options)
        scores = determined(call, told.append, partial(_again, rng, rng.get_state(), halves))
    if (kind := _unusable(scores)) is not None:
        raise HapError(f"{ref.use}: a tensor of {len(groups)} real numbers expected, found {kind}")
    lines = [" ".join(str(each.message).split()) for each in heard if issubclass(each.category, UserWarning)]
    lines = told + [line for line in lines if undetermined(line) is None]
    found = Scored(scores, halves[0] if halves else None, lines, time.perf_counter() - start, {})
    # else two kinds of GPU could round to two rankings
    return ranks.shared(lambda: found._replace(scores=found.scores.cpu())) if ranks.world() > 1 else found


def _again(rng: torch.Generator, state: Tensor, halves: list[Tensor]) -> None:
    """Before a score is called once more."""
    rng.set_state(state)
    halves.clear()


def _pruned(case: Case, groups: Groups, scores: Tensor) -> Tensor:
    return plan(groups, scores, case.budget).fates(groups) != int(Fate.KEEP)


def _compared(case: Case, groups: Groups, scores: Tensor, reference: Tensor) -> dict[str, float]:
    from scipy.stats import spearmanr

    differ = bool((scores != scores[0]).any() and (reference != reference[0]).any())  # else nothing can correlate
    return {
        "spearman": float(spearmanr(scores.cpu().numpy(), reference.cpu().numpy()).statistic) if differ else 0.0,
        "overlap": overlap(_pruned(case, groups, scores), _pruned(case, groups, reference)),
        "negative": float((scores < 0).sum()),
        "groups": float(len(groups)),
    }


def _unusable(scores: Any) -> str | None:
    """What scores are, where they are no tensor of real numbers."""
    if not isinstance(scores, Tensor):
        return type(scores).__name__
    if scores.device.type == "meta":
        return "a tensor on the device meta, which holds none"
    return str(scores.dtype) if scores.is_complex() else None


def _merged(found: Curvature) -> Curvature:
    """The curvature over the batches of all ranks."""
    return merge(ranks.gathered(_on_cpu(found))) if ranks.world() > 1 else found


def _on_cpu(found: Curvature) -> Curvature:
    """Its diagonals there, where ranks tell each other what they have."""
    diagonal, stderr = ({name: t.cpu() for name, t in each.items()} for each in (found.diagonal, found.stderr))
    return replace(found, diagonal=diagonal, stderr=stderr)


class Share(Sequence[Any]):
    """This rank's share of batches, for each of which the generator begins anew.

    The draws for a batch depend on its number among all batches and on the number of passes before, so that any number
    of ranks draws the same. Where a batch is divided by its samples, each rank draws for its own samples.
    """

    def __init__(self, batches: Sequence[Any], rng: torch.Generator) -> None:
        """Of batches that all ranks have; `rng` is the one that they are measured with."""
        parted = len(batches) < ranks.world()
        self.batches = ranks.share(batches)
        self.first, self.step = (0, 1) if parted else (ranks.rank(), ranks.world())
        self.drawer = f" rank {ranks.rank()}" if parted else ""
        self.rng, self.seed, self.times = rng, rng.initial_seed(), 0

    def __len__(self) -> int:
        """The number of this rank's."""
        return len(self.batches)

    def __getitem__(self, place: Any) -> Any:
        """One of this rank's, to look at."""
        return self.batches[place]

    def __iter__(self) -> Iterator[Any]:
        """Goes through them; the generator is begun anew before each."""
        self.times += 1
        time = self.times
        for number, batch in enumerate(self.batches):
            place = self.first + self.step * number
            self.rng.manual_seed(generator(self.seed, f"time {time} batch {place}{self.drawer}").initial_seed())
            yield batch


def accepted(use: str, task: Task, groups: Groups, budget: Budget, found: Any) -> tuple[nn.Module, Plan]:
    """The model and the plan that the method `use` returned; what the plan removes is counted again from its rows."""
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
    """Raises HapError where ranks have different plans, or the model lacks more or fewer parameters than its plan,
    which says what was added."""
    ranks.agreed(f"{task.name}: the plan", json.dumps(chosen.to_json()))
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
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise HapError(f"{name}: a model that takes the example of {task.name} expected, found {line:.300}") from error
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
        read = Plan.from_json(json.loads(json.dumps(given.to_json())))
    except (TypeError, ValueError) as error:
        raise HapError(f"a plan that JSON can hold expected, found {type(error).__name__}: {error}") from None
    asked = {name: value for name, value in asdict(budget).items() if value is not None}
    more = {name: value for name, value in read.budget.items() if name not in UNITS}
    return replace(Plan.of(groups, read.fates(groups), more | asked), added=read.added)


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
