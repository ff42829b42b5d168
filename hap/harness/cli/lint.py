"""Committed results checked against themselves and their specs: a line a finding; makes and changes nothing.

Of each record: its sums and keys, the differences that follow from the costs beside them, its plan, the epoch that its
rule selects. Of records beside each other: one dense network and one convention for MACs for a workload, the published
accuracy where the spec gives it (`bases`), equal budgets and workloads where a claim compares, no copies. Of each table
we print: a row for each case, the means of its records, worked out here again, its selection rule and its convention;
nothing may lie beside the tables. The page of a recorded comparison is what its spec and its records give. Of each
claim: that seeds can decide it at the effect that it assumes, and that its family is that of when its evidence was
made, or the spec says why not.

What it cannot know: whether a record was made as it says (`hap run --again` does), and whether VERDICTS.md, index.html
and the figures are those of today, which `hap report` writes.
"""

import csv
import math
import re
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from hap import HapError
from hap.harness.compare import comparison, conclusions
from hap.harness.records import checks as integrity
from hap.harness.records import outcomes, store
from hap.harness.records.checks import BROKEN
from hap.harness.records.record import Run
from hap.harness.report import tables
from hap.harness.report.markup import tex
from hap.harness.spec.spec import Case, Spec, find_specs, load_spec
from hap.harness.verdicts import families, judge, power

Runs = dict[str, list[Run]]
Means = dict[str, float]  # column of the CSV -> what it must hold; nan: nothing
STATED = {
    "selection rule": "*Selected*: the epoch that is best on the validation split.",
    "convention for MACs": "MACs are those of convolutions and linear layers; FLOPs would be twice as many.",
}
DIGITS = 1e-5  # a CSV has six
ROUNDING = 0.005  # other tables show two behind the point
KINDS = ("csv", "md", "tex")
PAGES = ("VERDICTS.md", "index.html")


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


