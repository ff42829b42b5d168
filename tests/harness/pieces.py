"""Pieces of work for workers: some of them end their process."""

import os
import sys
import time
from pathlib import Path

from hap import HapError
from hap.harness.processes.progress import Event


def counts(more, known, say):
    """How often it was called with one table, and by which process."""
    say(Event("begun", 0.0))
    known["count"] = known.get("count", 0) + more
    say(Event("done", 1.0))
    return known["count"], os.getpid()


def looks(name, known, say):
    return os.environ.get(name), os.getcwd(), sys.path


def ends(number, known, say):
    os.kill(os.getpid(), number)
    time.sleep(60)


def exits(code, known, say):
    sys.exit(code)


def leaves_a_child(file, known, say):
    """Dies while a child of its own, which has all its open files, goes on."""
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    Path(file).write_text(str(child))
    os.abort()


class Awkward(Exception):  # noqa: N818
    """One that cannot be made again of its arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Missing(HapError):  # noqa: N818
    """A mistake of a kind of its own."""


def raises(kind, known, say):
    if kind == "hap":
        error = Missing("data: must be there")
        error.__dict__["rank"] = 3
        raise error
    if kind == "memory":
        raise MemoryError("none left")
    if kind == "awkward":
        raise Awkward("one", "two")
    if kind == "local":
        raise type("Local", (Exception,), {})("of a class without an address")
    return 1 / 0


def gives_a_lambda(known, say):
    return lambda: None


def cleans_up(folder, known, say):
    """Leaves a file when it is ended, as a lock is removed."""
    try:
        say(Event("here"))
        time.sleep(60)
    finally:
        (Path(folder) / "clean").touch()
