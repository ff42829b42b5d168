"""What probes buy: rank correlation and pruned set against the exact score, and the accuracy that the ranking keeps."""

from pathlib import Path
from statistics import fmean

from paper_figs import style

PANELS = (("spearman", "rank correlation with the exact trace"), ("overlap", "overlap of the pruned sets"))


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figures of a spec whose cases have a reference, from its records; nothing for others, nor for heads."""
    cases = [(name, case) for name, case in spec.cases.items() if case.reference is not None and case.prune == "all"]
    found = [(case, runs[name]) for name, case in cases if runs.get(name)]
    files = []
    if lines := _by_probes(found):
        with style.figure(2, 5.5) as (made, axes):
            for axis, (metric, title) in zip(axes, PANELS, strict=True):
                _ranking(axis, lines, metric)
                axis.set_title(title, loc="left")
            axes[0].axhline(0, color=style.GREY, linestyle=":", linewidth=0.8)
            axes[1].set_xlabel("probes, or sweeps of one probe a layer")
            style.decades(axes[1], [x for points in lines.values() for x, _ in points])
            style.legend(made, axes[0], style.INTERVALS, columns=1)
            files += style.save(made, out_dir / f"{spec.name}-ranking")
    if panels := _by_budget(found):
        with style.figure(len(panels), 0.9 + 1.9 * len(panels)) as (made, axes):
            for axis, (network, methods) in zip(axes, panels.items(), strict=True):
                for number, (method, points) in enumerate(methods.items()):
                    style.line(axis, method, [(x + 0.5 * (number - 1.5), values) for x, values in points], number)
                axis.set_title(f"{network}, one-shot", loc="left")
                axis.set_ylabel("test accuracy (%)")
            axes[-1].set_xlabel("parameters pruned (%)")
            style.legend(made, axes[0], style.INTERVALS)
            files += style.save(made, out_dir / f"{spec.name}-accuracy")
    return files


def _by_probes(found) -> dict[str, list[tuple[int, list]]]:
    """Network and kind of probe -> the numbers of probes and the runs of each, at the budget that all have."""
    common = _common([case.budget for case, _ in found if _probes(case)])
    lines: dict[str, list[tuple[int, list]]] = {}
    for case, runs in found:
        if _probes(case) and case.budget == common:
            kind = "one layer at a time" if case.score.options.get("block") else "all layers at once"
            lines.setdefault(f"{_network(case)}, {kind}", []).append((_probes(case), runs))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items() if len(points) > 1}


def _by_budget(found) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """Network -> method -> parameters pruned and accuracies, for the methods that have several budgets."""
    panels: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for case, runs in found:
        method = f"{_probes(case)} probes" if _probes(case) else "exact"
        if case.score.options.get("block") or case.score.options.get("columns") is not None:
            continue
        pruned = fmean(100 * (1 - run.cost["pruned"]["params"] / run.cost["dense"]["params"]) for run in runs)
        values = [run.metrics["one_shot"]["accuracy"] for run in runs]
        panels.setdefault(_network(case), {}).setdefault(method, []).append((pruned, values))
    several = {net: {m: p for m, p in methods.items() if len(p) > 1} for net, methods in panels.items()}
    return {net: methods for net, methods in several.items() if methods}


def _ranking(axis, lines, metric: str) -> None:
    for number, (name, points) in enumerate(lines.items()):
        style.line(axis, name, [(x, [run.metrics["ranking"][metric] for run in runs]) for x, runs in points], number)


def _probes(case) -> int:
    options = case.score.options if case.score else {}
    return options.get("probes", 0) if options.get("curvature") == "hutchinson" else 0


def _common(budgets: list) -> object:
    return max(budgets, key=budgets.count, default=None)


def _network(case) -> str:
    return case.task.use.rpartition(".")[2].partition(":")[0].rpartition("_")[2].replace("resnet", "ResNet-")
