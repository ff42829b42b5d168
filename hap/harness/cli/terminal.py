"""What the commands of `hap` share: how they name specs, where results lie, how they speak, how a mistake is told."""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hap import HapError

if TYPE_CHECKING:
    from hap.harness.processes.workers import Executor

    Context = typer.Context
else:
    Context = typer.Context.__base__  # typer passes one of this class, not of the class that it exports

FOLDER = Path("reproductions")
KEPT = "finished records are kept, and the same command goes on from there"

out = Console(highlight=False)

Names = Annotated[list[str] | None, typer.Argument(metavar="[SPEC]...", help="Names in reproductions/, paths, or all.")]
Results = Annotated[Path | None, typer.Option(help="Where evidence lies (default: results/ beside reproductions/).")]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """The command with mistakes told in one line: exit code 2 for a mistake, 130 for an interruption."""

    @wraps(command)
    def telling(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except HapError as error:
            _complain(error)
            _leave(2)
            raise typer.Exit(2) from None
        except typer.Exit:  # a RuntimeError to Python
            raise
        except (RuntimeError, MemoryError) as error:
            from hap.harness.processes import ranks
            from hap.harness.train.step import memory_ran_out

            memory = isinstance(error, MemoryError) or memory_ran_out(error)
            if not memory and not ranks.lost(error):
                _fell(error)
                raise
            what = "memory ran out" if memory else f"rank {os.environ.get('RANK')}: another rank ended"
            typer.echo(f"hap: {what} ({' '.join(str(error).split()):.120}); {KEPT}", err=True)
            _leave(2)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(f"\nhap: interrupted; {KEPT}", err=True)
            _leave(130)
            raise typer.Exit(130) from None
        except Exception as error:
            _fell(error)
            raise

    return telling


def _complain(error: HapError) -> None:
    line: str | None = str(error)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of several processes, one says it
        from hap.harness.processes import ranks

        line = ranks.line(error)
    if line is not None:
        typer.echo(f"hap: {line}", err=True)


def _fell(error: Exception) -> None:
    """A defect on one of several ranks, told before the rank leaves the others."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not isinstance(error, typer.Exit):
        traceback.print_exception(error)
        _leave(1)


def _leave(code: int) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from hap.harness.processes import ranks

        ranks.leave(code)


def paths(names: Iterable[str]) -> list[Path]:
    """The files of the specs that are named."""
    there = sorted(FOLDER.glob("*.toml"))
    found: list[Path] = []
    for name in names:
        named = [path for path in there if name in ("all", path.stem)] or [Path(name)] * Path(name).is_file()
        if not named:
            known = ", ".join(path.stem for path in there) or "none"
            if name == "all":
                raise HapError(f"specs: files *.toml in {FOLDER.absolute()} expected, found none")
            raise HapError(f"spec {name}: must be a file or a name in {FOLDER.absolute()}, which has {known}")
        found += named
    return list(dict.fromkeys(found))


def results_of(spec: Path, given: Path | None) -> Path:
    """The folder of a spec's evidence: the one given, else results/ beside the folder of the spec."""
    return given if given is not None else spec.absolute().parent.parent / "results"


def near(path: Path) -> str:
    """The path as one types it here."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def say(line: str) -> None:
    """Prints a line as it is."""
    out.print(Text(line), soft_wrap=True)


@contextmanager
def executing(context: Context) -> "Iterator[Executor]":
    """Gives what makes the records of a command: the object of the context where its caller gave one, else a worker.

    Under torchrun the ranks make them together, each in its own process.
    """
    from hap.harness.processes import ranks
    from hap.harness.processes.workers import InProcess, Worker

    if context.obj is not None or ranks.launched():
        yield context.obj or InProcess()
        return
    with Worker() as worker:
        yield worker
