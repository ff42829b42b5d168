"""A comparison, its runs and the verdicts on its claims -> its page in Markdown: tables, and what can be concluded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from hap.harness.compare.comparison import CONFIDENCE, WHEN, alike, pairs, stem
from hap.harness.records.record import Run
from hap.harness.spec.spec import Claim, Spec
from hap.harness.supplied import short
from hap.harness.verdicts.judge import Outcome, Verdict
from hap.harness.verdicts.measures import Runs, value
from hap.harness.verdicts.statistics import FEWEST

PLACE = ("torch", "device", "cpu", "threads")  # of an environment: what moves numbers and times
AGE = "The age of the evidence"  # begins the one paragraph that is not of the records alone


@dataclass(frozen=True)
class Difference:
    """A verdict with the runs of both sides and the rank of the first; `short`: it prunes less than its budget asks."""

    verdict: Verdict
    mine: Sequence[Run]
    theirs: Sequence[Run]
    rank: int
    ranked: int
    short: bool

    @property
    def says(self) -> str:
        """What can be concluded: better, worse or open."""
        sure = {Outcome.HOLDS: "better", Outcome.FAILS: "worse"}
        return "open" if self.short or not self.verdict.observed else sure.get(self.verdict.says, "open")


def page(spec: Spec, runs: Runs, verdicts: Sequence[Verdict]) -> str:
    """All of it; only the paragraph that begins with AGE depends on more than the spec and the runs."""
    found = [difference(spec, runs, verdict) for verdict in verdicts]
    theirs = stem(pairs(spec)[0][1])
    head = f"{spec.title}: test {spec.metric} in points, mean over seeds paired by seed"
    tables = [pd.DataFrame([row(each, theirs) for each in found]).drop_duplicates() for row in (_quality, _cost)]
    printed = [str(each.to_markdown(index=False, disable_numparse=True)) for each in tables]
    return "\n\n".join([head, *printed, *sentences(spec, found, theirs)]) + "\n"


def difference(spec: Spec, runs: Runs, verdict: Verdict) -> Difference:
    """A verdict with its runs, ranked among all cases of the spec that prune as much and have runs."""
    case, against = (spec.cases[str(name)] for name in (verdict.claim.case, verdict.claim.against))
    strangers = [mine for mine, _ in pairs(spec)]
    others = [e.name for e in spec.cases.values() if alike(e, against) and e not in strangers and runs.get(e.name)]
    mean = _mean(runs[case.name], verdict.claim)
    ahead = sum(_mean(runs[name], verdict.claim) > mean for name in others)
    missed = any(short(case.budget, run.plan.get("removed", {})) for run in runs[case.name])
    return Difference(verdict, runs[case.name], runs[against.name], 1 + ahead, 1 + len(others), missed)


def sentences(spec: Spec, found: Sequence[Difference], theirs: str) -> Iterator[str]:
    """What can be concluded, and what cannot."""
    if old := dict.fromkeys(f"{e.verdict.age.state}, {e.verdict.age.why}" for e in found if e.verdict.age.why):
        yield f"{AGE}: {'; '.join(old)}. What is stale counts for nothing; --rerun runs HAP's cases here, as they are."
    yield _concluded(found, theirs)
    if missed := dict.fromkeys(str(each.verdict.claim.against) for each in found if each.short):
        budgets = ((spec.cases[name].budget, name) for name in missed)
        asked = ", ".join(f"{budget.target:g} of the {budget.unit} in {name}" for budget, name in budgets)
        yield f"Your method prunes less than the budget asks ({asked}): nothing can be concluded there."
    yield _chance(found)
    both = [pair for each in found for pair in zip(each.mine, each.theirs, strict=True)]
    yield _place(both, theirs)
    if seeds := sorted({mine.seed for mine, other in both if mine.metrics["dense"] != other.metrics["dense"]}):
        seed = ", ".join(map(str, seeds))
        yield f"The dense networks that were pruned are not the same for seed {seed}: pairs share less."
    if any(not mine.data["official"] for mine, _ in both):
        yield "The data are an unofficial copy, and so were those of the committed evidence."
    yield (
        "Ranks are of means and are not tested. All of this holds for this network, these data, budgets and this "
        "fine-tuning, and says nothing of others; the test set is the one that the committed methods were tested on."
    )


def _concluded(found: Sequence[Difference], theirs: str) -> str:
    parts = []
    for says in ("better", "worse"):
        sure = [each.verdict for each in found if each.says == says]
        places = [f"{WHEN[v.claim.stage]} in {v.claim.against} by {abs(v.observed or 0):.2f}" for v in sure]
        parts += [f"Your method is {says} than {theirs} {'; '.join(places)}."] if places else []
    still = sum(each.says == "open" for each in found)
    if still == len(found):
        why = "" if any(each.short for each in found) else f": no difference from {theirs} can be told from chance"
        parts.append(f"Nothing can be concluded{why}.")
    elif still:
        parts.append(f"Of the other {still} of {len(found)} differences nothing can be concluded, equality neither.")
    return " ".join(parts)


def _chance(found: Sequence[Difference]) -> str:
    if (seeds := len(found[0].mine)) < 2:
        return "One seed has no spread: nothing can be said of chance."
    more = "" if seeds >= FEWEST else f"; fewer than {FEWEST} seeds show large differences only"
    bound = ", a bound on the safe side where records do not say which samples were right"
    bounded = bound if any(each.verdict.bounded for each in found) else ""
    return (
        f"Intervals hold the error of the finite test set{bounded}, and stand alone; p-values are one-sided, decide up "
        f"to {1 - CONFIDENCE:.3g}, and are corrected for all differences (Holm){more}."
    )


def _place(both: Sequence[tuple[Run, Run]], theirs: str) -> str:
    places = [(part, *(run.environment.get(part) for run in pair)) for pair in both for part in PLACE]
    if different := [f"{part} {here} here, {there} there" for part, here, there in places if here != there]:
        names = "; ".join(dict.fromkeys(different))
        return (
            f"The records of {theirs} were made elsewhere ({names}): a part of each difference may be "
            "of the machine, and times cannot be compared. --rerun runs HAP's cases here too."
        )
    return (
        f"Both ran with the same torch, device and threads; the times of {theirs} are those of its records, of another "
        "day at least, and on a busy machine a time is no measure."
    )


def _quality(found: Difference, theirs: str) -> dict[str, str]:
    """A row of the first table."""
    verdict = found.verdict
    none = verdict.low is None or verdict.high is None
    return {
        "case": str(verdict.claim.against),
        "stage": WHEN[verdict.claim.stage],
        "seeds": str(len(verdict.seeds)),
        "yours": f"{_mean(found.mine, verdict.claim):.2f}",
        theirs: f"{_mean(found.theirs, verdict.claim):.2f}",
        "difference": f"{verdict.observed:+.2f}",
        f"{100 * (2 * CONFIDENCE - 1):g} % interval": "none" if none else f"{verdict.low:+.2f} to {verdict.high:+.2f}",
        "method": verdict.reason if none else verdict.method,
        "rank": "budget missed" if found.short else f"{found.rank} of {found.ranked}",
    }


def _cost(found: Difference, theirs: str) -> dict[str, str]:
    """A row of the second table: what is pruned, the time of the score and of a forward pass of the largest batch."""

    def both(form: str, number: Callable[[Run], float]) -> str:
        return " / ".join(format(fmean(map(number, runs)), form) for runs in (found.mine, found.theirs))

    def pruned(metric: str) -> Callable[[Run], float]:
        return lambda run: value(run, found.verdict.claim.model_copy(update={"metric": metric}))

    cells = {
        "params pruned (%)": both(".1f", pruned("params_pruned")),
        "MACs pruned (%)": both(".1f", pruned("macs_pruned")),
        "score (s)": both(".2g", lambda run: run.seconds["score" if "score" in run.seconds else "prune"]),
        "latency (ms)": both(".3g", _latency),
    }
    named = {f"{name}, yours / {theirs}": cell for name, cell in cells.items()}
    return {"case": str(found.verdict.claim.against), **named}


def _latency(run: Run) -> float:
    seconds = run.cost["pruned"]["latency_seconds"]
    return 1e3 * float(seconds[max(seconds, key=int)])


def _mean(runs: Sequence[Run], claim: Claim) -> float:
    return fmean(value(run, claim) for run in runs)
