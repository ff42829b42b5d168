"""Records made, one after another: those that another process is making come last. It judges nothing.

A fine-tuning that was killed goes on from its last epoch, which lies in the cache until the record is there. A file
lock, which the system releases when a process dies, keeps two processes from making the same record.
"""

import shlex
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import hap.harness.run as procedure
from hap import HapError
from hap.harness.processes import ranks
from hap.harness.processes.files import cache, is_locked, locked
from hap.harness.processes.progress import Say, Step, silent
from hap.harness.processes.workers import Broken, Executor, Known
from hap.harness.records import store
from hap.harness.records.record import Run
from hap.harness.spec.spec import Case, Spec
from hap.harness.train.step import memory_ran_out


class Job(NamedTuple):
    """A record to make: of a case and a seed, in a folder of evidence; `again` makes it anew where it is there."""

    case: Case
    seed: int
    results: Path
    again: bool = False
    alone: str = ""  # the command that makes this record and nothing else

    @property
    def name(self) -> str:
        """What the lines of a command call it."""
        return f"{self.case.name} seed {self.seed}"

    @property
    def file(self) -> Path:
        """Where the record lies when it is made."""
        return store.path(self.results, self.case, self.seed)

    @property
    def missing(self) -> bool:
        """Whether there is something to do."""
        return self.again or not self.file.exists()


def jobs(
    path: Path, spec: Spec, case: str | None, results: Path, again: bool = False, seeds: Sequence[int] | None = None
) -> list[Job]:
    """Those of all cases of a spec, which lies at `path`; or of the cases called `case`, without their @.

    `seeds`: those of the first look where none are given.
    """
    chosen = [each for each in spec.cases.values() if case in (None, each.name, each.name.split("@")[0])]
    if not chosen:
        raise HapError(f"--case {case}: must be a case of {spec.name}, one of {', '.join(spec.cases)}")
    pairs = [(each, seed) for each in chosen for seed in (spec.first if seeds is None else seeds)]
    return [Job(each, seed, results, again, alone(path, each, seed, results)) for each, seed in pairs]


def alone(path: Path, case: Case, seed: int, results: Path) -> str:
    """The command that makes one record; `path` is the file of its spec."""
    usual = results == path.absolute().parent.parent / "results"
    where = [] if usual else ["--results", str(results)]
    return shlex.join(["hap", "record", str(path), case.name, str(seed), *where])


def make(jobs: Iterable[Job], executor: Executor, step: Step, broke: Callable[[Job, Broken], None]) -> None:
    """Makes the records of the jobs; those that another process is making come last, and are waited for.

    Each job is tried once; `broke` is called with one that broke, and why, and the others go on.
    """
    waiting = deque(jobs)
    while waiting:
        job = _next(waiting)
        try:
            with step(job.name) as say:
                attempt(job, executor, say)
        except Broken as error:
            broke(job, error)


def attempt(job: Job, executor: Executor, say: Say = silent, work: Callable[..., Run] | None = None) -> Run:
    """The record of a job, by `ensure` or by `work`; Broken where the process that makes it ends or lacks memory."""
    try:
        return executor(work or ensure, job, say=say)
    except Broken as error:
        if ranks.world() > 1:  # the ranks go on together or not at all
            raise
        why = str(error)
    except (RuntimeError, MemoryError) as error:
        if ranks.world() > 1 or not memory_ran_out(error):
            raise
        why = f"memory ran out ({' '.join(str(error).split()):.120})"
    raise Broken(f"{why}; to repeat it: {job.alone}" if job.alone else why)


def ensure(job: Job, known: Known | None = None, say: Say = silent) -> Run:
    """The record of a job: the one that is there, else made now."""
    file = job.file
    if not ranks.shared(lambda: job.missing):
        return ranks.shared(partial(store.load, file))
    training = cache() / "training" / job.case.spec / f"{file.parent.name}-{file.stem}"
    # two locks, for two processes may write to two places, and train the same
    with ranks.held(partial(locked, file)), ranks.held(partial(locked, training)):
        if ranks.shared(lambda: job.missing):  # another process may have made it while this one waited
            made = procedure.run(job.case, job.seed, known=known, say=say, keep=training)
            ranks.shared(partial(store.save, made, job.results))
        ranks.shared(partial(shutil.rmtree, training, ignore_errors=True))
    return ranks.shared(partial(store.load, file))


def _next(waiting: "deque[Job]") -> Job:
    """The first that no other process is making; where all are being made, the first, to wait for."""

    def free() -> int:
        return next((i for i, job in enumerate(waiting) if not is_locked(job.file)), 0)

    chosen = ranks.shared(free)
    job = waiting[chosen]
    del waiting[chosen]
    return job
