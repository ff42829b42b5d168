"""A score at work in a run: what it is offered, what it warns of, and how its ranking compares with a reference's.

Within a process the scores of a task, a score and a seed are remembered, and the groups of the dense model and what it
reaches, for cases that differ in their budget share them; scores that asked what the budget prunes are not.
"""

import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from hap import HapError
from hap.harness.processes import ranks
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Case
from hap.harness.train.loop import Event, Say, generator
from hap.hessian.accumulate import Curvature, merge
from hap.methods import DETERMINED, agree
from hap.plan import Fate, plan
from hap.structure.groups import Groups


class Scored(NamedTuple):
    """What a score gave."""

    scores: Tensor
    halves: Tensor | None  # [2, groups], by either half of its random draws
    warnings: list[str]
    seconds: float


Known = TypeVar("Known")
_KNOWN: dict[str, Any] = {}


def remembered(case: Case, seed: int, what: str, make: Callable[[], Known]) -> Known:
    """What is true of the dense model of a task, and so the same for all cases that prune it."""
    key = json.dumps([what, case.task.model_dump(), seed], sort_keys=True)
    if key not in _KNOWN:
        _KNOWN[key] = make()
    return cast(Known, _KNOWN[key])


@dataclass(frozen=True)
class Scoring:
    """The score of a case as `plan` needs it; afterwards, what is to be told of it."""

    case: Case
    seed: int
    say: Say
    warnings: list[str] = field(default_factory=list)
    ranking: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def __call__(self, model: nn.Module, loss: Any, batches: Any, groups: Groups, *, rng: torch.Generator) -> Tensor:
        """The scores; a warning where they are too noisy for the budget; their ranking where there is a reference."""
        assert self.case.score is not None
        scored = self._scored(self.case.score, model, loss, batches, groups, rng)
        self.seconds.append(scored.seconds)
        self.warnings.extend(scored.warnings)
        if scored.halves is not None:
            agreed = agree(*(self._pruned(groups, half) for half in scored.halves))
            self.ranking["agreement"] = agreed
            if agreed < DETERMINED:
                self.warnings.append(f"the two halves of the probes agree on {agreed:.0%} of what is pruned")
        if self.case.reference is not None:
            reference = self._scored(
                self.case.reference, model, loss, batches, groups, generator(self.seed, "reference")
            )
            self.ranking.update(self._compared(groups, scored.scores, reference.scores))
        for line in self.warnings:
            self.say(Event(f"warning: {line}"))
        return scored.scores

    def _scored(self, ref: Ref, model: nn.Module, loss: Any, batches: Any, groups: Groups, rng: Any) -> Scored:
        parts = [self.case.task.model_dump(), ref.model_dump(), self.case.coupling, self.case.prune, self.seed]
        key = json.dumps(parts, sort_keys=True)
        if key in _KNOWN:
            known: Scored = _KNOWN[key]
            return known
        asked, halves = list[Tensor](), list[Tensor]()

        def pruned(scores: Tensor) -> Tensor:
            asked.append(scores)
            return self._pruned(groups, scores)

        function, start = ref.load(), time.perf_counter()
        offered = {"pruned": pruned, "halves": halves.append, "merge": _merged}
        given = {name: each for name, each in offered.items() if name in inspect.signature(function).parameters}
        if "merge" in given:  # then each rank measures its share of the batches
            batches = Share(batches, rng)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            scores = function(model, loss, batches, groups, rng=rng, **given, **ref.options)
        if (kind := _unusable(scores)) is not None:
            raise HapError(f"{ref.use}: a tensor of {len(groups)} real numbers expected, found {kind}")
        lines = [" ".join(str(each.message).split()) for each in heard if issubclass(each.category, UserWarning)]
        found = Scored(scores, halves[0] if halves else None, lines, time.perf_counter() - start)
        if ranks.world() > 1:  # else two kinds of GPU could round to two rankings
            found = ranks.shared(lambda: found._replace(scores=found.scores.cpu()))
        if not asked:
            _KNOWN[key] = found
        return found

    def _pruned(self, groups: Groups, scores: Tensor) -> Tensor:
        return plan(groups, scores, self.case.budget).fates(groups) != int(Fate.KEEP)

    def _compared(self, groups: Groups, scores: Tensor, reference: Tensor) -> dict[str, float]:
        from scipy.stats import spearmanr

        ranks = bool((scores != scores[0]).any() and (reference != reference[0]).any())  # else nothing can correlate
        return {
            "spearman": float(spearmanr(scores.cpu().numpy(), reference.cpu().numpy()).statistic) if ranks else 0.0,
            "overlap": agree(self._pruned(groups, scores), self._pruned(groups, reference)),
            "negative": float((scores < 0).sum()),
            "groups": float(len(groups)),
        }


class Share(Sequence[Any]):
    """This rank's share of batches, for each of which the generator begins anew.

    What is drawn for a batch hangs on its place among all and on how often they were gone through, so that any number
    of ranks draws the same; but where a batch is shared out by its samples, there each rank draws for its own.
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
