"""The command `hap`, thin over the rest, which it imports when a command needs it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from hap import HapError
from hap.harness.cli import commands, compare
from hap.harness.cli.terminal import FOLDER, Names, Results, near, out, paths, results_of, say, told

if TYPE_CHECKING:
    from hap.harness.spec.spec import Spec
    from hap.harness.verdicts.judge import Verdict

COLOURS = {"HOLDS": "green", "FAILS": "red", "UNDECIDED": "yellow", "ABSENT": "yellow", "STALE": "magenta"}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Reproduces HAP.")


def main() -> None:
    """The entry point."""
    sys.path.append(os.getcwd())  # a spec may name functions of the folder one works in
    app()


@app.command("list")
@told
def list_specs(results: Results = None) -> None:
    """What can be reproduced, and what evidence there is."""
    from hap.harness.records import store
    from hap.harness.spec.spec import load_spec

    for path in paths(["all"]):
        try:
            spec = load_spec(path)
            made = sum(map(len, store.evidence(spec, results_of(path, results)).values()))
            counts = f"{len(spec.cases)} cases, {made} of {len(spec.cases) * len(spec.seeds)} runs made"
            needs = f"; needs {spec.needs}" if spec.needs else ""
            say(f"{spec.name:20} {spec.tier:6} {counts}: {spec.title}{needs}")
        except HapError as error:
            say(f"{path.stem:20} cannot be read: {error}")


@app.command()
@told
def run(
    specs: Names = None,
    tier: Annotated[str | None, typer.Option(help="Only specs of this tier: quick, cpu or gpu.")] = None,
    case: Annotated[str | None, typer.Option(help="Only this case.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Make evidence anew where it exists.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Rehearse: all stages, few images, nothing kept.")] = False,
    slurm: Annotated[list[str] | None, typer.Option(help="By jobs: partition=P,gpus=1,...; or cluster=local.")] = None,
    results: Results = None,
) -> None:
    """Make the evidence that is missing, judge it, write the report; under torchrun, on several GPUs at once."""
    from hap.harness.cli import making
    from hap.harness.processes import fanout
    from hap.harness.spec.spec import load_spec

    if not specs and tier is None:
        raise HapError(f"name a spec: {', '.join(path.stem for path in paths(['all']))} or all")
    chosen = {path: load_spec(path) for path in paths(specs or ["all"])}
    chosen = {path: spec for path, spec in chosen.items() if tier in (None, spec.tier)}
    if not chosen:
        raise HapError(f"--tier {tier}: no spec is of this tier")
    jobs = fanout.options(slurm) if slurm else None
    if jobs and "TORCHELASTIC_RUN_ID" in os.environ:
        raise HapError("--slurm: sends jobs by itself, and not under torchrun; ranks=N gives each job N ranks")
    if smoke and jobs:
        raise HapError("--smoke: rehearses here, and not with --slurm")
    with _joined() as alone:
        if smoke:
            return making.rehearse(chosen, case, out)
        there = {path: results_of(path, results) for path in chosen}
        if jobs:
            making.by_jobs(chosen, case, there, jobs, again, out)
        for path, spec in chosen.items() if not jobs else ():
            asked = making.cases(spec, case)
            making.make(spec, asked, there[path], out, again=again, skip=len(chosen) > 1)
        failed = alone(lambda: [_close(path, spec, there[path]) for path, spec in chosen.items()])
    raise typer.Exit(int(any(failed)))


@app.command()
@told
def record(
    spec: Annotated[Path, typer.Argument(help="The file of a spec.")],
    case: Annotated[str, typer.Argument(help="The whole name of a case.")],
    seed: Annotated[int, typer.Argument(help="One of its seeds.")],
    again: Annotated[bool, typer.Option("--again", help="Make it anew where it exists.")] = False,
    results: Results = None,
) -> None:
    """Make the record of one case and one seed and nothing else: what a job of `run --slurm` does."""
    from hap.harness.cli import making
    from hap.harness.spec.spec import load_spec

    found = load_spec(spec)
    if case not in found.cases or seed not in found.seeds:
        raise HapError(f"{spec}: a case and a seed of this spec expected, found {case} and {seed}")
    with _joined():
        one = found.model_copy(update={"seeds": (seed,)})
        making.make(one, [found.cases[case]], results_of(spec, results), out, again=again)


@app.command("cost")
@told
def cost_specs(
    specs: Names = None,
    devices: Annotated[str, typer.Option(help="For how many devices to tell the hours.")] = "1,8,64",
    tflops: Annotated[float | None, typer.Option(help="That a device sustains, in place of what was timed.")] = None,
) -> None:
    """Time a few real steps of each stage; tell the hours, steps, FLOPs, GPU memory and disk of a whole spec."""
    from hap.harness.cli import bill
    from hap.harness.cli.estimate import estimate
    from hap.harness.spec.spec import load_spec

    several = bill.counts(devices)
    if tflops is not None and not tflops > 0:
        raise HapError(f"--tflops: a number above 0 expected, found {tflops:g}")
    if not specs:
        raise HapError(f"name a spec: {', '.join(path.stem for path in paths(['all']))} or all")
    for path in paths(specs):
        with out.status(path.stem) as status:
            found = estimate(load_spec(path), status.update)
        out.print(bill.table(found))
        for line in bill.lines(found, several, tflops):
            say(line)


@app.command("judge")
@told
def judge_specs(
    specs: Names = None,
    release: Annotated[bool, typer.Option("--release", help="UNDECIDED, ABSENT and STALE fail as well.")] = False,
    results: Results = None,
) -> None:
    """Judge committed evidence; runs nothing. Exit code 1 if a claim fails that is not known to."""
    from hap.harness.spec.spec import load_spec

    failed = [_summary(load_spec(path), results_of(path, results), release) for path in paths(specs or ["all"])]
    raise typer.Exit(int(any(failed)))


@app.command("report")
@told
def report_specs(specs: Names = None, results: Results = None) -> None:
    """Write tables, figures, VERDICTS.md and index.html from committed evidence."""
    from hap.harness.report import plots
    from hap.harness.report import write as report

    chosen = paths(specs or ["all"])
    for folder in dict.fromkeys(results_of(path, results) for path in chosen):
        here = [path for path in chosen if results_of(path, results) == folder]
        report.write(here, folder, lambda file: say(near(file)))
    if missing := plots.missing():
        say(f"index.html has {missing}")


@app.command("lint")
@told
def lint_results(results: Results = None) -> None:
    """Check committed results: sums, differences, budgets, conventions, tables. Exit code 1 if something is wrong."""
    from hap.harness.cli.lint import lint

    found = lint(FOLDER, results_of(FOLDER / "any", results))
    for finding in found:
        say(finding.line)
    say(f"{len(found)} findings" if found else "nothing is wrong")
    raise typer.Exit(int(bool(found)))


@app.command("doctor")
@told
def doctor_machine(results: Results = None) -> None:
    """What this machine can run, what is missing, how to get it, and which evidence is absent."""
    from hap.harness.cli import doctor

    for line in doctor.lines({path: results_of(path, results) for path in sorted(FOLDER.glob("*.toml"))}):
        say(line)


app.command("nightly")(told(commands.nightly))
app.command("compare")(told(compare.compare))


@contextmanager
def _joined() -> "Iterator[Callable[[Callable[[], Any]], Any]]":
    """Inside, this is one of the processes that torchrun started, if it did; gives what rank 0 does alone."""
    from hap.harness.processes import ranks

    with ranks.joined():
        out.quiet = ranks.rank() > 0
        yield ranks.shared


def _close(path: Path, spec: "Spec", results: Path) -> bool:
    from hap.harness.report import write as report

    files = report.write([path], results)
    failed = _summary(spec, results)
    say("")
    for what, where in (("records", results / spec.name), *((file.suffix[1:], file) for file in files)):
        say(f"  {what:8} {near(where)}")
    return failed


def _summary(spec: "Spec", results: Path, release: bool = False) -> bool:
    """Tells each claim, what was observed and the verdict; returns whether one is surprising, or fit for no release."""
    from hap.harness.records import store
    from hap.harness.verdicts import judge

    judged = judge.of_today(spec, store.evidence(spec, results))
    say(f"\n{spec.title} ({spec.name})")
    for verdict in judged:
        _tell(verdict)
    return any(not verdict.released if release else verdict.surprising for verdict in judged)


def _tell(verdict: "Verdict") -> None:
    out.print(Text.assemble((f"  {verdict.outcome:10}", COLOURS[verdict.outcome]), verdict.claim.text), soft_wrap=True)
    notes = [verdict.measured, *verdict.notes, f"source: {verdict.claim.source}"]
    for note in [*notes, f"known: {verdict.claim.known}" if verdict.claim.known else ""]:
        if note:
            say(f"             {note}")
