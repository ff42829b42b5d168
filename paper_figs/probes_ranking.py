"""What probes buy: rank correlation and pruned set against those of the exact score."""

from pathlib import Path

from paper_figs import style
from paper_figs.references import found, network, probes

PANELS = (("spearman", "rank correlation with the exact trace"), ("overlap", "overlap of the pruned sets"))


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec whose cases have a reference, from its records; nothing for others, nor for heads."""
    lines = _by_probes(found(spec, runs))
    if not lines:
        return []
    with style.figure(2, 5.5) as (made, axes):
        for axis, (metric, title) in zip(axes, PANELS, strict=True):
            _ranking(axis, lines, metric)
            axis.set_title(title, loc="left")
        axes[0].axhline(0, color=style.GREY, linestyle=":", linewidth=0.8)
        axes[1].set_xlabel("probes, or sweeps of one probe a layer")
        style.decades(axes[1], [x for points in lines.values() for x, _ in points])
        style.legend(made, axes[0], style.INTERVALS, columns=1)
        return style.save(made, out_dir / f"{spec.name}-ranking")


def _by_probes(cases) -> dict[str, list[tuple[int, list]]]:
    """Network and kind of probe -> the numbers of probes and the runs of each, at the budget that all have."""
    common = _common([case.budget for case, _ in cases if probes(case)])
    lines: dict[str, list[tuple[int, list]]] = {}
    for case, runs in cases:
        if probes(case) and case.budget == common:
            kind = "one layer at a time" if case.score.options.get("block") else "all layers at once"
            lines.setdefault(f"{network(case)}, {kind}", []).append((probes(case), runs))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items() if len(points) > 1}


def _ranking(axis, lines, metric: str) -> None:
    for number, (name, points) in enumerate(lines.items()):
        style.line(axis, name, [(x, [run.metrics["ranking"][metric] for run in runs]) for x, runs in points], number)


def _common(budgets: list) -> object:
    return max(budgets, key=budgets.count, default=None)
