"""What a long command says while it works: lines, the stages of a record and their seconds, a bar; trains nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 60.0  # seconds between two lines of one step
# the stages of a record, and which part of the whole lies before each
STARTS = {
    "task": 0.0,
    "trace": 0.1,
    "prune": 0.12,
    "score": 0.12,
    "plan": 0.2,
    "apply": 0.2,
    "finetune": 0.25,
    "evaluate": 0.9,
}
Value = TypeVar("Value")


class Event(str):
    """A line of progress; `fraction` of the whole is done, where that is known."""

    fraction: float | None

    def __new__(cls, text: str, fraction: float | None = None) -> "Event":
        """A string that carries the fraction."""
        event = super().__new__(cls, text)
        event.fraction = fraction
        return event


Say = Callable[[Event], None]  # takes a line of progress
Step = Callable[[str], Any]  # a context for each step of a command, which gives a Say: see `progress`


def silent(event: Event) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Clock:
    """Calls the stages of a record one after another, says which one begins, and keeps how many seconds each took."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, stage: str, do: Callable[..., Value], *args: Any, **options: Any) -> Value:
        """The value of `do(*args, **options)`."""
        self.say(Event(stage, STARTS.get(stage)))
        start = time.perf_counter()
        value = do(*args, **options)
        self.seconds[stage] = time.perf_counter() - start
        return value

    def within(self, stage: str) -> Say:
        """Takes the lines of a stage, whose fractions are of this stage, and says them with fractions of the whole."""
        first = STARTS[stage]
        span = min(start for start in [*STARTS.values(), 1.0] if start > first) - first
        return lambda event: self.say(Event(event, first + span * (event.fraction or 0)))


@contextmanager
def progress(name: str, total: int, out: "Console") -> Iterator[Step]:
    """Gives a context for each step: a bar on a terminal; elsewhere two plain lines a step, and one a minute.

    A step that raises is counted, and nothing is said of its end.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done = 0
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(name, total=total)

        @contextmanager
        def step(what: str) -> Iterator[Callable[[Any], None]]:
            nonlocal done
            done += 1
            start, where = time.perf_counter(), f"{name} [{done}/{total}] {what}"
            last = start
            if not out.is_terminal:
                out.print(Text(where), soft_wrap=True)

            def say(event: Any) -> None:
                nonlocal last
                now = time.perf_counter()
                if event.startswith("warning: ") or (not out.is_terminal and now - last > EVERY):
                    out.print(Text(f"{where}: {event}"), soft_wrap=True)
                    last = now
                    return
                part = getattr(event, "fraction", None) or 0.0
                bar.update(task, description=f"{name}: {what}, {event}", completed=done - 1 + 0.99 * part)

            say("looking for evidence")
            try:
                yield say
            finally:
                bar.update(task, completed=done)
            if not out.is_terminal:
                out.print(Text(f"{where}: there after {time.perf_counter() - start:.1f} s"), soft_wrap=True)

        yield step
        bar.update(task, description=name)
