"""Processes and files: ranks of one job, jobs of a cluster, locks, atomic writes, lines of progress."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hap.harness.processes.files import atomic_write as atomic_write
    from hap.harness.processes.files import atomic_writes as atomic_writes
    from hap.harness.processes.files import cache as cache
    from hap.harness.processes.files import caching as caching
    from hap.harness.processes.files import is_locked as is_locked
    from hap.harness.processes.files import locked as locked
    from hap.harness.processes.progress import Clock as Clock
    from hap.harness.processes.progress import Event as Event
    from hap.harness.processes.progress import Say as Say
    from hap.harness.processes.progress import Step as Step
    from hap.harness.processes.progress import silent as silent
    from hap.harness.processes.provenance import checksum as checksum
    from hap.harness.processes.provenance import code as code
    from hap.harness.processes.provenance import environment as environment
    from hap.harness.processes.workers import Broken as Broken
    from hap.harness.processes.workers import Executor as Executor
    from hap.harness.processes.workers import InProcess as InProcess
    from hap.harness.processes.workers import Known as Known
    from hap.harness.processes.workers import Worker as Worker
    from hap.harness.processes.workers import ended as ended
else:
    from hap._lazy import lazily

    __getattr__ = lazily(__file__)
