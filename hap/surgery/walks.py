"""Forward passes that can pause at a layer, so that all batches reach it before one continues.

Every pass has its own thread, and only one thread runs at a time: a forward pass is a stack of Python calls, which only
a thread can leave in the middle. A paused pass holds only those tensors that its later layers need.
"""

import threading
from collections.abc import Callable
from typing import Any

_HERE = threading.local()
ANY = object()  # stands for the next stop of any kind


class _Ended(BaseException):
    """Raised in a paused pass to end it."""


class Walk:
    """A pass that runs from stop to stop."""

    def __init__(self, run: Callable[[], Any]) -> None:
        """`run`: the whole pass, which calls `halt` at each stop; nothing runs before `to`."""
        self.at: Any = None  # the stop where it is paused
        self.seen: Any = None  # the value that it gave to `halt` there
        self.notes: dict[str, Any] = {}  # of this pass alone
        self._run = run
        self._wanted: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._over = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._start, daemon=True)
        self._thread.start()

    def to(self, stop: Any, answer: Any = None) -> Any:
        """Run the pass to this stop: the value that it gives to `halt`, or None where it ends before.

        `answer`: the result of the `halt` at which it is paused now. An exception of the pass is raised here.
        """
        self._wanted, self._answer, self.at, self.seen = stop, answer, None, None
        if not self._over:
            self._go.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
        return self.seen

    def end(self) -> None:
        """End the pass and release its tensors."""
        if not self._over:
            self._wanted = _Ended
            self._go.release()
        self._thread.join()
        self.seen = None

    def halt(self, stop: Any, seen: Any) -> Any:
        """Called by the pass: pause if this is the wanted stop; returns the answer of `to`, or None without a pause."""
        if self._wanted is not ANY and self._wanted != stop:
            return None
        self.at, self.seen = stop, seen
        self._back.release()
        self._go.acquire()
        if self._wanted is _Ended:
            raise _Ended
        return self._answer

    def _start(self) -> None:
        self._go.acquire()
        _HERE.walk = self
        try:
            if self._wanted is not _Ended:
                self._run()
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        self._over = True
        self.notes.clear()
        self._back.release()


def here() -> Walk:
    """The pass of the current thread."""
    walk: Walk = _HERE.walk
    return walk
