"""Committed results checked against themselves and their specs: a line a finding; makes and changes nothing.

Of each record: its sums and keys, the differences that follow from the costs beside them, its plan, the epoch that its
rule selects. Of records beside each other: one dense network and one convention for MACs for a workload, the published
accuracy where the spec gives it (`bases`), equal budgets and workloads where a claim compares, no copies. Of each table
we print: a row for each case, the numbers of its records, its selection rule and its convention. Tables, VERDICTS.md
and index.html must be what the records give today, byte for byte, and nothing may lie beside the tables; the two pages
where git has the commits of the records, the latter where it can be drawn, but for its scripts. The page of a recorded
comparison must be what its spec and records give.

What it cannot know: whether a record was made as it says. `hap run --again` does.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hap import HapError
from hap.harness.compare import comparison, conclusions
from hap.harness.records import checks as integrity
from hap.harness.records import store
from hap.harness.records.checks import BROKEN
from hap.harness.report import page, plots, tables
from hap.harness.report import verdicts_md as summary
from hap.harness.report import write as report
from hap.harness.run import Run
from hap.harness.spec.spec import Case, Spec, find_specs, load_spec
from hap.harness.verdicts import judge

Runs = dict[str, list[Run]]
STATED = {
    "selection rule": "*Selected*: the epoch that is best on the validation split.",
    "convention for MACs": "MACs are those of convolutions and linear layers; FLOPs would be twice as many.",
}
SCRIPT = b"<script>"  # where those of the page begin
DIGITS = 1e-5  # a CSV has six


class Finding(NamedTuple):
    """What is wrong where."""

    file: Path
    rule: str
    found: object

    @property
    def line(self) -> str:
        """File, rule, found."""
        return " ".join(f"{self.file}: {self.rule} (found {self.found})".split())


Findings = Iterator[Finding]


def lint(folder: Path, results: Path) -> list[Finding]:
    """All that is wrong with the results of the specs of a folder; HapError for a spec that does not read."""
    read = {path: load_spec(path) for path in find_specs(folder)}
    found = list(_strangers(list(read.values()), results))
    every: dict[str, Runs] = {}
    for path, spec in read.items():
        runs = every.setdefault(spec.name, {})
        found += _records(path, spec, results, runs)
        if told := tables.lacking(spec, runs):
            found.append(Finding(path, f"metric {spec.metric} must be in all of its records", told))
        elif any(runs.values()):
            found += _table(spec, runs, results / "tables" / spec.name)
    whole = [run for runs in every.values() for each in runs.values() for run in each]
    found += [Finding(_file(run, results), rule, told) for run, rule, told in integrity.networks(whole)]
    found += _comparisons(results)
    return found + list(_printed(folder, list(read.values()), every, results))


def _file(run: Run, results: Path) -> Path:
    return results / run.spec / f"{run.case}-{run.key}" / f"seed{run.seed}.json"


def _strangers(specs: list[Spec], results: Path) -> Findings:
    """Records that belong to no spec, or to a case as it no longer is."""
    known = {store.path(results, case, seed) for spec in specs for case in spec.cases.values() for seed in spec.seeds}
    for file in sorted(results.glob("*/*/seed*.json")):
        if file not in known:
            yield Finding(file, "a record must be of a spec, a case as it is now, and a seed", file.parent.name)


def _records(path: Path, spec: Spec, results: Path, runs: Runs) -> Findings:
    """What is wrong with the records of a spec, by themselves and beside each other; `runs` takes those that read."""
    for case in spec.cases.values():
        runs[case.name] = []
        for file in (store.path(results, case, seed) for seed in spec.seeds):
            if file.exists():
                yield from _record(file, spec, case, runs[case.name])
        yield from (Finding(_file(run, results), rule, found) for run, rule, found in integrity.copied(runs[case.name]))
    for number, claim in enumerate(spec.claims, start=1):
        if claim.against is not None:
            cases = spec.cases[claim.case], spec.cases[claim.against]
            for rule, found in integrity.compared(*cases, runs):
                yield Finding(path, f"claims[{number}]: {rule}", found)


def _record(file: Path, spec: Spec, case: Case, whole: list[Run]) -> Findings:
    """What is wrong with a record by itself; `whole` takes it if all can be worked out that others are checked with."""
    try:
        run = store.load(file)
        wrong = [*integrity.record(run, case, spec.metric), *integrity.published(run, spec.bases)]
        for _, _, number in tables.columns(spec):
            number(run)
        tables.source(run.data)
    except HapError as error:
        told = str(error).removeprefix(f"{file}: ")
        yield Finding(file, "a record must be whole, and where it belongs", told)
    except BROKEN as error:  # one record must not hide what is wrong with the others
        told = f"{type(error).__name__}: {error}"
        yield Finding(file, "a record must have what is worked out from it", told)
    else:
        whole.append(run)
        yield from (Finding(file, rule, found) for rule, found in wrong)


def _table(spec: Spec, runs: Runs, stem: Path) -> Findings:
    """What is wrong with the table of a spec that has records: its rows, its numbers and what it states."""
    shown, sheet = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.csv")
    for file in (shown, sheet):
        if not file.is_file():
            yield Finding(file, "a spec with records must have a table", "none")
            return
    text = shown.read_text("utf-8", errors="replace")  # what is no UTF-8 is not what the records give
    for what, sentence in STATED.items():
        if sentence not in " ".join(text.split()):
            yield Finding(shown, f"the {what} must be stated: {sentence}", "no such sentence")
    with sheet.open(encoding="utf-8", errors="replace", newline="") as stream:
        try:
            rows = {row.get("case"): row for row in csv.DictReader(stream)}
        except csv.Error as error:
            yield Finding(sheet, "a table must be CSV", error)
            return
    for name in spec.cases:
        if name not in rows or f"| `{name}` |" not in text:
            yield Finding(sheet if name not in rows else shown, f"a row must be there for case {name}", "none")
        elif runs[name]:
            yield from (
                Finding(sheet, rule, found) for rule, found in _numbers(name, rows[name], runs[name], spec.metric)
            )


def _numbers(name: str, row: Mapping[str, str], runs: list[Run], metric: str) -> Iterator[tuple[str, object]]:
    """Cells that are not the mean of the records."""
    wanted = {f"{stage}_{metric}_mean": fmean(run.metrics[stage][metric] for run in runs) for stage in tables.STAGES}
    for unit in ("params", "macs"):
        shares = [100 * (1 - run.cost["pruned"][unit] / run.cost["dense"][unit]) for run in runs]
        wanted[f"{unit}_pruned_mean"] = fmean(shares)
    for column, value in {**wanted, "seeds": float(len(runs))}.items():
        cell = row.get(column)
        try:
            near = cell is not None and abs(float(cell) - value) <= DIGITS * max(1.0, abs(value))
        except ValueError:
            near = False
        if not near:
            yield f"{column} of {name} must be {value:.6g}, as in its records", cell


def _printed(folder: Path, specs: list[Spec], runs: Mapping[str, Runs], results: Path) -> Findings:
    """Tables and pages that are not, byte for byte, what the records give, and what lies beside the tables."""
    beside = _beside(results)
    with TemporaryDirectory(prefix="hap-") as scratch:
        fresh = Path(scratch)
        for run in (run for each in runs.values() for same in each.values() for run in same):  # none that is broken
            _file(run, fresh).parent.mkdir(parents=True, exist_ok=True)
            _file(run, fresh).symlink_to(_file(run, results).absolute())
        for spec in specs:
            here = [file for file in beside if _of(spec, file, results)]
            if tables.lacking(spec, runs[spec.name]):
                beside = [file for file in beside if file not in here]  # nothing can be said of them
            elif here or any(runs[spec.name].values()):
                tables.tables(spec, runs[spec.name], fresh)
        try:
            entries = report.entries(folder, fresh)
            told = not any(verdict.age.lost for entry in entries for verdict in entry.verdicts)
            if told:  # else a clone that is shallow says of the age of the evidence what the pages cannot
                summary.summary(entries, fresh)
            if told and not plots.missing() and not any(tables.lacking(spec, runs[spec.name]) for spec in specs):
                page.write(entries, fresh)
        except (HapError, *BROKEN) as error:
            yield Finding(results / "VERDICTS.md", "verdicts must be what the records give", error)
        wanted = {results / new.relative_to(fresh): new for new in [*_beside(fresh), *fresh.glob("*")] if new.is_file()}
        for there, new in wanted.items():
            if not there.is_file() or _told(there) != _told(new):
                found = _difference(there, new) if there.is_file() else "none"
                yield Finding(there, "it must be what the records give, which `hap report` writes", found)
    for file in beside:
        if not any(_of(spec, file, results) for spec in specs):
            yield Finding(file, "a table must be of a spec", file.stem)
        elif file not in wanted:
            yield Finding(file, "a table must be one that `hap report` writes", file.name)


def _comparisons(results: Path) -> Findings:
    """What is wrong with the folders of results/compare; one that is damaged hides no other."""
    for folder in sorted((results / "compare").glob("*")):
        specs = find_specs(folder)
        if len(specs) != 1:
            yield Finding(folder, "a comparison must be a folder with one spec", f"{len(specs)} specs")
            continue
        try:
            yield from _comparison(specs[0], folder)
        except (HapError, *BROKEN, OSError) as error:
            yield Finding(specs[0], "a comparison must be whole", f"{type(error).__name__}: {error}")


def _comparison(path: Path, folder: Path) -> Findings:
    """What is wrong with the spec, the records and the page of one comparison."""
    spec, page, runs = load_spec(path, bind=False), folder / comparison.PAGE, Runs()  # a stranger's package may be gone
    pairs = comparison.pairs(spec)
    if folder.name != (name := comparison.name(spec)):
        yield Finding(folder, f"its name must be {name}", folder.name)
    if spec.claims != comparison.claims(pairs, spec.metric, spec.claims[0].source):
        yield Finding(path, "its claims must be those that `hap compare` writes", "others")
    for pair in pairs:
        yield from (Finding(path, *each) for each in integrity.compared(*pair, {case.name: () for case in pair}))
    # sizes may differ by more than a claim of ours allows, which the page says
    damaged = list(_records(path, spec.model_copy(update={"claims": ()}), folder, runs))
    yield from damaged
    files = {case.name: {store.path(folder, case, seed) for seed in spec.seeds} for case in spec.cases.values()}
    needed = {path, page}.union(*(files[case.name] for pair in pairs for case in pair))
    there = {file for file in folder.rglob("*") if not file.is_dir()}
    yield from (Finding(file, "a file of a comparison must be there", "none") for file in sorted(needed - there))
    for file in sorted(there - needed.union(*files.values())):
        yield Finding(
            file, "a file of a comparison must be its spec, its page, or a record of a case as it is", file.name
        )
    if not damaged and needed <= there:
        wanted = conclusions.page(spec, runs, judge.verdicts(spec.claims, runs, spec.seeds)).split("\n\n")
        found = [part for part in page.read_text("utf-8").split("\n\n") if not part.startswith(conclusions.AGE)]
        for new, old in zip_longest(wanted, found, fillvalue=""):
            if new != old:
                yield Finding(page, "it must be what its records give", f"{old[:120]!r}")


def _beside(results: Path) -> list[Path]:
    """All files of the folder of tables."""
    return sorted(file for file in (results / "tables").rglob("*") if not file.is_dir())


def _of(spec: Spec, file: Path, results: Path) -> bool:
    return file.parent == results / "tables" and file.stem == spec.name


def _told(file: Path) -> bytes:
    """What must be equal: of the page, no scripts, for they are of the versions of the libraries that drew it."""
    whole = file.read_bytes()
    return re.sub(rb'"\$schema":"[^"]*"', b"", whole.partition(SCRIPT)[0]) if file.name == "index.html" else whole


def _difference(there: Path, fresh: Path) -> str:
    """The first line that differs."""
    lines = [file.read_text("utf-8", errors="replace").splitlines() for file in (there, fresh)]
    for number, (old, new) in enumerate(zip_longest(*lines, fillvalue=""), start=1):
        if old != new:
            return f"line {number}: {old[:120]!r}"
    return "other ends of lines"
