"""Attention heads: the metric against the heads left, a line a method."""

from pathlib import Path
from statistics import fmean

from hap.harness.report.tables import METRICS
from paper_figs import style

PANELS = (("one_shot", "one-shot"), ("selected", "after fine-tuning"))
CAPTION = f"{style.INTERVALS}\nMethods are set apart sideways for legibility."


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec that prunes heads, from its records, runs: case -> list of Run; nothing for others."""
    found = {name: runs[name] for name, case in spec.cases.items() if case.prune == "heads" and runs.get(name)}
    lines = {method: points for method, points in _lines(found).items() if len(points) > 1}
    if not lines:
        return []
    tuned = any(case.finetune is not None for case in spec.cases.values())
    panels = PANELS if tuned else PANELS[:1]
    with style.figure(len(panels), 0.9 + 1.9 * len(panels) + 0.1 * len(lines)) as (made, axes):
        for axis, (stage, title) in zip(axes, panels, strict=True):
            _panel(axis, lines, stage, spec.metric)
            axis.set_title(title, loc="left")
            axis.set_ylabel(f"{METRICS[spec.metric].split(' ')[0]} (%)")
        axes[-1].set_xlabel("heads left (%)")
        style.legend(made, axes[0], CAPTION)
        return style.save(made, out_dir / f"{spec.name}-heads")


def _lines(found) -> dict[str, list]:
    """Method -> the runs of each of its budgets; a case NAME@60 is a point of the method NAME."""
    lines: dict[str, list] = {}
    for name, runs in found.items():
        lines.setdefault(name.split("@")[0], []).append(runs)
    return lines


def _left(runs) -> float:
    return fmean(100 * (1 - run.plan["removed"]["groups"]) for run in runs)


def _panel(axis, lines, stage: str, metric: str) -> None:
    every = [run for points in lines.values() for point in points for run in point]
    dense = fmean(run.metrics["dense"][metric] for run in every)
    axis.axhline(dense, color=style.GREY, linestyle="--", linewidth=0.8, label=f"dense, {dense:.1f} %")
    for number, (method, points) in enumerate(lines.items()):
        shift = 0.9 * (number - (len(lines) - 1) / 2)
        values = [(_left(point) + shift, [run.metrics[stage][metric] for run in point]) for point in points]
        style.line(axis, method, sorted(values), number)
    style.within(axis, -100 if metric == "matthews" else 0, 100)
