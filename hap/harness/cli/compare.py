"""The command `hap compare`; thin over the room of that name, which it imports when called."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hap import HapError
from hap.harness.cli.planning import seeds_of
from hap.harness.cli.terminal import Context, Results, executing, near, out, paths, results_of, say

if TYPE_CHECKING:
    from hap.harness.compare.comparison import Rival
    from hap.harness.processes.workers import Executor
    from hap.harness.spec.spec import Spec


def compare(
    context: Context,
    function: Annotated[str | None, typer.Argument(metavar="PACKAGE.MODULE:FUNCTION", help="Your function.")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[K=V]...", help="More of --options.")] = None,
    spec: Annotated[str | None, typer.Option(help="The spec whose committed evidence it is compared with.")] = None,
    options: Annotated[list[str] | None, typer.Option(metavar="K=V", help="Options of the function, as JSON.")] = None,
    role: Annotated[str, typer.Option(help="What it is: score, method or implant.")] = "score",
    against: Annotated[str | None, typer.Option(help="The case it replaces (default: HAP's, the first).")] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run HAP's cases here too, not only yours.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under results/compare/.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Only these of the committed seeds, as in 0,2,5-7.")] = None,
    known: Annotated[bool, typer.Option("--list", help="Name what can be compared with.")] = False,
    results: Results = None,
) -> None:
    """Run your score, method or implant as HAP's committed evidence was run, and say what can be concluded.

    Nothing is edited, and nothing goes into results/ without --record. Runs are kept in .hap, and the same command
    goes on from there; an edit of your package runs it anew.
    """
    from hap.harness.compare import comparison

    if known:
        _list(results)
        return
    if function is None or spec is None:
        raise HapError("compare: a function and --spec are needed; --list names the specs")
    if role not in comparison.ROLES:
        raise HapError(f"--role {role}: must be one of {', '.join(comparison.ROLES)}")
    if len(chosen := paths([spec])) > 1:
        raise HapError(f"--spec {spec}: must be one spec, found {len(chosen)}")
    rival = comparison.rival(function, _options([*(options or []), *(more or [])]), role)
    with executing(context) as executor:
        _compare(chosen[0], rival, against, rerun, record, results_of(chosen[0], results), executor, seeds)


def _options(given: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in given:
        name, is_one, text = pair.partition("=")
        if not is_one or not name.isidentifier() or name in found:
            raise HapError(f"--options {pair}: must be NAME=VALUE, each name once")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _compare(
    path: Path,
    rival: "Rival",
    against: str | None,
    rerun: bool,
    record: bool,
    results: Path,
    executor: "Executor",
    seeds: str | None,
) -> None:
    from hap.harness.compare import comparison
    from hap.harness.compare.conclusions import page
    from hap.harness.processes.progress import progress
    from hap.harness.spec.spec import load_spec, require
    from hap.harness.verdicts import judge

    base = load_spec(path)
    base = base.model_copy(update={"seeds": tuple(seeds_of(seeds, base) or base.seeds)})
    require(base)
    cases = comparison.baselines(base, rival.role, against)
    evidence = comparison.committed(base, cases, results, rerun)
    file = comparison.written(path, rival, cases, evidence)
    spec = load_spec(file)
    with progress("compare", len(cases) * len(spec.seeds) * (1 + rerun), out) as step:
        runs = comparison.made(spec, rival, evidence, rerun, executor, step)
    text = page(spec, runs, judge.of_today(spec, runs))
    say(f"\n{text.rstrip()}")
    for kept in comparison.record(file, runs, text, results) if record else ():
        say(f"recorded in {near(kept)}")


def _list(results: Path | None) -> None:
    from hap.harness.spec.spec import load_spec

    for path in paths(["all"]):
        try:
            spec = load_spec(path)
            for line in _known(spec, results_of(path, results)):
                say(line)
        except HapError as error:
            say(f"{path.stem}: cannot be compared with: {error}")


def _known(spec: "Spec", results: Path) -> Iterator[str]:
    """Lines on what of a spec can be compared with: HAP's cases, seeds, roles, the other methods, and its data."""
    from hap.harness.compare.comparison import baselines, stem
    from hap.harness.records import store
    from hap.harness.spec.functions import ready

    cases = baselines(spec, "score")
    evidence = store.evidence(spec, results)
    seeds = sorted({run.seed for case in cases for run in evidence[case.name]})
    yield f"{spec.name}: {spec.title}"
    if not seeds:
        yield f"  no evidence of {', '.join(case.name for case in cases)} yet: hap run {spec.name}"
        return
    budgets = ", ".join(f"{case.name} ({case.budget.target:g} of {case.budget.unit})" for case in cases)
    yield f"  in the place of {budgets}; seeds {', '.join(map(str, seeds))}; by {spec.metric}"
    implants = any(case.implant for case in spec.cases.values())
    others = dict.fromkeys(stem(spec.cases[name]) for name, runs in evidence.items() if runs)
    yield f"  ranked among {', '.join(others)}; implants: {'yes' if implants else 'no'}"
    try:
        data = ready(cases[0].task, seeds[0])
        same = all(run.data["sha256"] == data.sha256 for case in cases for run in evidence[case.name][:1])
        yield f"  data: {data.name}, here{'' if same else ', but OTHERS than those of the evidence'}"
    except HapError as error:
        yield f"  data: NOT here, {error}"
