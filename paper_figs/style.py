"""What all figures share: one-column width, a colour-blind safe palette, files that do not change by themselves."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure, FigureBase

from hap.harness.files import atomic_write

COLUMN_INCHES = 3.35
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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


@contextmanager
def figure(rows: int, inches: float) -> Iterator[tuple[Figure, Sequence]]:
    """A figure one column wide with `rows` panels under each other that share their x axis."""
    with parts(1, rows, inches) as (made, (part,)):
        yield made, part[1]


@contextmanager
def parts(count: int, rows: int, inches: float) -> Iterator[tuple[Figure, list[tuple[FigureBase, Sequence]]]]:
    """As `figure`, with `count` parts under each other, each with panels of its own and room for a legend."""
    with mpl.rc_context(RULES):
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
