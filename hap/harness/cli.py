"""The command `hap`: list, run, judge, report, doctor; thin over the rest, which it imports when a command needs it."""

import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hap import HapError

if TYPE_CHECKING:
    from hap.harness.judge import Verdict
    from hap.harness.spec import Case, Spec

FOLDER = Path("reproductions")
COLOURS = {"HOLDS": "green", "FAILS": "red", "UNDECIDED": "yellow", "ABSENT": "yellow"}
KEPT = "finished records are kept, and the same command goes on from there"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Reproduces HAP.")
out = Console(highlight=False)

Names = Annotated[list[str] | None, typer.Argument(metavar="[SPEC]...", help="Names in reproductions/, paths, or all.")]
Results = Annotated[Path | None, typer.Option(help="Where evidence lies (default: results/ beside reproductions/).")]


def main() -> None:
    """The entry point."""
    sys.path.append(os.getcwd())  # a spec may name functions of the folder one works in
    app()


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """The command with mistakes told in one line: exit code 2 for a mistake, 130 for an interruption."""

    @wraps(command)
    def told(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except HapError as error:
            typer.echo(f"hap: {error}", err=True)
            raise typer.Exit(2) from None
        except (RuntimeError, MemoryError) as error:
            from hap.harness.stepping import memory_ran_out

            if isinstance(error, RuntimeError) and not memory_ran_out(error):
                raise
            typer.echo(f"hap: memory ran out ({' '.join(str(error).split()):.120}); {KEPT}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(f"\nhap: interrupted; {KEPT}", err=True)
            raise typer.Exit(130) from None

    return told


@app.command("list")
@_told
def list_specs(results: Results = None) -> None:
    """What can be reproduced, and what evidence there is."""
    from hap.harness import store
    from hap.harness.spec import load_spec

    for path in _paths(["all"]):
        try:
            spec = load_spec(path)
            made = sum(map(len, store.evidence(spec, _results(path, results)).values()))
            counts = f"{len(spec.cases)} cases, {made} of {len(spec.cases) * len(spec.seeds)} runs made"
            needs = f"; needs {spec.needs}" if spec.needs else ""
            _say(f"{spec.name:20} {spec.tier:6} {counts}: {spec.title}{needs}")
        except HapError as error:
            _say(f"{path.stem:20} cannot be read: {error}")


@app.command()
@_told
def run(
    specs: Names = None,
    tier: Annotated[str | None, typer.Option(help="Only specs of this tier: quick, cpu or gpu.")] = None,
    case: Annotated[str | None, typer.Option(help="Only this case.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Make evidence anew where it exists.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Rehearse: all stages, few images, nothing kept.")] = False,
    results: Results = None,
) -> None:
    """Make the evidence that is missing, judge it, write the report."""
    from hap.harness.spec import load_spec

    if not specs and tier is None:
        raise HapError(f"name a spec: {', '.join(path.stem for path in _paths(['all']))} or all")
    chosen = {path: load_spec(path) for path in _paths(specs or ["all"])}
    chosen = {path: spec for path, spec in chosen.items() if tier in (None, spec.tier)}
    if not chosen:
        raise HapError(f"--tier {tier}: no spec is of this tier")
    if smoke:
        return _rehearse(chosen, case)
    for path, spec in chosen.items():
        _make(spec, _cases(spec, case), _results(path, results), again, skip=len(chosen) > 1)
    failed = [_close(path, spec, _results(path, results)) for path, spec in chosen.items()]
    raise typer.Exit(int(any(failed)))


@app.command("judge")
@_told
def judge_specs(specs: Names = None, results: Results = None) -> None:
    """Judge committed evidence; runs nothing. Exit code 1 if a claim fails that is not known to."""
    from hap.harness.spec import load_spec

    failed = [_summary(load_spec(path), _results(path, results)) for path in _paths(specs or ["all"])]
    raise typer.Exit(int(any(failed)))


@app.command("report")
@_told
def report_specs(specs: Names = None, results: Results = None) -> None:
    """Write tables, figures, VERDICTS.md and index.html from committed evidence."""
    from hap.harness import plots, report

    paths = _paths(specs or ["all"])
    for folder in dict.fromkeys(_results(path, results) for path in paths):
        here = [path for path in paths if _results(path, results) == folder]
        report.write(here, folder, lambda file: _say(_near(file)))
    if missing := plots.missing():
        _say(f"index.html has {missing}")


@app.command("doctor")
@_told
def doctor_machine(results: Results = None) -> None:
    """What this machine can run, what is missing, how to get it, and which evidence is absent."""
    from hap.harness import doctor

    for line in doctor.lines({path: _results(path, results) for path in _paths(["all"])}):
        _say(line)


def _paths(names: Iterable[str]) -> list[Path]:
    there = sorted(FOLDER.glob("*.toml"))
    found: list[Path] = []
    for name in names:
        named = [path for path in there if name in ("all", path.stem)] or [Path(name)] * Path(name).is_file()
        if not named:
            known = ", ".join(path.stem for path in there) or "none"
            raise HapError(f"spec {name}: must be a file or a name in {FOLDER.absolute()}, which has {known}")
        found += named
    return list(dict.fromkeys(found))


def _results(spec: Path, given: Path | None) -> Path:
    return given if given is not None else spec.absolute().parent.parent / "results"


def _cases(spec: "Spec", name: str | None) -> list["Case"]:
    cases = [case for case in spec.cases.values() if name in (None, case.name, case.name.split("@")[0])]
    if not cases:
        raise HapError(f"--case {name}: must be a case of {spec.name}, one of {', '.join(spec.cases)}")
    return cases


def _make(spec: "Spec", cases: list["Case"], results: Path, again: bool, skip: bool) -> None:
    from hap.harness import store
    from hap.harness.progress import progress
    from hap.harness.spec import require
    from hap.harness.tasks import MissingData

    pairs = [(case, seed) for case in cases for seed in spec.seeds]
    with progress(spec.name, len(pairs), out) as step:
        for case, seed in pairs:
            try:
                if again or not store.path(results, case, seed).exists():
                    require(spec)
                with step(f"{case.name} seed {seed}") as say:
                    store.ensure(case, seed, results, again=again, say=say)
            except MissingData as error:
                if not skip:
                    raise
                _say(f"{spec.name} is left out: {error}")
                return


def _rehearse(chosen: "dict[Path, Spec]", case: str | None) -> None:
    from hap.harness.rehearsal import rehearsal

    for path, spec in chosen.items():
        asked = {each.name: each for each in _cases(spec, case)}
        with rehearsal(spec.model_copy(update={"cases": asked}), path.absolute().parent.parent) as (small, folder):
            _make(small, _cases(small, None), folder, again=False, skip=len(chosen) > 1)
        _say(f"{spec.name}: went through every stage; nothing of it is kept")


def _close(path: Path, spec: "Spec", results: Path) -> bool:
    from hap.harness import report

    files = report.write([path], results)
    failed = _summary(spec, results)
    _say("")
    for what, where in (("records", results / spec.name), *((file.suffix[1:], file) for file in files)):
        _say(f"  {what:8} {_near(where)}")
    return failed


def _summary(spec: "Spec", results: Path) -> bool:
    """Tells each claim, what was observed and the verdict; returns whether one is surprising."""
    from hap.harness import report, store

    judged = report.verdicts(spec, store.evidence(spec, results))
    _say(f"\n{spec.title} ({spec.name})")
    for verdict in judged:
        _tell(verdict)
    return any(verdict.surprising for verdict in judged)


def _tell(verdict: "Verdict") -> None:
    out.print(Text.assemble((f"  {verdict.outcome:10}", COLOURS[verdict.outcome]), verdict.claim.text), soft_wrap=True)
    notes = [verdict.measured, verdict.reason, f"source: {verdict.claim.source}"]
    for note in [*notes, f"known: {verdict.claim.known}" if verdict.claim.known else ""]:
        if note:
            _say(f"             {note}")


def _near(path: Path) -> str:
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def _say(line: str) -> None:
    out.print(Text(line), soft_wrap=True)
