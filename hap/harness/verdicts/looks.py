"""Which records are needed next where seeds are added for claims that are still open; makes none."""

from collections.abc import Iterator

from hap.harness.spec.spec import Spec
from hap.harness.verdicts.judge import Outcome, verdicts
from hap.harness.verdicts.measures import Runs

Pair = tuple[str, int]  # a case by name, and a seed


def pending(spec: Spec, runs: Runs) -> list[Pair]:
    """The records of the next look of each claim that is open, in the order of the claims; none where none is.

    What the evidence says decides, whatever its age: stale records are made again, not added to.
    """
    made = {(case, run.seed) for case, each in runs.items() for run in each}
    return [pair for pair in dict.fromkeys(_wanted(spec, runs)) if pair not in made]


def _wanted(spec: Spec, runs: Runs) -> Iterator[Pair]:
    stops = spec.stops
    for verdict in verdicts(spec.claims, runs, spec.seeds, looks=stops):
        closed = verdict.says in (Outcome.HOLDS, Outcome.FAILS)
        if closed or verdict.look == len(stops):
            continue
        for case in (verdict.claim.case, verdict.claim.against):
            if case is not None:
                yield from ((case, seed) for seed in spec.seeds[: stops[verdict.look]])
