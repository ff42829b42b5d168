"""Which seeds a command is about, and what claims can be expected to show with how many."""

from pathlib import Path
from typing import TYPE_CHECKING

from hap import HapError
from hap.harness.cli.terminal import Names, Results, paths, results_of, say

if TYPE_CHECKING:
    from hap.harness.spec.spec import Spec
    from hap.harness.verdicts.power import Power

HEAD = "claim   seeds   power   alone   hours    80 %   hours  what it is about"


def seeds_of(text: str | None, spec: "Spec") -> list[int] | None:
    """The seeds of `0,2,5-7`, which must be of the spec; None where none are given."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise HapError(f"--seeds: numbers as in 0,2,5-7 expected, found {text!r}")
        found += range(int(first), int(last or first) + 1)
    if strangers := sorted(set(found) - set(spec.seeds)):
        known = f"{spec.seeds[0]} to {spec.seeds[-1]}" if len(spec.seeds) > 1 else str(spec.seeds[0])
        raise HapError(f"--seeds: must be of the seeds of {spec.name}, {known}, found {strangers[0]}")
    return list(dict.fromkeys(found))


def power(specs: Names = None, results: Results = None) -> None:
    """Tell, for each claim, the power with its seeds, the seeds for 80 %, and the hours: before anything is spent."""
    if not specs:
        raise HapError(f"name a spec: {', '.join(path.stem for path in paths(['all']))} or all")
    for path in paths(specs):
        _power(path, results_of(path, results))


def _power(path: Path, results: Path) -> None:
    from hap.harness.records import store
    from hap.harness.records.freshness import aged
    from hap.harness.spec.spec import load_spec
    from hap.harness.verdicts.power import WANTED, powers

    spec = load_spec(path, bind=False)
    runs = store.evidence(spec, results)
    found = powers(spec, runs, aged([run for each in runs.values() for run in each]))
    say(f"{spec.title} ({spec.name})")
    say(HEAD)
    numbers = {id(claim): number for number, claim in enumerate(spec.claims, start=1)}
    for each in found:
        say(_line(numbers[id(each.claim)], each))
    least = sum(each.power >= WANTED for each in found)
    say(
        f"{least} of {len(spec.claims)} claims have a power of {WANTED:.0%} or more with their seeds; power is that in "
        "the family, by the first step of Holm's procedure, and so the least; hours are those of all cases of a claim"
    )


def _line(number: int, found: "Power") -> str:
    from hap.harness.verdicts.judge import describe

    cells = [str(found.seeds), f"{found.power:.2f}", f"{found.alone:.2f}", _hours(found.hours)]
    cells += ["none" if found.enough is None else str(found.enough), _hours(found.enough_hours)]
    what = f"{describe(found.claim)}, effect {found.claim.effect:g} (spread of {found.source})"
    return f"{number:5}{''.join(f'{cell:>8}' for cell in cells)}  {what}"


def _hours(hours: float | None) -> str:
    return "?" if hours is None else f"{hours:.2g}"
