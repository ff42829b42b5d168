"""Runs of a spec -> interactive plots in Vega-Lite, and the JavaScript that draws them; knows nothing of a page.

Needs Altair and vl-convert, the extra `page`; without them there are no plots, and `missing` says so.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hap.harness.records.record import Run
from hap.harness.records.store import path
from hap.harness.report.tables import METRICS, Runs, published
from hap.harness.spec.spec import Case, Spec

_HERE = Path()  # the page lies in results/, so records are named from there
Row = dict[str, Any]
# Okabe and Ito; the seventh, black, is the colour of the text, so that it is seen on a dark page too
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
SIZES = {"params": "parameters", "macs": "MACs"}
STAGES = {"one_shot": "one-shot", "selected": "after fine-tuning"}
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": "transparent"},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "gridColor": "var(--line)",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "titleFontWeight": "normal",
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "symbolFillColor": "transparent"},
}


def missing() -> str:
    """What the plots lack on this machine, in one line; nothing where they can be made."""
    gone = [name for name in ("altair", "vl_convert") if not _there(name)]
    return f"no interactive plots: {' and '.join(gone)} not installed; pip install 'hap[page]'" if gone else ""


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # it was imported and is None
        return False


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which needs no network."""
    import vl_convert

    # no end of the script within the script
    return (
        str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )


def tradeoff(spec: Spec, runs: Runs) -> dict[str, Any] | None:
    """The data of a spec and its two plots, of the metric against parameters and MACs; nothing without records."""
    drawn = {name: case for name, case in spec.cases.items() if runs.get(name) and _shown(case)}
    if not drawn:
        return None
    stages = list(STAGES) if any(case.finetune for case in drawn.values()) else ["one_shot"]
    methods = list(dict.fromkeys(map(_method, drawn)))
    every = [run for name in drawn for run in runs[name]]
    data = {
        "means": [_mean(spec, case, runs[case.name], stage) for case in drawn.values() for stage in stages],
        "seeds": [
            _seed(spec, case, run, stage) for case in drawn.values() for run in runs[case.name] for stage in stages
        ],
        "dense": [{"dense": fmean(run.metrics["dense"][spec.metric] for run in every)}],
        "published": [_published(number, row) for number, row in enumerate(spec.reported, start=1)],
    }
    return {
        "stages": {STAGES[stage]: stage for stage in stages},
        "methods": methods,
        "datasets": data,
        "charts": {size: _chart(spec, methods, stages[-1], size, _domain(data, size)) for size in SIZES},
    }


def _shown(case: Case) -> bool:
    """Rankings are about another question; heads are shown though they have a reference."""
    return case.reference is None or case.prune == "heads"


def _method(name: str) -> str:
    return name.split("@")[0]


def _seed(spec: Spec, case: Case, run: Run, stage: str) -> Row:
    return {**_point(spec, case, [run], stage), "record": str(path(_HERE, case, run.seed))}


def _mean(spec: Spec, case: Case, runs: Sequence[Run], stage: str) -> Row:
    from scipy.stats import t

    row = _point(spec, case, runs, stage)
    values = [run.metrics[stage][spec.metric] for run in runs]
    half = float(t.ppf(0.975, len(runs) - 1)) * stdev(values) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0
    low, high = row["value"] - half, row["value"] + half
    told = f"{low:.2f} to {high:.2f}" if len(runs) > 1 else "not known of one seed"
    least = -100.0 if spec.metric == "matthews" else 0.0
    drawn = {"low": round(max(least, low), 4), "high": round(min(100.0, high), 4)}  # no axis beyond what can be
    return {**row, **drawn, "interval": told, "record": f"{path(_HERE, case, 0).parent}/"}


def _point(spec: Spec, case: Case, runs: Sequence[Run], stage: str) -> Row:
    left = {size: fmean(100 * run.cost["pruned"][size] / run.cost["dense"][size] for run in runs) for size in SIZES}
    # to more digits than a screen has, to fewer than a float
    left = {size: round(share, 4) for size, share in left.items()}
    return {
        "case": case.name,
        "method": _method(case.name),
        "stage": stage,
        "seeds": ", ".join(str(run.seed) for run in runs),
        "value": round(fmean(run.metrics[stage][spec.metric] for run in runs), 4),
        **left,
    }


def _published(number: int, row: Any) -> Row:
    left = {size: 100 - pruned for size in SIZES if (pruned := getattr(row, f"{size}_pruned")) is not None}
    return {"number": str(number), "value": row.accuracy, "told": published(row), **left}


