"""A long command told as it goes: a bar on a terminal, plain lines elsewhere; knows nothing of what is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

EVERY = 60.0  # seconds between two lines of one step


@contextmanager
def progress(name: str, total: int, out: Console) -> Iterator[Callable[[str], Any]]:
    """Gives a context for each step: a bar on a terminal; elsewhere two plain lines a step, and one a minute."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done = 0
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task(name, total=total)

        @contextmanager
        def step(what: str) -> Iterator[Callable[[Any], None]]:
            nonlocal done
            start, where = time.perf_counter(), f"{name} [{done + 1}/{total}] {what}"
            told = start
            if not out.is_terminal:
                out.print(Text(where), soft_wrap=True)

            def say(event: Any) -> None:
                nonlocal told
                now = time.perf_counter()
                if event.startswith("warning: ") or (not out.is_terminal and now - told > EVERY):
                    out.print(Text(f"{where}: {event}"), soft_wrap=True)
                    told = now
                    return
                part = getattr(event, "fraction", None) or 0.0
                bar.update(task, description=f"{name}: {what}, {event}", completed=done + 0.99 * part)

            say("looking for evidence")
            yield say
            done += 1
            bar.update(task, completed=done)
            if not out.is_terminal:
                out.print(Text(f"{where}: there after {time.perf_counter() - start:.1f} s"), soft_wrap=True)

        yield step
        bar.update(task, description=name)
