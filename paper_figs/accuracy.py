"""What figures of accuracy share: its panels, with the dense network, what is claimed and what others published."""

from pathlib import Path
from statistics import fmean

from hap.harness.report.tables import METRICS
from paper_figs import style, tradeoff

STAGES = (("one_shot", "one-shot"), ("selected", "after fine-tuning"))
PUBLISHED = "\nStars: published by others, numbered as in the table."
UNKNOWN = "\nAt the right edge: published without a size."
CLAIMED = "\nWide strokes: what is claimed of a method there."


def against(spec, runs, stem: Path, size: str) -> list[Path]:
    """The metric of a spec against a size, one-shot above, after fine-tuning below; nothing without records."""
    lines = tradeoff.methods(spec, runs)
    if not lines:
        return []
    tuned = any(case.finetune is not None for case in spec.cases.values())
    stages = STAGES if tuned else STAGES[:1]
    claims = {stage: _claims(spec, runs, stage, size) for stage, _ in stages}
    panels = [_panel(spec, lines, stage, title, claims[stage], size) for stage, title in stages]
    caption = CLAIMED if any(claims.values()) else ""
    published = [getattr(row, f"{size}_pruned") for row in spec.reported] if tuned else []
    if published:
        caption += PUBLISHED + (UNKNOWN if None in published else "")
    others = tuple(100 - pruned for pruned in published if pruned is not None)
    return tradeoff.against(lines, size, panels, stem, caption, others)


def _panel(spec, lines, stage: str, title: str, claims, size: str) -> tradeoff.Panel:
    def extra(axis) -> None:
        every = [run for points in lines.values() for point in points for run in point]
        dense = fmean(run.metrics["dense"][spec.metric] for run in every)
        axis.axhline(dense, color=style.GREY, linestyle="--", linewidth=0.8, label=f"dense, {dense:.2f} %")
        for x, value in claims:
            axis.plot(x, value, marker="_", markersize=16, markeredgewidth=1.5, color="black", zorder=5)
        if stage == "selected":
            _published(axis, spec.reported, size)

    name = METRICS[spec.metric].split(" ")[0]
    lowest = -100.0 if spec.metric == "matthews" else 0.0
    label = f"test {name} (%)"
    return tradeoff.Panel(title, lambda run: run.metrics[stage][spec.metric], label, extra, (lowest, 100.0))


def _claims(spec, runs, stage: str, size: str) -> list[tuple[float, float]]:
    """Where a claim gives a value of its own, and not a difference, at a point that is drawn."""
    found = [
        (fmean(tradeoff.left(run, size) for run in runs[claim.case]), claim.value)
        for claim in spec.claims
        if runs.get(claim.case) and claim.against is None and (claim.metric, claim.stage) == (spec.metric, stage)
    ]
    return sorted(set(found))


def _published(axis, rows, size: str) -> None:
    for number, row in enumerate(rows, start=1):
        pruned = getattr(row, f"{size}_pruned")
        edge = axis.get_yaxis_transform()  # x in shares of the axis, y as it is
        place = {"x": 100 - pruned} if pruned is not None else {"x": 1.0, "transform": edge}
        x, more = place.pop("x"), place
        axis.plot(
            x, row.accuracy, marker="*", markersize=6, color="black", clip_on=False, linewidth=0, zorder=6, **more
        )
        axis.annotate(
            str(number),
            (x, row.accuracy),
            xycoords=more.get("transform", "data"),
            xytext=(-3, 2),
            textcoords="offset points",
            fontsize=5,
            ha="right",
            annotation_clip=False,
        )