def lint(
    folder: Path,
    results: Path,
    told: Callable[[str], None] = lambda name: None,
    unknown: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """All that is wrong with the results of the specs of a folder; HapError for a spec that does not read.

    `told` gets the name of each spec before its records are read, `unknown` a line for what git does not say.
    """
    read = {path: load_spec(path, bind=False) for path in find_specs(folder)}
    specs = {spec.name: spec for spec in read.values()}
    found = [*_strangers(list(specs.values()), results), *_beside(list(specs), results)]
    every: dict[str, Runs] = {}
    for path, spec in read.items():
        told(spec.name)
        runs = every.setdefault(spec.name, {})
        found += _records(path, spec, results, runs)
        files = [results / "tables" / f"{spec.name}.{kind}" for kind in KINDS]
        found += [*_claims(path, spec, runs, unknown), *_bits(results, spec, runs)]
        if lacks := tables.lacking(spec, runs):
            found.append(Finding(path, f"metric {spec.metric} must be in all of its records", lacks))
        elif any(runs.values()) or any(file.exists() for file in files):
            found += _tables(spec, runs, files)
    whole = [run for runs in every.values() for each in runs.values() for run in each]
    found += [Finding(_file(run, results), rule, value) for run, rule, value in integrity.networks(whole)]
    if whole:
        pages = (results / name for name in PAGES)
        found += [Finding(page, "a page of the records must be there", "none") for page in pages if not page.is_file()]
    return [*found, *_comparisons(results)]


def _file(run: Run, results: Path) -> Path:
    return results / run.spec / f"{run.case}-{run.key}" / f"seed{run.seed}.json"


def _strangers(specs: list[Spec], results: Path) -> Findings:
    """Records that belong to no spec, or to a case as it no longer is."""
    folders = {store.path(results, case, 0).parent: spec.seeds for spec in specs for case in spec.cases.values()}
    known = {folder / f"seed{seed}.json" for folder, seeds in folders.items() for seed in seeds}
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


def _claims(path: Path, spec: Spec, runs: Runs, unknown: Callable[[str], None]) -> Findings:
    """Claims that no number of seeds can be expected to decide, or that were grouped anew once there was evidence."""
    for number, rule, found in power.mistakes(spec, runs):
        yield Finding(path, f"claims[{number}] {rule}", found)
    if spec.regrouped is not None:
        return
    grouping = families.regrouped(path, spec, chain(*runs.values()))
    for number, before, now, commit in grouping.moved:
        rule = f"claims[{number}].family must be as when its evidence was made, {before}, or `regrouped` say why"
        yield Finding(path, f"{rule}; evidence at {commit[:10]}", now)
    if grouping.unknown:
        named = ", ".join(commit[:10] for commit in grouping.unknown)
        unknown(f"{path}: how its claims were grouped is not known, for git does not have it at {named}")


def _bits(results: Path, spec: Spec, runs: Runs) -> Findings:
    """Bits of dense networks that no record has."""
    needed = set[str]().union(*(outcomes.files(run.outcomes) for run in chain(*runs.values())))
    for file in sorted((results / spec.name / outcomes.FOLDER).glob("*")):
        if file.name not in needed:
            yield Finding(file, "bits must be of a record", file.name)


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


def _tables(spec: Spec, runs: Runs, files: list[Path]) -> Findings:
    """What is wrong with the tables of a spec, in CSV, Markdown and LaTeX: what they state, their rows, their means."""
    if missing := [file for file in files if not file.is_file()]:
        yield from (Finding(file, "a spec with records must have a table", "none") for file in missing)
        return
    sheet, shown, latex = files
    text = " ".join(_text(shown).split())
    for what, sentence in STATED.items():
        if sentence not in text:
            yield Finding(shown, f"the {what} must be stated: {sentence}", "no such sentence")
    wanted = {name: _means(spec, runs[name]) for name in spec.cases}
    columns = [f"{column}_mean" for column, _, _ in tables.columns(spec)]
    yield from _sheet(sheet, wanted)
    yield from _shown(shown, columns, {f"`{name}`": means for name, means in wanted.items()})
    yield from _shown(latex, columns, {tex(name): means for name, means in wanted.items()})


def _sheet(file: Path, wanted: dict[str, Means]) -> Findings:
    """What is wrong with a CSV that must have these means for these cases."""
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        try:
            rows = {row.get("case"): row for row in csv.DictReader(stream)}
        except csv.Error as error:
            yield Finding(file, "a table must be CSV", error)
            return
    for name, means in wanted.items():
        if name not in rows:
            yield Finding(file, f"a row must be there for case {name}", "none")
            continue
        for column, value in means.items():
            cell = rows[name].get(column) or ""
            if not _near(cell, value):
                yield Finding(file, f"{column} of {name} must be {_number(value)}, as in its records", cell)


def _shown(file: Path, columns: list[str], wanted: dict[str, Means]) -> Findings:
    """What is wrong with a table that people read, whose first rows must be these, with these means to two digits."""
    rows = [*_rows(file), *([""] for _ in wanted)]
    for (name, means), cells in zip(wanted.items(), rows, strict=False):
        if cells[0] != name:
            yield Finding(file, f"a row must be there for case {name}", cells[0] or "none")
            continue
        for column, cell in zip(columns, cells[2:], strict=False):
            first = re.split(r" ?[±$]", cell)[0]  # what follows is the standard deviation
            if column in means and not _near("" if first == "-" else first, means[column], ROUNDING):
                yield Finding(file, f"{column} of {name} must be {_number(means[column])}, as in its records", first)


def _means(spec: Spec, runs: list[Run]) -> Means:
    """What a row of the CSV must hold: the means of the records, not a number where there are none."""
    empty = math.nan
    means = {
        f"{stage}_{spec.metric}_mean": fmean(run.metrics[stage][spec.metric] for run in runs) if runs else empty
        for stage in tables.STAGES
    }
    for unit in ("params", "macs"):
        shares = [100 * (1 - run.cost["pruned"][unit] / run.cost["dense"][unit]) for run in runs]
        means[f"{unit}_pruned_mean"] = fmean(shares) if shares else empty
    return {**means, "seeds": float(len(runs))}


def _rows(file: Path) -> Iterator[list[str]]:
    """The cells of the lines of a table in Markdown or LaTeX, without its head."""
    if file.suffix == ".md":
        lines = [line.strip().strip("|").split("|") for line in _text(file).splitlines() if line.startswith("|")][2:]
    else:
        body = _text(file).partition("\\midrule")[2].partition("\\bottomrule")[0]
        lines = [line.removesuffix("\\\\").split("&") for line in body.splitlines() if "&" in line]
    yield from ([cell.strip() for cell in line] for line in lines)


def _near(cell: str, value: float, rounding: float = 0.0) -> bool:
    """Whether a cell shows the number; an empty one shows that there is none."""
    if math.isnan(value) or not cell:
        return math.isnan(value) and not cell
    try:
        return abs(float(cell) - value) <= rounding + DIGITS * max(1.0, abs(value))
    except ValueError:
        return False


def _number(value: float) -> str:
    return "empty" if math.isnan(value) else f"{value:.6g}"


def _text(file: Path) -> str:
    return file.read_text("utf-8", errors="replace")  # what is no UTF-8 is not what the records give


def _beside(names: list[str], results: Path) -> Findings:
    """What lies in the folder of tables and is none."""
    for file in sorted(file for file in (results / "tables").rglob("*") if not file.is_dir()):
        if file.parent != results / "tables" or file.stem not in names:
            yield Finding(file, "a table must be of a spec", file.stem)
        elif file.suffix[1:] not in KINDS:
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
    bits = folder / spec.name / outcomes.FOLDER  # each is named by its hash, which holds it to its records
    there = {file for file in folder.rglob("*") if not file.is_dir() and file.parent != bits}
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
