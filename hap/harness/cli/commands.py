"""The command `hap nightly`; thin over the rest, which it imports when called."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hap import HapError
from hap.harness.cli.terminal import Context, Names, executing, near, out, paths, say

if TYPE_CHECKING:
    from hap.harness.nightly.measure import Made
    from hap.harness.nightly.regressions import Watched
    from hap.harness.processes.workers import Executor
    from hap.harness.spec.spec import Spec


def nightly(
    context: Context,
    specs: Names = None,
    tier: Annotated[str | None, typer.Option(help="Only specs of this tier: quick, cpu or gpu.")] = None,
    history: Annotated[Path | None, typer.Option(help="The history (default: .hap/history.jsonl).")] = None,
    night: Annotated[str | None, typer.Option(help="Its name (default: the date); seeds are drawn from it.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write a summary there, in Markdown.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the result there, as JUnit XML.")] = None,
    speed: Annotated[bool, typer.Option(help="Time the benchmarks too.")] = True,
    run: Annotated[bool, typer.Option(help="Measure; --no-run judges the last night of the history again.")] = True,
    accept: Annotated[
        str | None, typer.Option(help="Accept how this series changed, by its name; needs --why.")
    ] = None,
    why: Annotated[str | None, typer.Option(help="The reason, for the history.")] = None,
) -> None:
    """Measure anew what this machine can, add it to a history, tell what got worse; exit code 1 if anything did.

    One night at a time in a folder .hap: another waits. A night that was interrupted goes on where it was, also on
    another day, if the specs and the code are the same.
    """
    from hap.harness.nightly import history as past
    from hap.harness.nightly import measure as measuring
    from hap.harness.processes.files import cache, locked

    file = history or cache() / "history.jsonl"
    lines = past.load(file)  # a damaged one is told before hours are spent
    if accept is not None:
        return _accept(file, accept, why)
    if not run:
        if not past.nights(lines):
            raise HapError(f"{file}: a history with a night is needed to judge it again, found none")
        return _watched(file, past.nights(lines)[-1], measuring.Made(), summary, junit)
    chosen, given = _specs(specs, tier), None if night is None else measuring.checked(night)
    with locked(file):
        pass  # where it cannot be written, no hours are spent
    with locked(measuring.folder("nights")):
        made = measuring.Made()
        nights = past.nights(past.load(file))  # the one waited for may have added to it
        if given in nights:
            raise HapError(f"--night {given}: must be new, found it in {file}; --no-run judges the last night again")
        name = measuring.begin(nights, chosen.values(), made, given)
        with executing(context) as executor:
            _measure(name, chosen, made, speed, executor)
        past.append(file, made.rows)
        measuring.forget(name)
    say(f"{len(made.rows)} numbers of night {name} are in {near(file)}")
    return _watched(file, name, made, summary, junit)


def _specs(names: list[str] | None, tier: str | None) -> "dict[Path, Spec]":
    from hap.harness.spec.spec import load_spec

    found = {path: load_spec(path) for path in paths(names or ["all"])}
    chosen = {path: spec for path, spec in found.items() if tier in (None, spec.tier)}
    if not chosen:
        raise HapError(f"--tier {tier}: no spec is of this tier")
    return chosen


def _measure(name: str, specs: "dict[Path, Spec]", made: "Made", speed: bool, executor: "Executor") -> None:
    from hap.harness.cli.terminal import FOLDER
    from hap.harness.nightly import measure as measuring
    from hap.harness.processes.progress import progress

    chosen = measuring.runnable(specs, made.notes)
    root = FOLDER.absolute().parent if speed else None
    with progress(f"night {name}", measuring.parts(chosen.values(), speed), out) as step:
        measuring.measure(name, chosen, root, made, executor, step)
    if not made.rows and not made.broken:
        raise HapError(f"night {name}: nothing could be measured: {'; '.join(made.notes)}")


def _watched(file: Path, night: str, made: "Made", summary: Path | None, junit: Path | None) -> None:
    """Judges a night and tells it; exit code 1 where something got worse or broke."""
    from hap.harness.nightly import history as past
    from hap.harness.nightly import regressions
    from hap.harness.processes.files import atomic_write

    found = regressions.watch(past.load(file), night)
    notes = [*made.notes, *(f"{what} BROKE: {text.strip().splitlines()[-1]}" for what, text in made.broken)]
    _tell(found, notes)
    if summary is not None:
        atomic_write(summary, regressions.markdown(found, notes, night).encode())
    if junit is not None:
        atomic_write(junit, regressions.junit(found, made.broken, night))
    raise typer.Exit(int(any(each.worse for each in found) or bool(made.broken)))


def _tell(found: "list[Watched]", notes: list[str]) -> None:
    from hap.harness.nightly.regressions import RATE

    for note in notes:
        say(note)
    worse = [each for each in found if each.worse]
    for each in worse:
        say(f"REGRESSION {each.line}")
    asked = sum(bool(each.asked) for each in found)
    young = f", {len(found) - asked} are too young to be compared" if asked < len(found) else ""
    say(f"{len(worse)} of {asked} series got worse{young}; at most {100 * RATE:g} % of quiet nights say so falsely")


def _accept(file: Path, name: str, why: str | None) -> None:
    from hap.harness.nightly import history as past

    known = sorted({each.name for each in past.series(past.load(file))})
    if name not in known:
        raise HapError(f"--accept {name}: must be a series of {file}, one of {', '.join(known) or 'none'}")
    if not why:
        raise HapError(f"--accept {name}: needs a reason, --why TEXT")
    past.append(file, [past.Accepted(accepted=name, why=why)])
    say(f"{name}: from here on it is compared with nothing before ({why})")
