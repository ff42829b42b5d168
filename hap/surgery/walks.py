"""Forward passes that stand still where they are asked to, so that all batches can reach a layer before any goes on.

Each pass has a thread of its own, of which only one runs at a time: a forward pass is Python all the way down, and
nothing else can leave one in the middle. A pass that stands still holds what its layers need later and no more.
"""

import threading
from collections.abc import Callable
from typing import Any

_HERE = threading.local()
ANY = object()  # the next stop, whichever it is


class _Ended(BaseException):
    """Thrown into a pass that is not wanted any more."""


class Walk:
    """A pass that goes from stop to stop."""

    def __init__(self, run: Callable[[], Any]) -> None:
        """`run`: the whole pass, which calls `halt` at each stop; nothing runs before `to`."""
        self.at: Any = None  # the stop where it stands
        self.seen: Any = None  # what it has there
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
        """What the pass has at this stop, or None where it ends before; `answer` is what it is given where it stands.

        Raises what the pass raises.
        """
        self._wanted, self._answer, self.at, self.seen = stop, answer, None, None
        if not self._over:
            self._go.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
        return self.seen

    def end(self) -> None:
        """Lets go of the pass and all that it holds."""
        if not self._over:
            self._wanted = _Ended
            self._go.release()
        self._thread.join()
        self.seen = None

    def halt(self, stop: Any, seen: Any) -> Any:
        """Called by the pass: stands still if it was to go here, and gives what it is answered."""
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
    """The pass that runs now."""
    walk: Walk = _HERE.walk
    return walk
