"""Which layers were pruned how far: the share of rows dropped and implanted, layer by layer, a panel a plan."""

from pathlib import Path
from textwrap import wrap

from matplotlib.patches import Patch

from hap.harness.report.plans import networks, shares, whole, words
from paper_figs import style

FATES = (("-", "dropped", style.PALETTE[0]), ("o", "implants", style.PALETTE[4]), ("#", "kept", "#e8e8e8"))
PANEL_INCHES, LINE_INCHES = 0.62, 0.14
LINE_LETTERS = 27  # of a title, beside its numbers


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """A figure for each network in the records of a spec; nothing where no record has a plan of rows."""
    budget, methods = _at_one_budget(spec, runs)
    figures = networks(methods)
    files = []
    for number, panels in enumerate(figures, start=1):
        titles = [_wrapped(methods) for methods, _ in panels]
        lines = sum(title.count("\n") for title in titles)
        with style.figure(len(panels), 0.9 + PANEL_INCHES * len(panels) + LINE_INCHES * lines) as (made, axes):
            for axis, title, (_, plans) in zip(axes, titles, panels, strict=True):
                _panel(axis, title, plans)
            _stages(axes, list(panels[0][1][0]))
            axes[len(axes) // 2].set_ylabel("rows of a layer (%)")
            _legend(made, budget, panels)
            name = f"{spec.name}-layers" + (f"-{number}" if len(figures) > 1 else "")
            files += style.save(made, out_dir / name)
    return files


def _wrapped(methods: list[str]) -> str:
    lines = wrap(", ".join(methods), LINE_LETTERS, break_on_hyphens=False, break_long_words=False)
    return "\n".join([*lines, ""] if len(lines[-1]) > LINE_LETTERS else lines)  # then the numbers stand below


def _at_one_budget(spec, runs) -> tuple[str, dict[str, list]]:
    """The budget that most methods have, the middle one of several, in words; method -> its runs there."""
    cases = {name: case for name, case in spec.cases.items() if case.reference is None}  # as in accuracy_vs_params
    found = {name: [run for run in runs.get(name, []) if run.plan.get("rows")] for name in cases}
    budgets = [_size(cases[name].budget) for name, each in found.items() if each]
    if not budgets:
        return "", {}
    most = max(map(budgets.count, budgets))
    shared = sorted({budget for budget in budgets if budgets.count(budget) == most})
    chosen = shared[len(shared) // 2]
    methods = {name: each for name, each in found.items() if each and _size(cases[name].budget) == chosen}
    budget = words(cases[next(iter(methods))].budget)
    return budget, {name.split("@")[0]: each for name, each in methods.items()}


def _size(budget) -> tuple[str, float]:
    return budget.unit, budget.target


def _panel(axis, title: str, plans: list[dict[str, str]]) -> None:
    floor, told = [0.0] * len(plans[0]), []
    for letter, name, colour in FATES:
        heights = shares(plans, letter)
        axis.bar(range(len(floor)), heights, bottom=floor, width=0.84, color=colour, linewidth=0, label=name)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
        if any(heights) and letter != "#":
            told.append(f"{whole(plans, letter):.0f} % {name}")
    axis.set_title(title, loc="left", fontsize=6.5, pad=3)
    axis.set_title(", ".join(told), loc="right", fontsize=6, pad=3, color=style.GREY)
    axis.set_ylim(0, 100)
    axis.set_yticks([0, 50, 100])
    axis.grid(visible=False)


def _stages(axes, modules: list[str]) -> None:
    """Lines between the stages of the network, by the first part of the names; a name where there is room."""
    stages = [module.partition(".")[0] for module in modules]
    starts = [place for place, stage in enumerate(stages) if place == 0 or stages[place - 1] != stage]
    ends = [*starts[1:], len(stages)]
    for axis in axes:
        axis.tick_params(axis="x", length=0)
        axis.set_xlim(-0.5, len(stages) - 0.5)
        for start in starts[1:]:
            axis.axvline(start - 0.5, color=style.GREY, linestyle=":", linewidth=0.8)
    centres, names = [], []
    for start, end in zip(starts, ends, strict=True):
        centre = (start + end - 1) / 2
        if not centres or centre - centres[-1] >= 0.12 * len(stages):
            centres, names = [*centres, centre], [*names, stages[start]]
    axes[-1].set_xticks(centres, labels=names)
    axes[-1].set_xlabel("layers, from the input to the output")


def _legend(made, budget: str, panels) -> None:
    letters = "".join(rows for _, plans in panels for plan in plans for rows in plan.values())
    handles = [Patch(color=colour, label=name) for letter, name, colour in FATES if letter in letters]
    caption = f"{budget[0].upper()}{budget[1:]}; mean over seeds."
    if any(len(methods) > 1 for methods, _ in panels):
        caption += "\nMethods that make the same plan share a panel."
    made.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, title=caption, title_fontsize=6)
