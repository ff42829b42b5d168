"""Test accuracy against the parameters left, a line a method: one-shot above, after fine-tuning below.

More methods than colours are told apart in parts, each with some in colour and the others in grey behind them.
"""

from itertools import pairwise
from pathlib import Path
from statistics import fmean

from paper_figs import style

PANELS = (("one_shot", "one-shot"), ("selected", "after fine-tuning"))
CAPTION = "Marks: mean over seeds. Bars: smallest to largest seed.\nMethods are set apart sideways for legibility."
GREY = "\nGrey: the means of the methods of the other parts."


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec from its records, runs: case -> list of Run; nothing without records."""
    lines = _lines(spec, runs)
    if not lines:
        return []
    tuned = any(case.finetune is not None for case in spec.cases.values())
    panels = PANELS if tuned else PANELS[:1]
    groups = _groups(list(lines))
    inches = sum(0.9 + 1.6 * len(panels) + 0.15 * ((len(group) + 1) // 2) for group in groups)
    left = _lefts(lines)
    alone = f"one budget: {fmean(left):.0f} % of the parameters left"
    caption = CAPTION + (GREY if len(groups) > 1 else "")
    with style.parts(len(groups), len(panels), inches) as (made, parts):
        for (part, axes), group in zip(parts, groups, strict=True):
            for axis, (stage, title) in zip(axes, panels, strict=True):
                _panel(axis, lines, group, stage, title)
            axes[-1].set_xlabel(alone if _alone(left) else "parameters left (%)")
            handles = axes[0].get_legend_handles_labels()
            part.legend(*handles, loc="outside lower center", ncols=2, frameon=False, title=caption, title_fontsize=6)
        _level([axes for _, axes in parts])
        return style.save(made, out_dir / f"{spec.name}-accuracy_vs_params")


def _groups(methods: list[str]) -> list[list[str]]:
    """The methods in the order of the spec, in parts of nearly equal size with a colour each."""
    count = -(-len(methods) // len(style.PALETTE))
    bounds = [round(len(methods) * part / count) for part in range(count + 1)]
    return [methods[start:end] for start, end in pairwise(bounds)]


def _level(parts: list) -> None:
    """Gives panels of one stage the same scale in all parts."""
    for panels in zip(*parts, strict=True):
        limits = [limit for axis in panels for limit in axis.get_ylim()]
        for axis in panels:
            axis.set_ylim(min(limits), max(limits))


def _lines(spec, runs) -> dict[str, list]:
    """Method -> the runs of each of its points; a case NAME@50 is a point of the method NAME."""
    lines: dict[str, list] = {}
    for name in spec.cases:
        if runs.get(name) and spec.cases[name].reference is None:  # rankings have figures of their own
            lines.setdefault(name.split("@")[0], []).append(runs[name])
    return lines


def _panel(axis, lines, group: list[str], stage: str, title: str) -> None:
    _dense(axis, lines)
    left = _lefts(lines)
    step = 0.7 if _alone(left) else 0.014 * (max(left) - min(left))
    for method, points in lines.items():
        if method not in group:
            _grey(axis, sorted(points, key=_left), stage)
    for number, method in enumerate(group):
        shift = step * (number - (len(group) - 1) / 2)
        _line(axis, method, sorted(lines[method], key=_left), stage, shift, number)
    axis.set_title(title, loc="left")
    axis.set_ylabel("test accuracy (%)")
    if _alone(left):  # then the axis says nothing, and the marks stand side by side
        axis.set_xlim(fmean(left) - 5, fmean(left) + 5)
        axis.set_xticks([])


def _grey(axis, points: list, stage: str) -> None:
    means = [fmean(run.metrics[stage]["accuracy"] for run in point) for point in points]
    mark = "" if len(points) > 1 else "_"  # a line of one point would not be seen
    axis.plot([_left(point) for point in points], means, color="#cccccc", linewidth=0.8, marker=mark, zorder=1)


def _line(axis, method: str, points: list, stage: str, shift: float, number: int) -> None:
    accuracy = [[run.metrics[stage]["accuracy"] for run in point] for point in points]
    means = [fmean(each) for each in accuracy]
    down = [max(mean - min(each), 0.0) for mean, each in zip(means, accuracy, strict=True)]
    up = [max(max(each) - mean, 0.0) for mean, each in zip(means, accuracy, strict=True)]
    colour, mark = (wheel[number % len(wheel)] for wheel in (style.PALETTE, style.MARKERS))
    x = [_left(point) + shift for point in points]
    axis.errorbar(x, means, yerr=[down, up], label=method, color=colour, marker=mark, capsize=2, elinewidth=0.8)


def _dense(axis, lines) -> None:
    dense = fmean(run.metrics["dense"]["accuracy"] for points in lines.values() for point in points for run in point)
    axis.axhline(dense, color="#555555", linestyle="--", linewidth=0.8, label=f"dense, {dense:.2f} %")


def _left(point: list) -> float:
    return fmean(100 * run.cost["pruned"]["params"] / run.cost["dense"]["params"] for run in point)


def _lefts(lines) -> list[float]:
    return [_left(point) for points in lines.values() for point in points]


def _alone(left: list[float]) -> bool:
    return max(left) - min(left) < 10
