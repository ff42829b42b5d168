"""Evidence and verdicts -> results/tables, results/VERDICTS.md, results/figures; says nothing that is not in a record.

Equal evidence gives equal bytes: no dates, no versions, no order but that of the specs.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from hap import HapError
from hap.harness import judge, store
from hap.harness.files import atomic_write
from hap.harness.judge import Verdict, describe
from hap.harness.run import Run
from hap.harness.spec import Reported, Spec, find_specs, load_spec

Runs = dict[str, list[Run]]


def _stage(stage: str, metric: str) -> Callable[[Run], float]:
    return lambda run: run.metrics[stage].get(metric, math.nan)


def _pruned(what: str) -> Callable[[Run], float]:
    return lambda run: float(100 * (1 - run.cost["pruned"][what] / run.cost["dense"][what]))


# name in the CSV, heading in the table, the number of one run
Column = tuple[str, str, Callable[[Run], float]]
STAGES = {
    "dense": "dense (%)",
    "one_shot": "one-shot (%)",
    "selected": "selected (%)",
    "best_test_epoch": "best test epoch (%), optimistic",
}
HEADS: Column = ("heads_pruned", "heads pruned (%)", lambda run: float(100 * run.plan["removed"]["groups"]))
COSTS: tuple[Column, ...] = (
    ("params_pruned", "params pruned (%)", _pruned("params")),
    ("macs_pruned", "MACs pruned (%)", _pruned("macs")),
    ("score_seconds", "score (s)", lambda run: run.seconds.get("score", run.seconds.get("prune", math.nan))),
)
RANKING: tuple[Column, ...] = (
    ("spearman", "rank correlation", lambda run: run.metrics.get("ranking", {}).get("spearman", math.nan)),
    ("overlap", "overlap of the pruned", lambda run: run.metrics.get("ranking", {}).get("overlap", math.nan)),
    ("negative", "negative scores", lambda run: run.metrics.get("ranking", {}).get("negative", math.nan)),
)
# only rows of others fill it
PUBLISHED: Column = ("published_accuracy", "as published (%)", lambda run: math.nan)
METRICS = {"accuracy": "accuracy", "f1": "F1 of class 1", "matthews": "Matthews' correlation (times 100)"}
NOTE = """\
Test {metric}, mean ± standard deviation over seeds. *Selected*: the epoch that is best on the validation split.
*Best test epoch*: what the published code reports, an epoch chosen on the test set; optimistic, and it selects nothing.
MACs are those of convolutions and linear layers; FLOPs would be twice as many."""
RANKING_NOTE = """\
*Rank correlation* (Spearman) with the scores of the reference, and *overlap*: the share of the larger of the two pruned
sets that is in both. A curvature that is negative prunes first, whatever it costs."""
REPORTED_NOTE = """\
*Reported by*: numbers that others published. They were not run here and are not judged; *as published* is the accuracy
of the model and the epoch that their authors chose, on their data."""


def columns(spec: Spec) -> tuple[Column, ...]:
    """The columns of a spec's table: what others published, and the ranking where scores have a reference, if any."""
    stages = [(f"{stage}_{spec.metric}", heading, _stage(stage, spec.metric)) for stage, heading in STAGES.items()]
    published = (PUBLISHED,) if spec.reported else ()
    heads = (HEADS,) if any(case.prune == "heads" for case in spec.cases.values()) else ()
    ranking = RANKING if any(case.reference for case in spec.cases.values()) else ()
    return (*stages, *published, *heads, *COSTS, *ranking)


def frame(spec: Spec, runs: Runs) -> pd.DataFrame:
    """A row a case: seeds, mean and standard deviation of each column, whose data; below, a row a reported number."""
    ours = [_row(spec, name, runs.get(name, [])) for name in spec.cases]
    return pd.DataFrame([*ours, *map(_reported, spec.reported)]).astype({"seeds": "Int64", "seeds_wanted": "Int64"})


