"""The command `hap`, thin over the rest, which it imports when a command needs it."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from hap import HapError
from hap.harness.cli import commands, compare, planning
from hap.harness.cli.terminal import FOLDER, Context, Names, Results, executing, near, out, paths, results_of, say, told

if TYPE_CHECKING:
    from hap.harness.make import Job
    from hap.harness.processes.workers import Executor
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
            spec = load_spec(path, bind=False)
            made = sum(map(len, store.evidence(spec, results_of(path, results)).values()))
            counts = f"{len(spec.cases)} cases, {made} of {len(spec.cases) * len(spec.first)} runs made"
            needs = f"; needs {spec.needs}" if spec.needs else ""
            say(f"{spec.name:20} {spec.tier:6} {counts}: {spec.title}{needs}")
        except HapError as error:
            say(f"{path.stem:20} cannot be read: {error}")


@app.command()
@told
def run(
    context: Context,
    specs: Names = None,
    tier: Annotated[str | None, typer.Option(help="Only specs of this tier: quick, cpu or gpu.")] = None,
    case: Annotated[str | None, typer.Option(help="Only this case.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Make evidence anew where it exists.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Rehearse: all stages, few images, nothing kept.")] = False,
    slurm: Annotated[list[str] | None, typer.Option(help="By jobs: partition=P,gpus=1,...; or cluster=local.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds, as in 0,2,5-7.")] = None,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="Add the seeds of the next look for claims that are still open.")
    ] = False,
    results: Results = None,
) -> None:
    """Make the evidence that is missing, judge it, write the report; under torchrun, on several GPUs at once."""
    if not specs and tier is None:
        raise HapError(f"name a spec: {', '.join(path.stem for path in paths(['all']))} or all")
    named = paths(specs or ["all"])  # before what takes seconds to import
    from hap.harness.cli.slurm import options
    from hap.harness.make import jobs

    chosen = _chosen(named, tier)
    cluster = options(slurm) if slurm else None
    if cluster and "TORCHELASTIC_RUN_ID" in os.environ:
        raise HapError("--slurm: sends jobs by itself, and not under torchrun; ranks=N gives each job N ranks")
    if smoke and cluster:
        raise HapError("--smoke: rehearses here, and not with --slurm")
    if until_decided and (smoke or cluster or seeds is not None):
        raise HapError("--until-decided: adds seeds by itself, here, and not with --seeds, --smoke or --slurm")
    with _joined() as alone, executing(context) as executor:
        if smoke:
            raise typer.Exit(int(_rehearse(chosen, case, executor)))
        there = {path: results_of(path, results) for path in chosen}
        wanted = {
            path: jobs(path, spec, case, there[path], again, planning.seeds_of(seeds, spec))
            for path, spec in chosen.items()
        }
        if cluster:
            broken = _send(chosen, wanted, cluster)
        else:
            several = len(chosen) > 1
            broken = [each for path, spec in chosen.items() for each in _make(spec, wanted[path], executor, several)]
        if until_decided and not broken:
            for path, spec in chosen.items():
                broken += _decide(path, spec, case, there[path], executor, wanted[path])
        surprising = alone(lambda: _close(there))
        if broken:
            say(f"{len(broken)} of {sum(map(len, wanted.values()))} records are BROKEN, as said above")
    raise typer.Exit(int(surprising or bool(broken)))


@app.command()
@told
def record(
    context: Context,
    spec: Annotated[Path, typer.Argument(help="The file of a spec.")],
    case: Annotated[str, typer.Argument(help="The whole name of a case.")],
    seed: Annotated[int, typer.Argument(help="One of its seeds; with --results any.")],
    again: Annotated[bool, typer.Option("--again", help="Make it anew where it exists.")] = False,
    results: Results = None,
) -> None:
    """Make the record of one case and one seed and nothing else: what a job of `run --slurm` does."""
    from hap.harness.make import Job
    from hap.harness.spec.spec import load_spec

    found = load_spec(spec)
    if case not in found.cases or (seed not in found.seeds and results is None):
        raise HapError(f"{spec}: a case and a seed of this spec expected, found {case} and {seed}")
    with _joined(), executing(context) as executor:
        broken = _make(found, [Job(found.cases[case], seed, results_of(spec, results), again)], executor)
    if broken:
        raise HapError(broken[0])


@app.command("cost")
@told
def cost_specs(
    specs: Names = None,
    devices: Annotated[str, typer.Option(help="For how many devices to tell the hours.")] = "1,8,64",
    tflops: Annotated[float | None, typer.Option(help="That a device sustains, in place of what was timed.")] = None,
) -> None:
    """Time a few real steps of each stage; tell the hours, steps, FLOPs, GPU memory and disk of a whole spec."""
    if not specs:
        raise HapError(f"name a spec: {', '.join(path.stem for path in paths(['all']))} or all")
    named = paths(specs)  # before what takes seconds to import
    from hap.harness.cli import bill
    from hap.harness.cli.estimate import estimate
    from hap.harness.spec.spec import load_spec

    several = bill.counts(devices)
    if tflops is not None and not tflops > 0:
        raise HapError(f"--tflops: a number above 0 expected, found {tflops:g}")
    for path in named:
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
    named = paths(specs or ["all"])  # before what takes seconds to import
    from hap.harness.records import store
    from hap.harness.spec.spec import load_spec
    from hap.harness.verdicts import judge

    failed = False
    for path in named:
        spec = load_spec(path, bind=False)
        failed |= _summary(spec, judge.of_today(spec, store.evidence(spec, results_of(path, results))), release)
    raise typer.Exit(int(failed))


@app.command("report")
@told
def report_specs(specs: Names = None, results: Results = None) -> None:
    """Write tables, figures, VERDICTS.md and index.html from committed evidence."""
    chosen = paths(specs or ["all"])
    from hap.harness.report import plots
    from hap.harness.report import write as report

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

    with out.status("reading") as status:
        found = lint(FOLDER, results_of(FOLDER / "any", results), lambda name: status.update(f"checking {name}"), say)
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


app.command("power")(told(planning.power))
app.command("nightly")(told(commands.nightly))
app.command("compare")(told(compare.compare))


@contextmanager
def _joined() -> "Iterator[Callable[[Callable[[], Any]], Any]]":
    """Inside, this is one of the processes that torchrun started, if it did; gives what rank 0 does alone."""
    from hap.harness.processes import ranks

    with ranks.joined():
        out.quiet = ranks.rank() > 0
        yield ranks.shared


def _chosen(named: "Sequence[Path]", tier: str | None) -> "dict[Path, Spec]":
    from hap.harness.spec.spec import load_spec

    found = {path: load_spec(path) for path in named}
    found = {path: spec for path, spec in found.items() if tier in (None, spec.tier)}
    if not found:
        raise HapError(f"--tier {tier}: no spec is of this tier")
    return found


def _make(spec: "Spec", jobs: "list[Job]", executor: "Executor", skip: bool = False) -> list[str]:
    """Makes the records of a spec, and returns a line for each one that is BROKEN.

    `skip`: a spec whose data is missing is left out, with a line that says so.
    """
    from hap.harness.make import make
    from hap.harness.processes import ranks
    from hap.harness.processes.progress import progress
    from hap.harness.spec.spec import require
    from hap.harness.task import MissingData

    broken = list[str]()

    def broke(job: "Job", why: HapError) -> None:
        broken.append(f"{spec.name}: {job.name} is BROKEN: {why}")
        say(broken[-1])

    try:
        if ranks.shared(lambda: any(job.missing for job in jobs)):
            require(spec)
        with progress(spec.name, len(jobs), out) as step:
            make(jobs, executor, step, broke)
    except MissingData as error:
        if not skip or ranks.world() > 1:  # where one rank alone lacks it, the others would go on
            raise
        say(f"{spec.name} is left out: {error}")
    return broken


def _decide(
    path: Path, spec: "Spec", case: str | None, results: Path, executor: "Executor", made: "list[Job]"
) -> list[str]:
    """Makes the records of the next look of the claims that are open, look by look, and adds their jobs to `made`.

    Returns a line for each record that is BROKEN, after which no look follows.
    """
    from hap.harness.make import jobs
    from hap.harness.processes import ranks
    from hap.harness.records import store
    from hap.harness.verdicts.looks import pending

    broken, asked = list[str](), list[tuple[str, int]]()
    while not broken:
        found = ranks.shared(lambda: pending(spec, store.evidence(spec, results)))
        here = [job for job in jobs(path, spec, case, results, seeds=spec.seeds) if (job.case.name, job.seed) in found]
        if not here or asked == found:  # of a spec whose data is missing nothing is made
            break
        asked = found
        say(f"{spec.name}: {len(here)} more records, for claims that are open")
        broken += _make(spec, here, executor, skip=True)
        made += here
    return broken


def _rehearse(chosen: "dict[Path, Spec]", case: str | None, executor: "Executor") -> bool:
    """Every stage of the specs, small, with nothing kept; returns whether one is BROKEN."""
    from hap.harness.cli.rehearsal import rehearsal
    from hap.harness.make import jobs

    broken = list[str]()
    for path, spec in chosen.items():
        asked = {job.case.name: job.case for job in jobs(path, spec, case, Path())}
        with rehearsal(spec.model_copy(update={"cases": asked}), path.absolute().parent.parent) as (small, folder):
            small_jobs = [job._replace(alone="") for job in jobs(path, small, None, folder)]  # it is of the full case
            lines = _make(small, small_jobs, executor, skip=len(chosen) > 1)
        if not lines:
            say(f"{spec.name}: went through every stage; nothing of it is kept")
        broken += lines
    return bool(broken)


def _send(chosen: "dict[Path, Spec]", jobs: "dict[Path, list[Job]]", cluster: dict[str, Any]) -> list[str]:
    """Makes what is missing of the specs by jobs of a cluster, as `slurm.options` has them; a line for each BROKEN."""
    from hap.harness.cli import slurm
    from hap.harness.spec.spec import require

    missing = {path: [job for job in each if job.missing] for path, each in jobs.items()}
    for path in (path for path, each in missing.items() if each and cluster["cluster"] == "local"):
        require(chosen[path])  # the nodes of a cluster have the GPU that this machine may lack
    records = [slurm.Record(path, job) for path, each in missing.items() for job in each]
    broken = slurm.fan_out(records, cluster, say)
    for line in broken:
        say(line)
    return broken


def _close(there: dict[Path, Path]) -> bool:
    """Judges the specs, each once, and writes their reports; returns whether a verdict is surprising."""
    from hap.harness.report import write as report

    failed = False
    for results in dict.fromkeys(there.values()):
        specs = [path for path, folder in there.items() if folder == results]
        found = report.read(specs, results)
        files = report.write(specs, results, found=found)
        for entry in (found[path] for path in specs):
            assert entry.spec is not None  # `read` raises where it is none
            failed |= _summary(entry.spec, entry.verdicts)
        say("")
        records = [("records", results / path.stem) for path in specs]
        for what, where in (*records, *((file.suffix[1:], file) for file in files)):
            say(f"  {what:8} {near(where)}")
    return failed


def _summary(spec: "Spec", verdicts: "Sequence[Verdict]", release: bool = False) -> bool:
    """Says each claim, what was observed and the verdict; returns whether one is surprising, or fit for no release."""
    say(f"\n{spec.title} ({spec.name})")
    for verdict in verdicts:
        _tell(verdict)
    return any(not verdict.released if release else verdict.surprising for verdict in verdicts)


def _tell(verdict: "Verdict") -> None:
    stands = "stand-in: " if verdict.stand_in else ""
    told = f"{stands}{verdict.claim.text}"
    out.print(Text.assemble((f"  {verdict.outcome:10}", COLOURS[verdict.outcome]), told), soft_wrap=True)
    notes = [verdict.measured, *verdict.notes, f"source: {verdict.claim.source}"]
    for note in [*notes, f"known: {verdict.claim.known}" if verdict.claim.known else ""]:
        if note:
            say(f"             {note}")
