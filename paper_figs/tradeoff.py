"""What figures of a quantity against the size left share: a line a method, over several panels; draws none itself.

More methods than colours are told apart in parts, each with some in colour and the others in grey behind them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from paper_figs import style

UNITS = {"params": "parameters", "macs": "MACs"}
ALONE = 10.0  # percent between the sizes, below which they count as one
CAPTION = f"{style.INTERVALS}\nMethods are set apart sideways for legibility."
BEHIND = "\nGrey: the means of the methods of the other parts."


@dataclass(frozen=True)
class Panel:
    """A quantity of a run, and what else is drawn with it, once below all lines."""

    title: str
    value: Callable
    label: str
    extra: Callable = field(default=lambda axis: None)
    limits: tuple[float, float] = (0.0, float("inf"))


def methods(spec, runs) -> dict[str, list]:
    """Method -> the runs of each of its points; a case NAME@50 is a point of the method NAME."""
    found: dict[str, list] = {}
    for name, case in spec.cases.items():
        # rankings have figures of their own
        if runs.get(name) and (case.reference is None or case.prune == "heads"):
            found.setdefault(name.split("@")[0], []).append(runs[name])
    return found


def against(
    lines: dict[str, list],
    size: str,
    panels: list[Panel],
    stem: Path,
    caption: str = "",
    others: tuple[float, ...] = (),
) -> list[Path]:
    """The panels under each other, against the share of `size`, params or macs, that is left.

    `others` are the shares, in percent, at which the panels have marks of their own.
    """
    parts = style.groups(list(lines))
    places = [_left(point, size) for points in lines.values() for point in points]
    spread = max(*places, *others) - min(*places, *others)
    text = CAPTION + caption + (BEHIND if len(parts) > 1 else "")
    inches = sum(0.9 + 0.1 * text.count("\n") + 1.6 * len(panels) + 0.15 * ((len(part) + 1) // 2) for part in parts)
    with style.parts(len(parts), len(panels), inches) as (made, drawn):
        for (place, axes), part in zip(drawn, parts, strict=True):
            for axis, panel in zip(axes, panels, strict=True):
                _panel(axis, lines, part, panel, size, 0.7 if spread < ALONE else 0.014 * spread)
                if spread < ALONE:  # then the axis says nothing, and the marks stand side by side
                    axis.set_xlim(fmean(places) - ALONE / 2, fmean(places) + ALONE / 2)
                    axis.set_xticks([])
            alone = f"one budget: {fmean(places):.0f} % of the {UNITS[size]} left"
            axes[-1].set_xlabel(alone if spread < ALONE else f"{UNITS[size]} left (% of {_whole(lines, size)})")
            style.legend(place, axes[0], text)
        _level([axes for _, axes in drawn], panels)
        return style.save(made, stem)


def left(run, size: str) -> float:
    """Percent of the size of the dense network."""
    return 100 * run.cost["pruned"][size] / run.cost["dense"][size]


def _panel(axis, lines, part: list[str], panel: Panel, size: str, step: float) -> None:
    """Lines of the methods of a part, `step` percent beside each other."""
    panel.extra(axis)
    for method, points in lines.items():
        if method not in part:
            _behind(axis, sorted(points, key=lambda point: _left(point, size)), panel, size)
    for number, method in enumerate(part):
        shift = step * (number - (len(part) - 1) / 2)
        values = [(_left(point, size) + shift, [panel.value(run) for run in point]) for point in lines[method]]
        style.line(axis, method, sorted(values), number)
    axis.set_title(panel.title, loc="left")
    axis.set_ylabel(panel.label)


def _behind(axis, points: list, panel: Panel, size: str) -> None:
    means = [fmean(panel.value(run) for run in point) for point in points]
    mark = "" if len(points) > 1 else "_"  # a line of one point would not be seen
    x = [_left(point, size) for point in points]
    axis.plot(x, means, color=style.LIGHT, linewidth=0.8, marker=mark, zorder=1)


def _level(parts: list, panels: list[Panel]) -> None:
    """Gives panels of one quantity the same scale in all parts."""
    for axes, panel in zip(zip(*parts, strict=True), panels, strict=True):
        limits = [limit for axis in axes for limit in axis.get_ylim()]
        for axis in axes:
            axis.set_ylim(min(limits), max(limits))
            style.within(axis, *panel.limits)


def _left(point: list, size: str) -> float:
    return fmean(left(run, size) for run in point)


def _whole(lines, size: str) -> str:
    """The size of the dense network, with its unit."""
    sizes = {run.cost["dense"][size] for points in lines.values() for point in points for run in point}
    if len(sizes) > 1:
        return "the dense network"
    (whole,) = sizes
    return next(
        f"{whole / unit:.3g}{letter}"
        for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1, ""))
        if whole >= unit
    )
