"""Evidence and verdicts -> tables, figures, VERDICTS.md and index.html; says nothing that is not in a record.

Equal evidence gives equal bytes: no dates, no versions, no order but that of the specs.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from hap import HapError
from hap.harness.records import store
from hap.harness.report import page
from hap.harness.report.tables import Runs, tables
from hap.harness.report.verdicts_md import Entry, summary
from hap.harness.spec.spec import Spec, find_specs, load_spec
from hap.harness.verdicts import judge
from hap.harness.verdicts.judge import Verdict

Told = Callable[[Path], None]


def figures(spec: Spec, runs: Runs, results: Path, root: Path) -> list[Path]:
    """Writes results/figures/<spec>-*.png and .pdf with each script of root/paper_figs; none without scripts."""
    scripts = [path.stem for path in sorted((root / "paper_figs").glob("*.py"))]
    with _importable(root):
        modules = [import_module(f"paper_figs.{script}") for script in scripts]
    drawing = [module for module in modules if hasattr(module, "draw")]  # the others are what they share
    return [file for module in drawing for file in module.draw(spec, runs, results / "figures")]


def verdicts(spec: Spec, runs: Runs) -> list[Verdict]:
    """The verdict of each claim of a spec."""
    return judge.of_today(spec, runs)


def entries(specs: Path, results: Path) -> list[Entry]:
    """The records and verdicts of all specs of a folder, those with records first; one that does not read says why."""
    found = [_entry(path, results) for path in find_specs(specs)]
    return sorted(found, key=lambda entry: not any(entry.runs.values()))


def read(specs: Sequence[Path], results: Path) -> dict[Path, Entry]:
    """The records and verdicts of spec files, and of all beside the first; HapError where one of `specs` is wrong."""
    folder = specs[0].parent
    found = {folder / f"{entry.name}.toml": entry for entry in entries(folder, results)}
    for path in specs:
        if path not in found or found[path].spec is None:
            found[path] = _judged(path, results)
    return found


def write(
    specs: Sequence[Path], results: Path, told: Told = lambda file: None, found: Mapping[Path, Entry] | None = None
) -> list[Path]:
    """Writes everything for these spec files, and the pages of all that lie beside the first; tells each file.

    `found`: what `read` gave for them, where it has been called.
    """
    files: list[Path] = []

    def done(made: Sequence[Path]) -> None:
        for file in made:
            told(file)
            files.append(file)

    if specs:
        found = read(specs, results) if found is None else found
        for path in specs:
            spec, runs = found[path].spec, found[path].runs
            assert spec is not None  # `read` raises where it is none
            done(tables(spec, runs, results))
            done(figures(spec, runs, results, path.resolve().parent.parent))
        beside = [entry for path, entry in found.items() if path.parent == specs[0].parent]
        done([summary(beside, results), page.write(beside, results)])
    return files


def _entry(path: Path, results: Path) -> Entry:
    try:
        return _judged(path, results)
    except HapError as error:
        return Entry(path.stem, mistake=str(error).replace(str(path), path.name))


def _judged(path: Path, results: Path) -> Entry:
    spec = load_spec(path)
    runs = store.evidence(spec, results)
    return Entry(path.stem, spec, runs, tuple(verdicts(spec, runs)))


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
