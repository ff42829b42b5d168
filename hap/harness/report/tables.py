"""Runs of a spec -> results/tables: CSV, Markdown and LaTeX; says nothing that is not in a record or in the spec.

Equal evidence gives equal bytes: no dates, no versions, no order but that of the spec.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from hap import HapError
from hap.harness.processes.files import atomic_write
from hap.harness.records.record import Run
from hap.harness.report.markup import latex, markdown, plain
from hap.harness.spec.spec import Reported, Spec

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
    """A row a case: seeds, mean and standard deviation of each column, whose data; below, a row a reported number.

    HapError where a record does not have the metric of the spec.
    """
    if found := lacking(spec, runs):
        raise HapError(f"{spec.name}.toml: metric {spec.metric} must be in all of its records (found {found})")
    ours = [_row(spec, name, runs.get(name, [])) for name in spec.cases]
    return pd.DataFrame([*ours, *map(_reported, spec.reported)]).astype({"seeds": "Int64", "seeds_wanted": "Int64"})


def lacking(spec: Spec, runs: Runs) -> str:
    """The first record that does not have the metric of the spec, and what it has instead; empty where all have it."""
    for run in (run for each in runs.values() for run in each):
        for stage in STAGES:
            if spec.metric not in run.metrics[stage]:
                return f"{', '.join(run.metrics[stage])} in {stage} of {run.case} seed {run.seed}"
    return ""


def tables(spec: Spec, runs: Runs, results: Path) -> list[Path]:
    """Writes results/tables/<spec>.csv, .md and .tex."""
    table = frame(spec, runs)
    contents = {
        "csv": table.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
        "md": _in_markdown(spec, runs, table),
        "tex": _in_latex(spec, runs, table),
    }
    files = {kind: results / "tables" / f"{spec.name}.{kind}" for kind in contents}
    for kind, file in files.items():
        atomic_write(file, contents[kind].encode())
    return list(files.values())


def head(spec: Spec) -> list[str]:
    """The headings of the table as people read it."""
    return ["case", "seeds", *(heading for _, heading, _ in columns(spec))]


def body(spec: Spec, table: pd.DataFrame) -> Iterator[list[str]]:
    """Its lines: ours, then those of others, numbered as their sources are."""
    names, rows, ours = [name for name, _, _ in columns(spec)], table.to_dict("records"), len(spec.cases)
    yield from (_cells(row, names) for row in rows[:ours])
    for number, row in enumerate(rows[ours:], start=1):
        means = [row.get(f"{name}_mean") for name in names]
        # with the digits of the source: 94.3 is not 94.30
        yield [f"{row['case']} ({number})", "-", *("-" if pd.isna(mean) else f"{mean:g}" for mean in means)]


def notes(spec: Spec, runs: Runs) -> list[str]:
    """What its columns mean, whose numbers the rows of others are, and from where, and which data was used."""
    ranked = (RANKING_NOTE,) if columns(spec)[-1] in RANKING else ()
    return [NOTE.format(metric=METRICS[spec.metric]), *ranked, *_footnotes(spec), *_sources(runs)]


def published(row: Reported) -> str:
    """Of whose model and data a reported number is, and where it stands."""
    return f"{row.method}: {row.model}, {row.data}. {row.source}" + (f". {row.note}" if row.note else "")


def source(data: dict[str, Any]) -> str:
    """The name of a data set; an unofficial copy is called one."""
    return f"{data['name']} ({'official' if data['official'] else 'UNOFFICIAL copy'})"


def _in_markdown(spec: Spec, runs: Runs, table: pd.DataFrame) -> str:
    lines = [[f"`{case}`" if case in spec.cases else case, *rest] for case, *rest in body(spec, table)]
    explained = [plain(note) for note in notes(spec, runs)]
    whole = [
        f"# {plain(spec.title)}",
        f"{plain(spec.paper)}. Spec `{spec.name}`.",
        markdown(head(spec), lines),
        *explained,
    ]
    return "\n\n".join(whole) + "\n"


def _in_latex(spec: Spec, runs: Runs, table: pd.DataFrame) -> str:
    explained = [note.replace("*", "") for note in notes(spec, runs)]
    return latex(spec.name, f"{spec.title}. {spec.paper}.", head(spec), body(spec, table), explained)


def _row(spec: Spec, name: str, runs: list[Run]) -> dict[str, Any]:
    origin = {"origin": "run here"} if spec.reported else {}
    row: dict[str, Any] = {"case": name, **origin, "seeds": len(runs), "seeds_wanted": len(spec.first)}
    for column, _, number in columns(spec):
        values = [number(run) for run in runs]
        row[f"{column}_mean"] = fmean(values) if values else None
        row[f"{column}_sd"] = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    row["data"] = "; ".join(sorted({source(run.data) for run in runs}))
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


def _footnotes(spec: Spec) -> list[str]:
    if not spec.reported:
        return []
    return [REPORTED_NOTE, *(f"({number}) {published(row)}" for number, row in enumerate(spec.reported, start=1))]


def _cells(row: dict[Any, Any], columns: Sequence[str]) -> list[str]:
    seeds = f"{row['seeds']}" if row["seeds"] >= row["seeds_wanted"] else f"{row['seeds']} of {row['seeds_wanted']}"
    return [row["case"], seeds, *(_measured(row[f"{column}_mean"], row[f"{column}_sd"]) for column in columns)]


def _measured(mean: Any, deviation: Any) -> str:
    if pd.isna(mean):
        return "-"
    return f"{mean:.2f}" if pd.isna(deviation) or deviation < 0.005 else f"{mean:.2f} ± {deviation:.2f}"


def _sources(runs: Runs) -> list[str]:
    """A sentence a data set."""
    seen = {str(run.data): run.data for each in runs.values() for run in each}
    lines = [f"Data: {source(data)}, sha256 {data['sha256'][:16]}. {data['note']}" for data in seen.values()]
    return sorted({line.strip() for line in lines})
