"""Where the work of a command is done: in another process, which may die, or in this one.

A piece of work is a function of a module, called as `work(*args, known=..., say=...)`: `known` is a table that it may
read and fill, kept from one piece of work to the next; `say` takes its lines of progress. Knows nothing of specs and
records.

Under torchrun the ranks work themselves: they exchange tensors with each other, which a child of theirs could not, and
torchrun ends the job where one of them dies.
"""

import copy
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from hap import HapError
from hap.harness.processes.progress import Say, silent

EVERY = 0.5  # seconds between two looks whether a worker lives
GRACE = 20.0  # seconds that a worker has for its end, before it is killed
Known = dict[str, Any]
Value = TypeVar("Value")
Place = tuple[dict[str, str], list[str], str]  # environment, sys.path and working folder


class Broken(HapError):  # noqa: N818  (it is what is said of a record)
    """A piece of work whose process ended, or ran out of memory."""


@runtime_checkable
class Executor(Protocol):
    """Does pieces of work, one at a time."""

    def __call__(self, work: Callable[..., Value], *args: Any, say: Say = silent) -> Value:
        """The value of the work, or what it raises; Broken where its process ended."""


@dataclass(frozen=True)
class InProcess:
    """Does the work in this process."""

    known: Known = field(default_factory=dict)

    def __call__(self, work: Callable[..., Value], *args: Any, say: Say = silent) -> Value:
        """The value of the work, or what it raises."""
        return work(*args, known=self.known, say=say)


class Worker:
    """Does the work in one other process, which is started when it is first needed, and again after it has ended.

    Each piece of work finds the environment, sys.path and working folder that this process has then. An exception comes
    back with its traceback as its cause. Nothing is tried twice.
    """

    def __init__(self) -> None:
        """No process yet."""
        self._process: Any = None
        self._pipe: Connection | None = None
        self._busy = False

    def __call__(self, work: Callable[..., Value], *args: Any, say: Say = silent) -> Value:
        """The value of the work, or what it raises; Broken where its process ended."""
        if self._process is None or self._busy or not self._process.is_alive():
            self.close()
            self._process, self._pipe = _start()
        assert self._pipe is not None
        self._busy = True
        try:
            for message in ((dict(os.environ), sys.path, os.getcwd()), (work, args)):
                self._pipe.send(message)
            while isinstance(answer := self._received(), _Said):
                say(answer.event)
        except (EOFError, ConnectionError):
            raise Broken(self._end()) from None
        self._busy = False
        if isinstance(answer, _Raised):
            # an error of a device, or a lack of memory, may spoil what is done after it in the same process
            if isinstance(answer.error, RuntimeError | MemoryError):
                self.close()
            raise answer.error from answer.cause
        return cast(Value, answer)

    def close(self) -> None:
        """Ends the process: at once where it works, which leaves its files whole."""
        if self._process is None or self._pipe is None:
            return
        if self._busy:
            self._process.terminate()
        with suppress(OSError):
            self._pipe.close()  # an idle worker ends when it reads that
        try:
            self._process.join(GRACE)
        finally:  # also where Control-C is pressed again
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process, self._pipe, self._busy = None, None, False

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Ends the process."""
        self.close()

    def _received(self) -> Any:
        """The next message; EOFError where none can come, also where a child of the process holds its end open."""
        assert self._pipe is not None
        while not self._pipe.poll(EVERY):
            if not self._process.is_alive() and not self._pipe.poll(0):
                raise EOFError
        return self._pipe.recv()

    def _end(self) -> str:
        """How the process ended."""
        self._process.join(GRACE)
        code = self._process.exitcode
        self.close()
        return f"its process {ended(code)}"


def ended(code: int | None) -> str:
    """An exit status in words: of a process that a signal ended, minus the number of the signal."""
    if code is None:
        return "closed its connection and went on"
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-code}"
    memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{memory}"


@dataclass(frozen=True)
class _Said:
    """A line of progress of the work."""

    event: Any


@dataclass(frozen=True)
class _Raised:
    """What the work raised, and the text of its traceback as an exception, for an error that is no line of ours."""

    error: Exception
    cause: Exception | None


class _Traceback(Exception):  # noqa: N818  (it is printed as the cause of an error)
    """The traceback of an exception in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _start() -> tuple[Any, Connection]:
    """A new process that waits for work, and this end of the connection to it."""
    context = multiprocessing.get_context("spawn")  # a fork would share threads and GPU contexts that cannot be shared
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), name="hap-worker")
    with _deaf():
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _deaf() -> Iterator[None]:
    """Within it, Control-C is ignored, and for ever by a process that is started: its parent hears it and ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection) -> None:
    """The life of a worker: pieces of work, until its parent closes the connection or dies."""
    own, known = os.getpid(), Known()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt if os.getpid() == own else SystemExit(128 + number)  # the latter in a child of it

    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=_follow, daemon=True).start()
    try:
        with suppress(EOFError, ConnectionError):
            while True:
                _settle(*pipe.recv())
                _send(pipe, _answer(pipe, known))
    except KeyboardInterrupt:  # files are whole and locks are gone: now as the signal asks
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(own, signal.SIGTERM)


def _send(pipe: Connection, answer: Any) -> None:
    try:
        pipe.send(answer)
    except ConnectionError:
        raise
    except Exception as error:  # whatever a class raises that cannot be pickled
        pipe.send(_Raised(RuntimeError(f"an answer that can be sent expected, found {error}"), None))


def _answer(pipe: Connection, known: Known) -> Any:
    try:
        work, args = pipe.recv()
        return work(*args, known=known, say=lambda event: pipe.send(_Said(event)))
    except Exception as error:  # whatever a stranger's function raises
        return _raised(error)


def _raised(error: Exception) -> _Raised:
    """The exception as it can be sent: its text alone where its class makes no copy of it."""
    if isinstance(error, HapError):
        return _Raised(error, None)
    cause = _Traceback("".join(traceback.format_exception(error)))
    try:
        return _Raised(copy.copy(error), cause)
    except Exception:  # whatever a class raises that is given no more than the arguments
        return _Raised(RuntimeError(f"{type(error).__name__}: {error}"), cause)


def _settle(environment: dict[str, str], path: list[str], folder: str) -> None:
    """Makes them those of this process; variables of its own stay."""
    for name in _GIVEN - environment.keys():
        os.environ.pop(name, None)
    _GIVEN.clear()
    _GIVEN.update(environment)
    os.environ.update(environment)
    sys.path[:] = path
    os.chdir(folder)


_GIVEN: set[str] = set()  # the variables that the parent of this worker had last


def _follow() -> None:
    """Ends this process when its parent has died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
