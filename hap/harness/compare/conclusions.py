"""Differences -> what is told of a comparison: tables in Markdown, and sentences that say what can be concluded."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from hap.harness.compare.differences import ALPHA, Difference, Pairs
from hap.harness.records.record import Run
from hap.harness.spec.spec import Case, Spec
from hap.harness.verdicts.statistics import FEWEST

WHEN = {"one_shot": "before fine-tuning", "selected": "after fine-tuning"}
PLACE = ("torch", "device", "cpu", "threads")  # of an environment: what moves numbers and times
PARTS = ("params", "macs")


def told(spec: Spec, name: str, pairs: Sequence[Pairs], found: Sequence[Difference]) -> str:
    """All of it, as Markdown."""
    theirs = pairs[0].case.name.partition("@")[0]
    head = f"{name} in the place of {theirs}, {spec.name}: test {spec.metric} in points, mean over seeds paired by seed"
    parts = [head, quality(pairs, found, theirs), cost(pairs, theirs), *sentences(spec, pairs, found, theirs)]
    return "\n\n".join(parts) + "\n"


def quality(pairs: Sequence[Pairs], found: Sequence[Difference], theirs: str) -> str:
    """A row a budget and stage: both methods, the difference with its interval, and the rank among all."""
    seeds = {each.case.name: len(each.mine) for each in pairs}
    level = f"{100 * (1 - ALPHA):g} % interval"
    head = ["case", "stage", "seeds", "yours", theirs, "difference", level, "p (Holm)", "rank"]
    rows = [
        [
            each.case,
            WHEN[each.stage],
            str(seeds[each.case]),
            f"{each.mine:.2f}",
            f"{each.theirs:.2f}",
            f"{each.mean:+.2f}",
            "no spread seen" if each.interval is None else f"{each.interval.low:+.2f} to {each.interval.high:+.2f}",
            f"{each.p:.2g}",
            "budget missed" if each.short else f"{each.rank} of {each.ranked}",
        ]
        for each in found
    ]
    return _table(head, rows)


def cost(pairs: Sequence[Pairs], theirs: str) -> str:
    """A row a budget: what is pruned, the time of the score and of a forward pass, yours / theirs."""
    head = ["case", "params pruned (%)", "MACs pruned (%)", "score (s)", "latency (ms)"]
    return _table([head[0], *(f"{each}, yours / {theirs}" for each in head[1:])], map(_costs, pairs))


def sentences(spec: Spec, pairs: Sequence[Pairs], found: Sequence[Difference], theirs: str) -> Iterator[str]:
    """What can be concluded, and what cannot."""
    yield _concluded(found, theirs)
    if missed := [each.case for each in pairs if _short(each.case, found)]:
        yield _missed(missed)
    yield _chance(pairs, found)
    yield _place(pairs, theirs)
    if spread := _unpaired(pairs):
        yield spread
    if any(not run.data["official"] for each in pairs for run in each.mine):
        yield "The data are an unofficial copy, and so were those of the committed evidence."
    yield (
        "Ranks are of means and are not tested. All of this holds for this network, these data, budgets and this "
        "fine-tuning, and says nothing of others; the test set is the one that the committed methods were tested on."
    )


def _concluded(found: Sequence[Difference], theirs: str) -> str:
    parts = []
    for verdict in ("better", "worse"):
        chosen = [each for each in found if each.verdict == verdict]
        if chosen:
            places = "; ".join(f"{WHEN[each.stage]} in {each.case} by {abs(each.mean):.2f}" for each in chosen)
            parts.append(f"Your method is {verdict} than {theirs} {places}.")
    still = sum(each.verdict == "open" for each in found)
    if still == len(found):
        why = "" if any(each.short for each in found) else f": no difference from {theirs} is told from chance"
        parts.append(f"Nothing can be concluded{why}.")
    elif still:
        parts.append(f"Of the other {still} of {len(found)} differences nothing can be concluded, equality neither.")
    return " ".join(parts)


def _short(case: Case, found: Sequence[Difference]) -> bool:
    return any(each.short for each in found if each.case == case.name)


def _missed(cases: Sequence[Case]) -> str:
    asked = ", ".join(f"{case.budget.target:g} of the {case.budget.unit} in {case.name}" for case in cases)
    return f"Your method prunes less than the budget asks ({asked}): budgets differ, so nothing can be concluded there."


def _chance(pairs: Sequence[Pairs], found: Sequence[Difference]) -> str:
    seeds = min(len(each.mine) for each in pairs)
    if seeds < 2:
        return "One seed has no spread: nothing can be said of chance."
    family = f"p-values are corrected for all {len(found)} differences (Holm), intervals stand alone"
    kinds = {each.interval.kind for each in found if each.interval is not None}
    bounds = (
        "the wider of the bootstrap's (BCa) and Student's"
        if "BCa" in kinds
        else f"Student's, for the bootstrap needs {FEWEST} seeds"
    )
    more = "" if seeds >= FEWEST else "; so few seeds find large differences only"
    return f"Intervals over {seeds} seeds are {bounds}, and hold the error of the finite test set; {family}{more}."


def _place(pairs: Sequence[Pairs], theirs: str) -> str:
    different = {}
    for each in pairs:
        for mine, other in zip(each.mine, each.theirs, strict=True):
            for part in PLACE:
                here, there = mine.environment.get(part), other.environment.get(part)
                if here != there:
                    different[part] = f"{part} {here} here, {there} there"
    runs = [(mine, other) for each in pairs for mine, other in zip(each.mine, each.theirs, strict=True)]
    states = {_state(other) for mine, other in runs if mine.code["sha256"] != other.code["sha256"]}
    old = f" They are of another state of the code, {', '.join(sorted(states))}." if states else ""
    if not different:
        return (
            f"Both ran with the same torch, device and threads; the times of {theirs} are those of its records, of "
            f"another day at least, and on a busy machine a time is no measure.{old}"
        )
    return (
        f"The records of {theirs} were made elsewhere ({'; '.join(different.values())}): a part of each difference may "
        f"be of the machine, and times cannot be compared.{old} --rerun runs HAP's cases here too."
    )


def _state(run: Run) -> str:
    return f"commit {run.code['commit'][:10]}" if run.code["commit"] else "without a commit"


def _unpaired(pairs: Sequence[Pairs]) -> str | None:
    """Whether the dense networks of a pair are not the same, and so share no more than a seed."""
    both = [(mine, other) for each in pairs for mine, other in zip(each.mine, each.theirs, strict=True)]
    seeds = sorted({mine.seed for mine, other in both if mine.metrics["dense"] != other.metrics["dense"]})
    if not seeds:
        return None
    return (
        f"The dense networks that were pruned are not the same for seed {', '.join(map(str, seeds))}: pairs share less."
    )


def _costs(pairs: Pairs) -> list[str]:
    cells = [pairs.case.name]
    for part in PARTS:
        cells.append(
            " / ".join(f"{fmean(_pruned(run, part) for run in runs):.1f}" for runs in (pairs.mine, pairs.theirs))
        )
    cells.append(" / ".join(f"{fmean(map(_seconds, runs)):.2g}" for runs in (pairs.mine, pairs.theirs)))
    cells.append(" / ".join(f"{1e3 * fmean(map(_latency, runs)):.3g}" for runs in (pairs.mine, pairs.theirs)))
    return cells


def _pruned(run: Run, part: str) -> float:
    return float(100 * (1 - run.cost["pruned"][part] / run.cost["dense"][part]))


def _seconds(run: Run) -> float:
    return run.seconds["score" if "score" in run.seconds else "prune"]


def _latency(run: Run) -> float:
    found = run.cost["pruned"]["latency_seconds"]
    return float(found[max(found, key=int)])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is Markdown, and lines up on a terminal."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
