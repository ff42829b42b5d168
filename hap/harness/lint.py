"""Committed results checked against themselves and their specs: a line a finding; makes and changes nothing.

Of each record: its sums and keys, the differences that follow from the costs beside them, the epoch that its rule
selects. Of records beside each other: one dense network and one convention for MACs for a workload, the published
accuracy where the spec gives it (`bases`), equal budgets and workloads where a claim compares. Of each table we print:
a row for each case, the numbers of its records, its selection rule and its convention. Tables and VERDICTS.md must be
what the records give today, byte for byte.

What it cannot know: whether a record was made as it says. `hap run --again` does.
"""

import csv
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hap import HapError
from hap.harness import integrity, report, store, summary, tables
from hap.harness.run import Run
from hap.harness.spec import Spec, find_specs, load_spec

Runs = dict[str, list[Run]]
STATED = {
    "selection rule": "*Selected*: the epoch that is best on the validation split.",
    "convention for MACs": "MACs are those of convolutions and linear layers; FLOPs would be twice as many.",
}
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
        found += _table(spec, runs, results / "tables" / spec.name) if any(runs.values()) else []
    return found + list(_printed(folder, list(read.values()), every, results))


def _strangers(specs: list[Spec], results: Path) -> Findings:
    """Records and tables that belong to no spec, or to a case as it no longer is."""
    known = {store.path(results, case, seed) for spec in specs for case in spec.cases.values() for seed in spec.seeds}
    for file in sorted(results.glob("*/*/seed*.json")):
        if file not in known:
            yield Finding(file, "a record must be of a spec, a case as it is now, and a seed", file.parent.name)
    for file in sorted((results / "tables").glob("*.*")):
        if file.stem not in {spec.name for spec in specs}:
            yield Finding(file, "a table must be of a spec", file.stem)


def _records(path: Path, spec: Spec, results: Path, runs: Runs) -> Findings:
    """What is wrong with the records of a spec, by themselves and beside each other; `runs` takes those that read."""
    for case in spec.cases.values():
        runs[case.name] = []
        for file in (store.path(results, case, seed) for seed in spec.seeds):
            if not file.exists():
                continue
            try:
                run = store.load(file)
            except HapError as error:
                yield Finding(
                    file, "a record must be whole, and where it belongs", str(error).removeprefix(f"{file}: ")
                )
                continue
            runs[case.name].append(run)
            wrong = [*integrity.record(run, case), *integrity.published(run, spec.bases)]
            yield from (Finding(file, rule, found) for rule, found in wrong)
    for run, rule, found in integrity.networks(run for each in runs.values() for run in each):
        yield Finding(store.path(results, spec.cases[run.case], run.seed), rule, found)
    for number, claim in enumerate(spec.claims, start=1):
        if claim.against is not None:
            cases = spec.cases[claim.case], spec.cases[claim.against]
            for rule, found in integrity.compared(*cases, runs):
                yield Finding(path, f"claims[{number}]: {rule}", found)


def _table(spec: Spec, runs: Runs, stem: Path) -> Findings:
    """What is wrong with the table of a spec that has records: its rows, its numbers and what it states."""
    page, sheet = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.csv")
    for file in (page, sheet):
        if not file.exists():
            yield Finding(file, "a spec with records must have a table", "none")
            return
    text = page.read_text("utf-8")
    for what, sentence in STATED.items():
        if sentence not in " ".join(text.split()):
            yield Finding(page, f"the {what} must be stated: {sentence}", "no such sentence")
    with sheet.open(encoding="utf-8", newline="") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    for name in spec.cases:
        if name not in rows or f"| `{name}` |" not in text:
            yield Finding(sheet if name not in rows else page, f"a row must be there for case {name}", "none")
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
    """Tables and VERDICTS.md that are not, byte for byte, what the records give."""
    with TemporaryDirectory(prefix="hap-") as scratch:
        fresh = Path(scratch)
        for spec in specs:
            if (results / spec.name).is_dir():
                (fresh / spec.name).symlink_to((results / spec.name).absolute())
        try:
            shown = [spec for spec in specs if any(runs[spec.name].values())]
            written = [file for spec in shown for file in tables.tables(spec, runs[spec.name], fresh)]
            written.append(summary.summary(report.entries(folder, fresh), fresh))
        except HapError as error:
            yield Finding(results / "VERDICTS.md", "tables and verdicts must be what the records give", error)
            return
        for file in written:
            there = results / file.relative_to(fresh)
            if not there.exists() or there.read_bytes() != file.read_bytes():
                found = _difference(there, file) if there.exists() else "none"
                yield Finding(there, "it must be what the records give, which `hap report` writes", found)


def _difference(there: Path, fresh: Path) -> str:
    """The first line that differs."""
    lines = [file.read_text("utf-8", errors="replace").splitlines() for file in (there, fresh)]
    for number, (old, new) in enumerate(zip_longest(*lines, fillvalue=""), start=1):
        if old != new:
            return f"line {number}: {old[:120]!r}"
    return "other ends of lines"
