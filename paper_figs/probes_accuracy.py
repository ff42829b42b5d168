"""What probes buy: the accuracy that is left before fine-tuning where more or fewer of them rank."""

from pathlib import Path
from statistics import fmean

from paper_figs import style
from paper_figs.references import found, network, probes


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec whose cases have a reference, from its records; nothing for others, nor for heads."""
    panels = _by_budget(found(spec, runs))
    if not panels:
        return []
    with style.figure(len(panels), 0.9 + 1.9 * len(panels)) as (made, axes):
        for axis, (name, methods) in zip(axes, panels.items(), strict=True):
            for number, (method, points) in enumerate(methods.items()):
                style.line(axis, method, [(x + 0.5 * (number - 1.5), values) for x, values in points], number)
            axis.set_title(f"{name}, one-shot", loc="left")
            axis.set_ylabel("test accuracy (%)")
        axes[-1].set_xlabel("parameters pruned (%)")
        style.legend(made, axes[0], style.INTERVALS)
        return style.save(made, out_dir / f"{spec.name}-accuracy")


def _by_budget(cases) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """Network -> method -> parameters pruned and accuracies, for the methods that have several budgets."""
    panels: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for case, runs in cases:
        method = f"{probes(case)} probes" if probes(case) else "exact"
        if case.score.options.get("block") or case.score.options.get("columns") is not None:
            continue
        pruned = fmean(100 * (1 - run.cost["pruned"]["params"] / run.cost["dense"]["params"]) for run in runs)
        values = [run.metrics["one_shot"]["accuracy"] for run in runs]
        panels.setdefault(network(case), {}).setdefault(method, []).append((pruned, values))
    several = {net: {m: p for m, p in methods.items() if len(p) > 1} for net, methods in panels.items()}
    return {net: methods for net, methods in several.items() if methods}
