"""Which attention heads stay: a map of layer by head for each method."""

from pathlib import Path

from hap.harness.report.plans import head_size, heads
from paper_figs import style


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec that prunes heads, from its records, runs: case -> list of Run; nothing for others."""
    found = {name: runs[name] for name, case in spec.cases.items() if case.prune == "heads" and runs.get(name)}
    maps = _maps(spec, found) if found else {}
    return _heat(maps, out_dir / f"{spec.name}-heads-kept") if maps else []


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
            many = len(shares[0])
            ticks = [str(i + 1) if many < 7 or i % 3 == 0 else "" for i in range(many)] if axis is axes[-1] else []
            axis.set_xticks(range(len(ticks)), labels=ticks)
            axis.grid(visible=False)
        axes[len(axes) // 2].set_ylabel("layer")
        axes[-1].set_xlabel("head")
        bar = made.colorbar(image, ax=axes, shrink=0.5, aspect=30)
        bar.set_label("share of seeds that keep it\n(an implant is half)", fontsize=6)
        return style.save(made, stem)
