"""The records of specs, made one after another: those that another process is making come last; also by jobs, or
small, as a rehearsal. It judges nothing."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hap import HapError
from hap.harness.cli import slurm
from hap.harness.cli.rehearsal import rehearsal
from hap.harness.processes import ranks
from hap.harness.processes.progress import progress
from hap.harness.records import store
from hap.harness.spec.spec import Case, Spec, require
from hap.harness.task import MissingData


def cases(spec: Spec, name: str | None) -> list[Case]:
    """Those of one name, or of one name before the @ of their budget; all without a name."""
    found = [case for case in spec.cases.values() if name in (None, case.name, case.name.split("@")[0])]
    if not found:
        raise HapError(f"--case {name}: must be a case of {spec.name}, one of {', '.join(spec.cases)}")
    return found


def make(
    spec: Spec, cases: Sequence[Case], results: Path, out: Console, *, again: bool = False, skip: bool = False
) -> None:
    """Makes what is missing of the cases, for all seeds; `skip`: a spec whose data is missing is left out, and told."""
    pairs = deque((case, seed) for case in cases for seed in spec.seeds)
    with progress(spec.name, len(pairs), out) as step:
        while pairs:
            case, seed = _next(pairs, partial(store.busy, results))
            try:
                if again or not ranks.shared(store.path(results, case, seed).exists):
                    require(spec)
                with step(f"{case.name} seed {seed}") as say:
                    store.ensure(case, seed, results, again=again, say=say)
            except MissingData as error:
                if not skip or ranks.world() > 1:  # where one rank alone lacks it, the others would go on
                    raise
                out.print(f"{spec.name} is left out: {error}", markup=False, soft_wrap=True)
                return


def rehearse(chosen: Mapping[Path, Spec], case: str | None, out: Console) -> None:
    """Every stage of the specs, small, with nothing kept."""
    for path, spec in chosen.items():
        asked = {each.name: each for each in cases(spec, case)}
        with rehearsal(spec.model_copy(update={"cases": asked}), path.absolute().parent.parent) as (small, folder):
            make(small, list(small.cases.values()), folder, out, skip=len(chosen) > 1)
        out.print(f"{spec.name}: went through every stage; nothing of it is kept", markup=False, soft_wrap=True)


def by_jobs(
    chosen: Mapping[Path, Spec],
    case: str | None,
    results: Mapping[Path, Path],
    given: Mapping[str, Any],
    again: bool,
    out: Console,
) -> None:
    """Makes what is missing of the specs by jobs of a cluster, as `slurm.options` has them."""
    missing = [
        slurm.Record(path, each, seed, results[path])
        for path, spec in chosen.items()
        for each in cases(spec, case)
        for seed in spec.seeds
        if again or not store.path(results[path], each, seed).exists()
    ]
    if given["cluster"] == "local":  # the nodes of a cluster have the GPU that this machine may lack
        for spec in {record.spec: chosen[record.spec] for record in missing}.values():
            require(spec)
    slurm.fan_out(missing, given, again, lambda line: out.print(line, markup=False, soft_wrap=True))


def _next(pairs: "deque[tuple[Case, int]]", busy: Callable[[Case, int], bool]) -> tuple[Case, int]:
    """The first that no other process is making; where all are being made, the first, to wait for."""

    def free() -> int:
        return next((i for i, pair in enumerate(pairs) if not busy(*pair)), 0)

    chosen = ranks.shared(free)
    pair = pairs[chosen]
    del pairs[chosen]
    return pair
