"""Plans of records -> what was pruned where: shares of each layer, and maps of heads; does not know who draws them."""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from hap.harness.records.record import Run
from hap.harness.spec.spec import Spec
from hap.plan import Budget

Rows = dict[str, str]  # module -> a letter a row: # kept, o an implant, - dropped
UNITS = {"params": "parameters", "macs": "MACs", "groups": "groups", "prunable": "prunable parameters"}
WORTH = {"#": 1.0, "o": 0.5, "-": 0.0}


def budgets(spec: Spec) -> dict[str, str]:
    """The budget of each case in words: 70 % of the parameters pruned."""
    return {name: words(case.budget) for name, case in spec.cases.items()}


def words(budget: Budget) -> str:
    """70 % of the parameters pruned, or 50 % of layer1.*.conv1 pruned."""
    if budget.ratios is not None:
        return f"{', '.join(f'{100 * share:g} % of {glob}' for glob, share in budget.ratios.items())} pruned"
    return f"{100 * budget.target:g} % of the {UNITS[budget.unit]} pruned"


def networks(runs: dict[str, list[Run]]) -> list[list[tuple[list[str], list[Rows]]]]:
    """For each network, its panels: the cases that make the same plans, and the plans; without plans, nothing."""
    found: dict[tuple[str, ...], list[tuple[list[str], list[Rows]]]] = {}
    for case, each in runs.items():
        plans = [run.plan["rows"] for run in each if run.plan.get("rows")]
        if not plans:
            continue
        panels = found.setdefault(tuple(plans[0]), [])
        same = next((cases for cases, others in panels if others == plans), None)
        if same is None:
            panels.append(([case], plans))
        else:
            same.append(case)
    return list(found.values())


def share(rows: str, letter: str) -> float:
    """Percent of the rows with this fate."""
    return 100 * rows.count(letter) / len(rows)


def shares(plans: Sequence[Rows], letter: str) -> list[float]:
    """Percent of the rows of each layer with this fate, mean over plans."""
    return [fmean(share(plan[module], letter) for plan in plans) for module in plans[0]]


def whole(plans: Sequence[Rows], letter: str) -> float:
    """Percent of all rows with this fate, mean over plans."""
    return fmean(share("".join(plan.values()), letter) for plan in plans)


def head_size(plans: Sequence[Rows]) -> int:
    """The rows of a head: the greatest common divisor of all runs of one fate; 0 where no layer has heads."""
    lines = [line for plan in plans for line in _layers(plan)]
    return math.gcd(*(len(list(run)) for line in lines for _, run in groupby(line)))


def heads(plans: Sequence[Rows], size: int) -> list[list[float]]:
    """Layer by head, the share of plans in which the head stays; an implant is half."""
    return [
        [fmean(WORTH[line[at]] for line in layer) for at in range(0, len(layer[0]), size)]
        for layer in zip(*map(_layers, plans), strict=True)
    ]


def _layers(plan: Rows) -> list[str]:
    """The rows of one module for each layer of heads: those that are pruned where several modules are pruned alike."""
    parents = [(name.rpartition(".")[0], line) for name, line in plan.items()]
    each = [[line for _, line in group] for _, group in groupby(parents, key=lambda pair: pair[0])]
    return [lines[0] for lines in each if len(lines) > 2 and len(set(lines)) == 1]  # queries, keys and values
