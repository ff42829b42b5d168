"""Attention heads: the metric against the heads left, which heads stay, and how methods rank them beside ablation."""

from pathlib import Path
from statistics import fmean

from hap.harness.fates import head_size, heads
from hap.harness.tables import METRICS
from paper_figs import style

PANELS = (("one_shot", "one-shot"), ("selected", "after fine-tuning"))
CAPTION = f"{style.INTERVALS}\nMethods are set apart sideways for legibility."


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figures of a spec that prunes heads, from its records, runs: case -> list of Run; nothing for others."""
    found = {name: runs[name] for name, case in spec.cases.items() if case.prune == "heads" and runs.get(name)}
    if not found:
        return []
    files, several = [], {method: points for method, points in _lines(found).items() if len(points) > 1}
    if several:
        tuned = any(case.finetune is not None for case in spec.cases.values())
        panels = PANELS if tuned else PANELS[:1]
        with style.figure(len(panels), 0.9 + 1.9 * len(panels) + 0.1 * len(several)) as (made, axes):
            for axis, (stage, title) in zip(axes, panels, strict=True):
                _panel(axis, several, stage, spec.metric)
                axis.set_title(title, loc="left")
                axis.set_ylabel(f"{METRICS[spec.metric].split(' ')[0]} (%)")
            axes[-1].set_xlabel("heads left (%)")
            style.legend(made, axes[0], CAPTION)
            files += style.save(made, out_dir / f"{spec.name}-heads")
    if maps := _maps(spec, found):
        files += _heat(maps, out_dir / f"{spec.name}-heads-kept")
    if ranked := _ranked(spec, found):
        files += _ranking(ranked, out_dir / f"{spec.name}-heads-ranking")
    return files


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


def _maps(spec, found) -> dict[str, list[list[float]]]:
    """Method -> layer by head, the share of seeds in which the head stays, at the budget that most methods have."""
    budgets = [spec.cases[name].budget.target for name in found]
    target = max(sorted(set(budgets)), key=lambda each: (budgets.count(each), -abs(each - 0.6)))
    shown = {name.split("@")[0]: runs for name, runs in found.items() if spec.cases[name].budget.target == target}
    plans = {method: [run.plan["rows"] for run in runs] for method, runs in shown.items()}
    size = head_size([plan for each in plans.values() for plan in each])
    return {method: heads(each, size) for method, each in plans.items()} if size else {}


def _heat(maps, stem: Path) -> list[Path]:
    layers = len(next(iter(maps.values())))
    with style.figure(len(maps), 0.5 + (0.45 + 0.11 * layers) * len(maps)) as (made, axes):
        for axis, (method, shares) in zip(axes, maps.items(), strict=True):
            image = axis.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
            axis.set_title(method, loc="left", fontsize=7, pad=3)
            axis.set_yticks(
                range(layers), labels=[str(i + 1) if layers < 9 or i % 3 == 0 else "" for i in range(layers)]
            )
            axis.set_xticks([])
            axis.grid(visible=False)
        axes[len(axes) // 2].set_ylabel("layer")
        axes[-1].set_xlabel("head")
        bar = made.colorbar(image, ax=axes, shrink=0.5, aspect=30)
        bar.set_label("share of seeds that keep it\n(an implant is half)", fontsize=6)
        return style.save(made, stem)


def _ranked(spec, found) -> dict[str, list[float]]:
    """Method -> rank correlation with the reference, a number a seed; cases of one score have the same."""
    values, known = {}, []
    for name, runs in found.items():
        score = spec.cases[name].score
        if score not in known and all("spearman" in run.metrics.get("ranking", {}) for run in runs):
            known.append(score)
            values[name.split("@")[0]] = [run.metrics["ranking"]["spearman"] for run in runs]
    return values


def _ranking(ranked, stem: Path) -> list[Path]:
    with style.figure(1, 0.8 + 0.22 * len(ranked)) as (made, axes):
        for place, values in enumerate(ranked.values()):
            mean, bar = style.interval(values)
            axes[0].errorbar(mean, -place, xerr=bar, color=style.PALETTE[0], marker="o", capsize=2, elinewidth=0.8)
        axes[0].set_yticks([-place for place in range(len(ranked))], labels=list(ranked))
        axes[0].set_xlabel("rank correlation with ablation;\nmean and 95 % interval over seeds")
        axes[0].axvline(0, color=style.GREY, linestyle=":", linewidth=0.8)
        return style.save(made, stem)
