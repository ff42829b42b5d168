"""Latency against the MACs left, a line a method, a panel a batch size: what pruning saves on a clock."""

from functools import partial
from pathlib import Path
from statistics import fmean

from paper_figs import style, tradeoff


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec from its records, runs: case -> list of Run; nothing without records."""
    lines = tradeoff.methods(spec, runs)
    every = [run for points in lines.values() for point in points for run in point]
    sizes = [set(run.cost[model]["latency_seconds"]) for run in every for model in ("dense", "pruned")]
    batches = sorted(set.intersection(*sizes), key=int) if sizes else []
    if not batches:
        return []
    panels = [_panel(every, batch) for batch in dict.fromkeys((batches[0], batches[-1]))]
    caption = f"\n{style.machine(every)}\nTimed in each run, beside whatever else the machine did."
    return tradeoff.against(lines, "macs", panels, out_dir / f"{spec.name}-latency_vs_macs", caption)


def _panel(every, batch: str) -> tradeoff.Panel:
    dense = fmean(1000 * run.cost["dense"]["latency_seconds"][batch] for run in every)
    title = f"batch of {batch}; dense: {dense:.3g} ms on average"
    extra = partial(_proportional, place=fmean(tradeoff.left(run, "macs") for run in every))
    return tradeoff.Panel(title, partial(_left, batch=batch), "latency left (%)", extra)


def _left(run, batch: str) -> float:
    """Percent of the latency of the dense network, as the same run timed it."""
    return 100 * run.cost["pruned"]["latency_seconds"][batch] / run.cost["dense"]["latency_seconds"][batch]


def _proportional(axis, place: float) -> None:
    """The line of a latency that shrinks as the MACs do, through a place among them, and that of the dense network."""
    axis.axhline(100, color=style.GREY, linestyle="--", linewidth=0.8, label="dense")
    axis.axline((place, place), slope=1, color=style.GREY, linestyle=":", linewidth=0.8, label="as the MACs")
