"""Records made by jobs of a cluster, one each, through submitit; knows nothing of how a record is made.

A job is the command `hap record SPEC CASE SEED`, under torchrun where a record is given several ranks. One that was
preempted, or ran out of time, is queued again by submitit and goes on after its last epoch. A record of each trained
model comes first, so that no job waits for a model that another one trains.
"""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hap import HapError
from hap.harness.files import cache
from hap.harness.spec import Case

KEYS: Mapping[str, tuple[type, str | None]] = {  # what --slurm takes, as what, and submitit's name for it
    "cluster": (str, None),
    "jobs": (int, None),
    "ranks": (int, None),
    "partition": (str, "slurm_partition"),
    "account": (str, "slurm_account"),
    "qos": (str, "slurm_qos"),
    "constraint": (str, "slurm_constraint"),
    "time": (int, "timeout_min"),
    "gpus": (int, "gpus_per_node"),
    "cpus": (int, "cpus_per_task"),
    "mem": (int, "mem_gb"),
}
CLUSTERS = ("slurm", "local")
TIME = 24 * 60  # minutes of a job, where nothing is said
EVERY = 0.5  # seconds between two looks at the jobs


class Record(NamedTuple):
    """One record to make."""

    spec: Path
    case: Case
    seed: int
    results: Path

    @property
    def name(self) -> str:
        """How it is told of."""
        return f"{self.spec.stem}: {self.case.name} seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """What runs on the cluster: a command in a folder."""

    command: tuple[str, ...]
    folder: str

    def __call__(self) -> int:
        """Its exit status; what it prints is in the job's log."""
        return subprocess.run(self.command, cwd=self.folder).returncode

    def checkpoint(self) -> Any:
        """The same again, when submitit queues a job anew: what it did lies in the cache."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def options(given: Sequence[str]) -> dict[str, Any]:
    """The table of `key=value,key=value` strings; HapError where a key is unknown or a value is not of its kind."""
    table: dict[str, Any] = {}
    for pair in (pair for each in given for pair in each.split(",")):
        key, there, value = pair.partition("=")
        if key not in KEYS or not there:
            raise HapError(f"--slurm: key=value expected, with one of {', '.join(KEYS)}; found {pair!r}")
        try:
            table[key] = KEYS[key][0](value)
        except ValueError:
            raise HapError(f"--slurm: {key} must be a whole number, found {value!r}") from None
        if table[key] == "" or (isinstance(table[key], int) and table[key] < 1):
            raise HapError(f"--slurm: {key} must be {'a name' if value == '' else 'at least 1'}, found {value!r}")
    if table.setdefault("cluster", "slurm") not in CLUSTERS:
        raise HapError(f"--slurm: cluster must be one of {', '.join(CLUSTERS)}, found {table['cluster']!r}")
    return table


def fan_out(records: Sequence[Record], given: Mapping[str, Any], again: bool, say: Callable[[str], None]) -> None:
    """Makes the records by jobs and waits for them; HapError names those that failed, after all have ended.

    The jobs go on where this process is interrupted; the same command then finds what they made.
    """
    executor = _executor(given)
    most = given.get("jobs") or (1 if given["cluster"] == "local" else len(records))
    failed: list[str] = []
    for wave in _waves(records):
        failed += _run(executor, [(record, _job(record, given, again)) for record in wave], most, say)
    if failed:
        raise HapError(f"{len(failed)} of {len(records)} records were not made: {'; '.join(failed)}")


def _executor(given: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise HapError("submitit is not installed: python -m pip install 'hap[cluster]'") from None
    chosen = {name: given[key] for key, (_, name) in KEYS.items() if name and key in given}
    try:
        executor = submitit.AutoExecutor(cache().absolute() / "jobs", cluster=given["cluster"])
        executor.update_parameters(**{"timeout_min": TIME, "name": "hap", **chosen})
    except (RuntimeError, ValueError, OSError, NameError) as error:  # no sbatch here; a parameter that it refuses
        raise HapError(f"--slurm: {' '.join(str(error).split())}") from None
    return executor


def _waves(records: Sequence[Record]) -> Iterator[list[Record]]:
    """One record of each workload and seed; then all others."""
    first = {(str(record.case.task.model_dump()), record.seed): record for record in reversed(records)}
    chosen = {id(record) for record in first.values()}
    yield [record for record in records if id(record) in chosen]
    yield [record for record in records if id(record) not in chosen]


def _job(record: Record, given: Mapping[str, Any], again: bool) -> Job:
    ranks = given.get("ranks", 1)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    what = ("-m", "hap", "record", str(record.spec.absolute()), record.case.name, str(record.seed))
    where = ("--results", str(record.results.absolute()))
    return Job((sys.executable, *launch, *what, *where, *(("--again",) if again else ())), str(Path.cwd()))


def _run(executor: Any, jobs: Iterable[tuple[Record, Job]], most: int, say: Callable[[str], None]) -> list[str]:
    """Has at most so many jobs in the queue of the cluster; what went wrong, a line a record."""
    waiting, running, failed = deque(jobs), list[tuple[Record, Any]](), list[str]()
    while waiting or running:
        while waiting and len(running) < most:
            record, job = waiting.popleft()
            running.append((record, executor.submit(job)))
            say(f"{record.name}: job {running[-1][1].job_id}")
        time.sleep(EVERY)
        ended = [(record, job) for record, job in running if job.done()]
        running = [each for each in running if each not in ended]
        for record, job in ended:
            wrong = _wrong(job)
            say(f"{record.name}: {wrong or 'there'}")
            failed += [f"{record.name} ({wrong})"] if wrong else []
    return failed


def _wrong(job: Any) -> str | None:
    """Why a job that ended made nothing: the last line it said, and where the rest is."""
    try:
        if job.result() == 0:
            return None
    except Exception as error:  # whatever submitit makes of a job that was killed, or lost its result
        found = next(iter(str(error).splitlines()), type(error).__name__)
        return f"{found}; log {job.paths.stderr}"
    lines = [line for line in (job.stderr() or "").splitlines() if line.startswith("hap: ")]
    return f"{lines[-1] if lines else 'it ended without a word'}; log {job.paths.stderr}"
