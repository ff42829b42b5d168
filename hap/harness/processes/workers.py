"""Where the work of a command is done, and what is known from one piece of work to the next.

A piece of work is a function of a module, called as `work(*args, known=..., say=...)`: `known` is a table that it may
read and fill, `say` takes its lines of progress. Knows nothing of specs and records.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from hap.harness.processes.progress import Say, silent

Known = dict[str, Any]
Value = TypeVar("Value")


@runtime_checkable
class Executor(Protocol):
    """Does pieces of work, one at a time, and keeps what is known between them."""

    def __call__(self, work: Callable[..., Value], *args: Any, say: Say = silent) -> Value:
        """The value of the work, or what it raises."""


@dataclass(frozen=True)
class InProcess:
    """Does the work in this process."""

    known: Known = field(default_factory=dict)

    def __call__(self, work: Callable[..., Value], *args: Any, say: Say = silent) -> Value:
        """The value of the work, or what it raises."""
        return work(*args, known=self.known, say=say)