def _domain(data: dict[str, list[Row]], size: str) -> list[float]:
    """From the smallest to the largest size, and a width at which small differences look small."""
    places = [row[size] for row in (*data["seeds"], *data["published"]) if size in row]
    low, high = min(places), max(places)
    margin = max(0.03 * (high - low), (10 - (high - low)) / 2)
    return [round(low - margin, 2), round(high + margin, 2)]


def _chart(spec: Spec, methods: list[str], stage: str, size: str, domain: list[float]) -> dict[str, Any]:
    """Means with their intervals on lines of their method, seeds on them, the dense network, and the published."""
    import altair as alt

    chosen = alt.param(name="stage", value=stage)
    method = alt.param(name="method", value="")
    colour = alt.Color(
        "method:N",
        title=None,
        scale=alt.Scale(domain=methods, range=[PALETTE[n % len(PALETTE)] for n in range(len(methods))]),
        legend=alt.Legend(orient="bottom", columns=alt.ExprRef("width > 420 ? 3 : 2"), labelLimit=150),
    )
    # past seven methods colours return, with another shape
    shapes = [SHAPES[(n + n // len(PALETTE)) % len(SHAPES)] for n in range(len(methods))]
    shape = alt.Shape("method:N", title=None, scale=alt.Scale(domain=methods, range=shapes))
    faint = alt.condition("method === '' || datum.method === method", alt.value(1.0), alt.value(0.12))
    x = alt.X(f"{size}:Q", title=f"{SIZES[size]} left (%)", scale=alt.Scale(domain=domain), axis=alt.Axis(tickCount=8))
    name = METRICS[spec.metric]
    y = alt.Y("value:Q", title=f"test {name} (%)", scale=alt.Scale(zero=False))
    told = [
        alt.Tooltip("case:N"),
        alt.Tooltip("seeds:N"),
        alt.Tooltip("value:Q", title=f"{name} (%)", format=".2f"),
        *(alt.Tooltip(f"{each}:Q", title=f"{label} left (%)", format=".2f") for each, label in SIZES.items()),
    ]
    whole = [alt.Tooltip("interval:N", title="95 % interval"), alt.Tooltip("record:N", title="records")]
    base = alt.Chart(alt.NamedData("means")).transform_filter("datum.stage === stage")
    seeds = alt.Chart(alt.NamedData("seeds")).transform_filter("datum.stage === stage")
    layers = [
        alt.Chart(alt.NamedData("dense"))
        .mark_rule(strokeDash=[4, 3], color="currentColor", opacity=0.7)
        .encode(y="dense:Q", tooltip=[alt.Tooltip("dense:Q", title="dense (%)", format=".2f")]),
        base.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=colour, opacity=faint),
        base.mark_rule().encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour, opacity=faint),
        base.mark_point(size=90, filled=True).encode(
            x=x, y=y, color=colour, shape=shape, tooltip=[*told, *whole], opacity=faint
        ),
        seeds.mark_point(size=18, filled=True, stroke="var(--page)", strokeWidth=0.7, cursor="pointer").encode(
            x=x, y=y, color=colour, href="record:N", tooltip=[*told, alt.Tooltip("record:N")], opacity=faint
        ),
    ]
    layers += _stars(spec, size)
    chart = alt.layer(*layers).add_params(chosen, method).properties(width="container", height=300)
    # through text, so that what is written is what a parser makes of it
    made: dict[str, Any] = json.loads(chart.to_json(indent=None))
    return {**made, "config": CONFIG}


def _stars(spec: Spec, size: str) -> list[Any]:
    """The numbers of others, where they give a size; the table has them all."""
    import altair as alt

    if not any(getattr(row, f"{size}_pruned") is not None for row in spec.reported):
        return []
    # before fine-tuning they are not comparable; they are hidden, for a plot without data would be complained of
    tuned = alt.condition("stage === 'selected'", alt.value(1), alt.value(0))
    base = alt.Chart(alt.NamedData("published")).transform_filter(f"isValid(datum.{size})")
    base = base.encode(x=f"{size}:Q", y="value:Q", opacity=tuned)
    told = [alt.Tooltip("told:N", title="published"), alt.Tooltip("value:Q", title="accuracy (%)")]
    star = "M0,-1L.23,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.23,-.31Z"
    mark = base.mark_point(shape=star, size=90, filled=True, color="currentColor")
    text = base.mark_text(dx=9, dy=-7, fontSize=9, color="currentColor").encode(text="number:N")
    return [mark.encode(tooltip=told), text]
