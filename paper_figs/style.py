"""What all figures share: one-column width, a colour-blind safe palette, intervals, files that do not change alone."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.style as styles
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import NullFormatter
from scipy.stats import t

from hap.harness.processes.files import atomic_write

COLUMN_INCHES = 3.3
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY, LIGHT = "#555555", "#cccccc"
INTERVALS = "Marks: mean over seeds. Bars: 95 % intervals (Student)."
NO_DATES = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
RULES = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a figure is the same everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "svg.hashsalt": "hap",
}
STYLE = ["default", RULES]  # a matplotlibrc of the reader's has no say


@contextmanager
def figure(rows: int, inches: float) -> Iterator[tuple[Figure, Sequence]]:
    """A figure one column wide with `rows` panels under each other that share their x axis."""
    with parts(1, rows, inches) as (made, (part,)):
        yield made, part[1]


@contextmanager
def parts(count: int, rows: int, inches: float) -> Iterator[tuple[Figure, list[tuple[FigureBase, Sequence]]]]:
    """As `figure`, with `count` parts under each other, each with panels of its own and room for a legend."""
    with styles.context(STYLE, after_reset=True):
        made = Figure(figsize=(COLUMN_INCHES, inches), layout="constrained")
        places = [made] if count == 1 else list(made.subfigures(count, 1))
        yield made, [(place, place.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]) for place in places]


def save(made: Figure, stem: Path) -> list[Path]:
    """Writes PNG and PDF without dates or versions: equal evidence gives equal bytes."""
    files = []
    for kind, metadata in NO_DATES.items():
        content = io.BytesIO()
        made.savefig(content, format=kind, dpi=300, metadata=metadata)
        files.append(stem.with_name(f"{stem.name}.{kind}"))
        atomic_write(files[-1], content.getvalue())
    return files


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the two-sided 95 % interval: t(0.975, n - 1) s / sqrt(n); of one value, no width."""
    if len(values) < 2:
        return values[0], 0.0
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def line(axis, label: str, points: Sequence[tuple[float, Sequence[float]]], number: int) -> None:
    """A line of means with their intervals, points: x and the values there; `number` picks colour and mark."""
    means, bars = zip(*(interval(values) for _, values in points), strict=True)
    colour, mark = (wheel[number % len(wheel)] for wheel in (PALETTE, MARKERS))
    dashes = "-" if number < len(PALETTE) else ":"
    x = [place for place, _ in points]
    axis.errorbar(
        x, means, yerr=bars, label=label, color=colour, marker=mark, linestyle=dashes, capsize=2, elinewidth=0.8
    )


def legend(part: FigureBase, axis, caption: str, columns: int = 2) -> None:
    """What the marks of `axis` mean, below the panels of a part, under a caption."""
    handles = axis.get_legend_handles_labels()
    part.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, title=caption, title_fontsize=6)


def groups(names: Sequence[str]) -> list[list[str]]:
    """The names in parts of nearly equal size, with a colour for each name of a part."""
    count = -(-len(names) // len(PALETTE))
    bounds = [round(len(names) * part / count) for part in range(count + 1)]
    return [list(names[start:end]) for start, end in pairwise(bounds)]


def within(axis, low: float, high: float) -> None:
    """Keeps an interval from drawing the axis beyond what its quantity can be."""
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, low), min(top, high))


def decades(axis, values: Sequence[float]) -> None:
    """A logarithmic x axis over whole powers of ten, with labels that have room."""
    axis.set_xscale("log")
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    axis.set_xlim(10 ** (low - 0.15), 10 ** (max(high, low + 1) + 0.15))
    axis.xaxis.set_minor_formatter(NullFormatter())


def machine(runs: Sequence) -> str:
    """Where these records were made: a line for the caption."""
    told = {
        f"{run.environment.get('device', 'an unknown device')}"
        + (f", {run.environment['threads']} threads" if run.environment.get("threads") else "")
        for run in runs
    }
    return f"Timed on {' and '.join(sorted(told))}.".replace(" 1 threads", " 1 thread")
