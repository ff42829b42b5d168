"""Records made by jobs of a cluster, one each, through submitit; knows nothing of how a record is made.

A job is the command `hap record SPEC CASE SEED`, under torchrun where a record is given several ranks. One that was
preempted, or ran out of time, is queued again by submitit and goes on after its last epoch. Of the records that need
one trained model, one comes first, so that no job waits for a model that another one trains.
"""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hap import HapError
from hap.harness import make
from hap.harness.processes.files import cache
from hap.harness.processes.workers import ended
from hap.harness.spec.spec import Case

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
TIMES = 1000  # that a job may run out of it and be queued again
GRACE = 600  # seconds that a job which slurm ends waits for its end
EVERY = 0.5  # seconds between two looks at the jobs


class Record(NamedTuple):
    """One record to make, and the file of its spec."""

    spec: Path
    job: make.Job

    @property
    def name(self) -> str:
        """What the lines of the command call it."""
        return f"{self.spec.stem}: {self.job.name}"

    def broken(self, why: str) -> str:
        """The line of one that could not be made; why, and the command that makes it here."""
        again = f"; to repeat it: {self.job.alone}"
        why = why.removeprefix(f"{self.name} is BROKEN: ").replace(again, "")  # its own command says it too
        return f"{self.name} is BROKEN: {why}{again}"


@dataclass(frozen=True)
class Job:
    """What runs on the cluster: a command in a folder."""

    command: tuple[str, ...]
    folder: str
    devices: str | None = None  # of this machine; a cluster gives a job its own

    def __call__(self) -> int:
        """Its exit status; what it prints is in the job's log."""
        heard = list[int]()
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *signalled: heard.append(signalled[0]))
        own = {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}
        child = subprocess.Popen(self.command, cwd=self.folder, env={**os.environ, **own}, start_new_session=True)
        try:
            code = child.wait()
            if heard:  # slurm is ending the job, and its own signal, by which submitit queues it again, comes yet
                time.sleep(GRACE)
            return code
        finally:  # nothing may go on beside a job that is queued again
            signal.signal(signal.SIGTERM, before)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

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


def fan_out(records: Sequence[Record], given: Mapping[str, Any], say: Callable[[str], None]) -> list[str]:
    """Makes the records by jobs and waits for them; returns a line for each one that is BROKEN, after all have ended.

    Jobs of a cluster go on where this process is interrupted; the same command then finds what they made.
    """
    if not records:
        return []
    executor, slots = _executor(given), _slots(given, len(records))
    return _run(executor, _chains(records), slots, lambda record, slot: _job(record, given, slot), say)


def _executor(given: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise HapError("submitit is not installed: python -m pip install 'hap[cluster]'") from None
    chosen = {name: given[key] for key, (_, name) in KEYS.items() if name and key in given}
    try:
        patient = {"slurm_max_num_timeout": TIMES} if given["cluster"] == "slurm" else {}
        executor = submitit.AutoExecutor(cache().absolute() / "jobs", cluster=given["cluster"], **patient)
        executor.update_parameters(**{"timeout_min": TIME, "name": "hap", **chosen})
    except (RuntimeError, ValueError, OSError, NameError) as error:  # no sbatch here; a parameter that it refuses
        raise HapError(f"--slurm: {' '.join(str(error).split())}") from None
    return executor


def _slots(given: Mapping[str, Any], records: int) -> list[str | None]:
    """As many as jobs may run at once; on this machine each with devices of its own, where there are any."""
    if given["cluster"] != "local":
        return [None] * given.get("jobs", records)
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    each, jobs = given.get("gpus", given.get("ranks", 1)), given.get("jobs", 1)
    if not torch.cuda.is_available():
        return [None] * jobs
    if jobs * each > len(ids):
        raise HapError(f"--slurm: {jobs} jobs of {each} GPUs expected to fit, found {len(ids)} GPUs here")
    return [",".join(ids[i * each : (i + 1) * each]) for i in range(jobs)]


def _chains(records: Sequence[Record]) -> list[list[Record]]:
    """The records that need one trained model, the shortest first, after which the others may go; else each alone."""
    chains: dict[Any, list[Record]] = {}
    for number, record in enumerate(records):
        task = record.job.case.task
        trains = "fit" in inspect.signature(task.load()).parameters  # as `run` gives it to a task that trains its model
        chains.setdefault((str(task.model_dump()), record.job.seed) if trains else number, []).append(record)
    return [sorted(chain, key=lambda record: _epochs(record.job.case)) for chain in chains.values()]


def _epochs(case: Case) -> int:
    return case.finetune.epochs if case.finetune is not None else 0


def _job(record: Record, given: Mapping[str, Any], devices: str | None) -> Job:
    ranks = given.get("ranks", 1)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    what = ("-m", "hap", "record", str(record.spec.absolute()), record.job.case.name, str(record.job.seed))
    where = ("--results", str(record.job.results.absolute()))
    more = ("--again",) if record.job.again else ()
    return Job((sys.executable, *launch, *what, *where, *more), str(Path.cwd()), devices)


def _run(
    executor: Any,
    chains: list[list[Record]],
    slots: list[str | None],
    job: Callable[[Record, str | None], Job],
    say: Callable[[str], None],
) -> list[str]:
    """Has at most one job a slot in the queue of the cluster; what went wrong, a line a record."""
    waiting, behind = deque(chain[0] for chain in chains), {id(chain[0]): chain[1:] for chain in chains}
    running, failed = list[tuple[Record, str | None, Any]](), list[str]()
    while waiting or running:
        while waiting and slots:
            record, slot = waiting.popleft(), slots.pop()
            try:
                running.append((record, slot, executor.submit(job(record, slot))))
                say(f"{record.name}: job {running[-1][2].job_id}")
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # slurm refuses it
                slots.append(slot)
                failed.append(record.broken(f"{' '.join(str(error).split()):.200}"))
                waiting.extend(behind.pop(id(record), []))
        time.sleep(EVERY)
        for each in [each for each in running if each[2].done()]:
            running.remove(each)
            record, slot, ended = each
            wrong = _wrong(ended)
            say(f"{record.name}: {wrong or 'there'}")
            failed += [record.broken(wrong)] if wrong else []
            slots.append(slot)
            waiting.extend(behind.pop(id(record), []))
    return failed


def _wrong(job: Any) -> str | None:
    """Why a job that ended made nothing: the last line it said, and where the rest is."""
    try:
        code = job.result()
        if code == 0:
            return None
    except Exception as error:  # whatever submitit makes of a job that was killed, or lost its result
        found = next(iter(str(error).splitlines()), type(error).__name__)
        return f"{found}; log {job.paths.stderr}"
    lines = [line for line in (job.stderr() or "").splitlines() if line.startswith("hap: ")]
    why = lines[-1].removeprefix("hap: ") if lines else f"its process {ended(code)}"
    return f"{why}; log {job.paths.stderr}"