def tables(spec: Spec, runs: Runs, results: Path) -> list[Path]:
    """Writes results/tables/<spec>.csv and .md."""
    stem, table = results / "tables" / spec.name, frame(spec, runs)
    files = [stem.with_name(f"{spec.name}.csv"), stem.with_name(f"{spec.name}.md")]
    atomic_write(files[0], table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    shown = columns(spec)
    ranked = shown[-1] in RANKING
    body = _markdown(
        ["case", "seeds", *(heading for _, heading, _ in shown)],
        _bodies(spec, table, [name for name, _, _ in shown]),
    )
    parts = [
        f"# {spec.title}",
        f"{spec.paper}. Spec `{spec.name}`.",
        body,
        NOTE.format(metric=METRICS[spec.metric]),
        RANKING_NOTE if ranked else "",
        _footnotes(spec),
        _sources(runs),
    ]
    atomic_write(files[1], ("\n\n".join(part for part in parts if part) + "\n").encode())
    return files


def figures(spec: Spec, runs: Runs, results: Path, root: Path) -> list[Path]:
    """Writes results/figures/<spec>-*.png and .pdf with each script of root/paper_figs; none without scripts."""
    scripts = [path.stem for path in sorted((root / "paper_figs").glob("*.py")) if path.stem != "style"]
    with _importable(root):
        modules = [import_module(f"paper_figs.{script}") for script in scripts]
    return [file for module in modules for file in module.draw(spec, runs, results / "figures")]


def verdicts(spec: Spec, runs: Runs) -> list[Verdict]:
    """The verdict of each claim of a spec."""
    return judge.verdicts(spec.claims, runs, spec.seeds)


def summary(specs: Path, results: Path) -> Path:
    """Writes results/VERDICTS.md: the verdicts of all specs of a folder; a spec that does not read is named there."""
    parts = ["# Verdicts", "Judged from the records in this folder; `hap judge` repeats it, `hap run` makes records."]
    for path in find_specs(specs):
        try:
            spec = load_spec(path)
            parts.append(_section(spec, verdicts(spec, store.evidence(spec, results))))
        except HapError as error:
            parts.append(f"## {path.stem}\n\nNot judged. {_plain(str(error).replace(str(path), path.name))}")
    file = results / "VERDICTS.md"
    atomic_write(file, ("\n\n".join(parts) + "\n").encode())
    return file


def write(specs: Sequence[Path], results: Path) -> list[Path]:
    """Writes everything for these spec files, and the verdicts of all that lie beside the first."""
    files: list[Path] = []
    for path in specs:
        spec = load_spec(path)
        runs = store.evidence(spec, results)
        files += [*tables(spec, runs, results), *figures(spec, runs, results, path.resolve().parent.parent)]
    return [*files, *(summary(folder, results) for folder in dict.fromkeys(path.parent for path in specs[:1]))]


def _row(spec: Spec, name: str, runs: list[Run]) -> dict[str, Any]:
    origin = {"origin": "run here"} if spec.reported else {}
    row: dict[str, Any] = {"case": name, **origin, "seeds": len(runs), "seeds_wanted": len(spec.seeds)}
    for column, _, number in columns(spec):
        values = [number(run) for run in runs]
        row[f"{column}_mean"] = fmean(values) if values else None
        row[f"{column}_sd"] = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    row["data"] = "; ".join(sorted({_source(run.data) for run in runs}))
    return row


def _reported(row: Reported) -> dict[str, Any]:
    numbers = {
        "dense_accuracy": row.dense,
        "published_accuracy": row.accuracy,
        "params_pruned": row.params_pruned,
        "macs_pruned": row.macs_pruned,
    }
    means = {f"{column}_mean": number for column, number in numbers.items()}
    told = {"data": f"{row.model}, {row.data}", "source": row.source, "note": row.note}
    return {"case": f"reported by {row.method}", "origin": "reported", **means, **told}


def _bodies(spec: Spec, table: pd.DataFrame, columns: Sequence[str]) -> Iterator[list[str]]:
    """The lines of the table: ours, then those of others, numbered as their sources are."""
    rows = table.to_dict("records")
    ours = len(spec.cases)
    yield from (_cells(row, columns) for row in rows[:ours])
    for number, row in enumerate(rows[ours:], start=1):
        means = [row.get(f"{column}_mean") for column in columns]
        # with the digits of the source: 94.3 is not 94.30
        yield [f"{row['case']} ({number})", "-", *("-" if pd.isna(mean) else f"{mean:g}" for mean in means)]


def _footnotes(spec: Spec) -> str:
    """Whose numbers the rows of others are, and from where."""
    if not spec.reported:
        return ""
    lines = [
        f"{number}. {_plain(row.method)}: {_plain(row.model)}, {_plain(row.data)}. {_plain(row.source)}"
        + (f". {_plain(row.note)}" if row.note else "")
        for number, row in enumerate(spec.reported, start=1)
    ]
    return "\n".join([REPORTED_NOTE, "", *lines])


def _cells(row: dict[Any, Any], columns: Sequence[str]) -> list[str]:
    seeds = f"{row['seeds']}" if row["seeds"] == row["seeds_wanted"] else f"{row['seeds']} of {row['seeds_wanted']}"
    numbers = [_measured(row[f"{column}_mean"], row[f"{column}_sd"]) for column in columns]
    return [f"`{row['case']}`", seeds, *numbers]


def _measured(mean: Any, deviation: Any) -> str:
    if pd.isna(mean):
        return "-"
    return f"{mean:.2f}" if pd.isna(deviation) or deviation < 0.005 else f"{mean:.2f} ± {deviation:.2f}"


def _source(data: dict[str, Any]) -> str:
    return f"{data['name']} ({'official' if data['official'] else 'UNOFFICIAL copy'})"


def _sources(runs: Runs) -> str:
    """A sentence a data set; an unofficial copy is called one."""
    seen = {str(run.data): run.data for each in runs.values() for run in each}
    lines = [f"Data: {_source(data)}, sha256 {data['sha256'][:16]}. {_plain(data['note'])}" for data in seen.values()]
    return "\n".join(sorted({line.strip() for line in lines}))


def _section(spec: Spec, judged: list[Verdict]) -> str:
    head = ["", "claim", "source", "claimed", "observed", "verdict", "seeds"]
    table = _markdown(head, ([str(number), *_judged(each)] for number, each in enumerate(judged, start=1)))
    return f"## {_plain(spec.title)}\n\nSpec `{spec.name}`, {_plain(spec.paper)}.\n\n{table}"


def _judged(verdict: Verdict) -> list[str]:
    claim, known = verdict.claim, f" (known: {verdict.claim.known})" if verdict.claim.known else ""
    why = f": {verdict.reason}" if verdict.reason else ""
    observed = "-" if verdict.observed is None else f"{verdict.observed:.4g}{verdict.bounds}"
    seeds = str(len(verdict.seeds)) if verdict.observed is not None else "0"
    return [claim.text, claim.source, describe(claim), observed, f"**{verdict.outcome}**{why}{known}", seeds]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that neither ends a cell nor becomes HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
