"""What a score costs: the seconds that each took, beside each other, on one machine."""

from pathlib import Path
from statistics import fmean

from paper_figs import style

LEAST = 1e-4  # seconds: below, a clock says little, and a logarithm has no place for 0
CAPTION = f"{style.INTERVALS}\nHollow: a method without a score, its whole pruning."


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec from its records, runs: case -> list of Run; nothing without timed records."""
    rows = _rows(spec, runs)
    if not rows:
        return []
    every = [run for name in spec.cases for run in runs.get(name, [])]
    with style.figure(1, 1.0 + 0.19 * len(rows)) as (made, (axis,)):
        for place, (_, scored, values) in enumerate(rows):
            _row(axis, -place, scored, values)
        style.decades(axis, [value for _, _, values in rows for value in values])
        axis.set_yticks([-place for place in range(len(rows))], labels=[name for name, _, _ in rows])
        axis.set_ylim(0.6 - len(rows), 0.6)
        axis.set_xlabel("time of one scoring of all groups (s)")
        hollow = any(not scored for _, scored, _ in rows)
        caption = (CAPTION if hollow else style.INTERVALS) + f"\nSmall: single seeds. {style.machine(every)}"
        made.legend(handles=[], loc="outside lower center", frameon=False, title=caption, title_fontsize=6)
        return style.save(made, out_dir / f"{spec.name}-cost_of_scoring")


def _rows(spec, runs) -> list[tuple[str, bool, list[float]]]:
    """(the method that names it, whether it has a score, seconds by seed) of each score, the cheapest first.

    Cases that score alike are one row; a seed that was timed more than once counts with the mean of its times.
    """
    found: dict[str, tuple[str, bool, dict[int, set[float]]]] = {}
    for name, case in spec.cases.items():
        what = case.score if case.score is not None else case.method
        alike = str((case.task, what, case.coupling, case.prune))
        stage = "score" if case.score is not None else "prune"
        for run in runs.get(name, []):
            if stage in run.seconds:
                row = found.setdefault(alike, (name.split("@")[0], case.score is not None, {}))
                row[2].setdefault(run.seed, set()).add(max(run.seconds[stage], LEAST))
    rows = [(name, scored, [fmean(times) for times in seeds.values()]) for name, scored, seeds in found.values()]
    return sorted(rows, key=lambda row: fmean(row[2]))


def _row(axis, place: int, scored: bool, values: list[float]) -> None:
    mean, half = style.interval(values)
    # an interval that reaches 0 has no end on a logarithmic axis: it is drawn to a hundredth of its mean
    down = min(half, 0.99 * mean)
    axis.plot(values, [place] * len(values), marker="|", linewidth=0, color=style.LIGHT, markersize=5, zorder=1)
    fill = style.PALETTE[0] if scored else "white"
    axis.errorbar(
        mean,
        place,
        xerr=[[down], [half]],
        marker="o",
        markerfacecolor=fill,
        color=style.PALETTE[0],
        capsize=2,
        elinewidth=0.8,
    )
