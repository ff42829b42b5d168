"""How methods rank attention heads, beside what their ablation measures."""

from pathlib import Path

from paper_figs import style


def draw(spec, runs, out_dir: Path) -> list[Path]:
    """The figure of a spec that prunes heads, from its records, runs: case -> list of Run; nothing for others."""
    found = {name: runs[name] for name, case in spec.cases.items() if case.prune == "heads" and runs.get(name)}
    ranked = _ranked(spec, found)
    return _ranking(ranked, out_dir / f"{spec.name}-heads-ranking") if ranked else []


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
            ends = [[min(bar, 1 + mean)], [min(bar, 1 - mean)]]  # no correlation lies beyond
            axes[0].errorbar(mean, -place, xerr=ends, color=style.PALETTE[0], marker="o", capsize=2, elinewidth=0.8)
        axes[0].set_yticks([-place for place in range(len(ranked))], labels=list(ranked))
        axes[0].set_xlabel("rank correlation with ablation;\nmean and 95 % interval over seeds")
        axes[0].axvline(0, color=style.GREY, linestyle=":", linewidth=0.8)
        return style.save(made, stem)
