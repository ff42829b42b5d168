"""Records made, one after another: those that another process is making come last. It judges nothing.

A fine-tuning that was killed goes on from its last epoch, which lies in the cache until the record is there. A file
lock, which the system releases when a process dies, keeps two processes from making the same record.
"""

import shutil
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import hap.harness.run as procedure
from hap import HapError
from hap.harness.processes import ranks
from hap.harness.processes.files import cache, is_locked, locked
from hap.harness.processes.progress import Say, Step, silent
from hap.harness.processes.workers import Executor, Known
from hap.harness.records import store
from hap.harness.records.record import Run
from hap.harness.spec.spec import Case, Spec


class Job(NamedTuple):
    """A record to make: of a case and a seed, in a folder of evidence; `again` makes it anew where it is there."""

    case: Case
    seed: int
    results: Path
    again: bool = False

    @property
    def file(self) -> Path:
        """Where the record lies when it is made."""
        return store.path(self.results, self.case, self.seed)

    @property
    def missing(self) -> bool:
        """Whether there is something to do."""
        return self.again or not self.file.exists()


def jobs(spec: Spec, case: str | None, results: Path, again: bool = False) -> list[Job]:
    """Those of all cases and seeds of a spec; or of the cases of one name, be it that before the @ of their budget."""
    chosen = [each for each in spec.cases.values() if case in (None, each.name, each.name.split("@")[0])]
    if not chosen:
        raise HapError(f"--case {case}: must be a case of {spec.name}, one of {', '.join(spec.cases)}")
    return [Job(each, seed, results, again) for each in chosen for seed in spec.seeds]


def make(jobs: Iterable[Job], executor: Executor, step: Step) -> None:
    """Makes the records of the jobs; those that another process is making come last, and are waited for."""
    waiting = deque(jobs)
    while waiting:
        job = _next(waiting)
        with step(f"{job.case.name} seed {job.seed}") as say:
            executor(ensure, job, say=say)


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
