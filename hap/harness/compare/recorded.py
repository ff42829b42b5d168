"""Recorded comparisons checked against themselves and their specs: results/compare -> what is wrong where.

What `hap compare --record` wrote must follow from the runs that lie in it. The other side's numbers are taken as they
are: with --rerun they are of runs that no file has.
"""

import json
import math
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from hap import HapError
from hap.harness.compare import conclusions as comparison
from hap.harness.compare.differences import Difference, Pairs, values
from hap.harness.compare.rivals import ROLES, SCHEMA, Rival
from hap.harness.records import checks as integrity
from hap.harness.records.checks import BROKEN, NEAR
from hap.harness.records.record import Run
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Spec
from hap.harness.verdicts.statistics import Interval

KINDS = (".json", ".md")
Wrong = Iterator[tuple[Path, str, object]]  # the file, the rule, what was found


def comparisons(results: Path, specs: Mapping[str, Spec]) -> Wrong:
    """What is wrong with the files of results/compare."""
    for file in sorted(each for each in (results / "compare").rglob("*") if not each.is_dir()):
        twin = file.with_name(f"{file.stem}{KINDS[file.suffix == KINDS[0]]}")
        if file.suffix not in KINDS or file.parent.parent != results / "compare":
            yield file, "a comparison must be <spec>/<function>-<key>.json and .md", file.name
        elif not twin.is_file():
            yield file, f"{twin.name} must lie beside it", "none"
        elif file.suffix == ".json":
            yield from _comparison(file, twin, specs)


def _comparison(file: Path, page: Path, specs: Mapping[str, Spec]) -> Wrong:
    """What is wrong with one; one that is damaged hides no other."""
    if (spec := specs.get(file.parent.name)) is None:
        yield file, "a comparison must be of a spec", file.parent.name
        return
    try:
        table = json.loads(file.read_text("utf-8"))
        pairs, found, wrong = _read(table, file.stem, spec)
        yield from ((file, *each) for each in wrong)
        for difference in found:
            yield from ((file, *each) for each in _means(spec, pairs, difference))
        text = comparison.told(spec, table["function"]["use"], pairs, found)
        yield from ((page, *each) for each in _page(page.read_text("utf-8"), text))
    except (HapError, *BROKEN, OSError) as error:
        yield file, "a comparison must be whole", f"{type(error).__name__}: {error}"


def _read(table: Any, stem: str, spec: Spec) -> tuple[list[Pairs], list[Difference], list[tuple[str, object]]]:
    """The runs of the rival, paired with themselves, the differences, and what is wrong with them."""
    wrong: list[tuple[str, object]] = [("numbers must be finite", where) for where in _infinite("", table)]
    for name, value in (("schema", SCHEMA), ("spec", spec.name)):
        if table[name] != value:
            wrong.append((f"{name} must be {value}", table[name]))
    if table["role"] not in ROLES:
        wrong.append((f"role must be one of {', '.join(ROLES)}", table["role"]))
    rival = Rival(table["role"], Ref.model_validate(table["function"]), table["sources"])
    found = [_difference(each) for each in table["differences"]]
    runs = [TypeAdapter(Run).validate_python(each) for each in table["runs"]]
    pairs = []
    for case in (spec.cases[name] for name in dict.fromkeys(each.case for each in found)):
        own = rival.inside(case)
        mine = [run for run in runs if run.key == own.key and run.case == own.name]
        wrong += [
            (f"{run.case} seed {run.seed}: {rule}", told)
            for run in mine
            for rule, told in integrity.record(run, own, spec.metric)
        ]
        wrong += [(f"{run.case} seed {run.seed}: {rule}", told) for run, rule, told in integrity.copied(mine)]
        seeds = [[run.seed for run in mine], [seed for name, _, seed, _ in table["against"] if name == case.name]]
        if seeds[0] != seeds[1] or not mine:
            wrong.append((f"runs must be of {own.name}-{own.key}, with the seeds {seeds[1]} of {case.name}", seeds[0]))
        pairs.append(Pairs(case, mine, mine, {}))
    if (count := sum(len(each.mine) for each in pairs)) != len(runs):
        wrong.append(
            ("each of its runs must be in the place of a case of the spec as it is now", f"{count} of {len(runs)}")
        )
    keys = "".join(rival.inside(each.case).key for each in pairs)
    if stem != (wanted := f"{rival.name}-{sha256(keys.encode()).hexdigest()[:10]}"):
        wrong.append((f"its name must be {wanted}", stem))
    return pairs, found, wrong


def _difference(table: dict[str, Any]) -> Difference:
    bounds = table["interval"]
    return Difference(**{**table, "interval": bounds and Interval(**bounds)})


def _means(spec: Spec, pairs: list[Pairs], found: Difference) -> Iterator[tuple[str, object]]:
    where = f"{found.case} {found.stage}"
    mine = fmean(next(values(each.mine, spec.metric, found.stage) for each in pairs if each.case.name == found.case))
    if abs(found.mine - mine) > NEAR * max(1.0, abs(mine)):
        yield f"{where}: mine must be the mean of its runs, {mine:.6g}", found.mine
    if abs(found.mean - (found.mine - found.theirs)) > NEAR * max(1.0, abs(mine)):
        yield f"{where}: mean must be {found.mine:.6g} - {found.theirs:.6g}", found.mean


def _page(text: str, wanted: str) -> Iterator[tuple[str, object]]:
    """What of a page does not follow from its JSON: all that does not tell of the runs of the other side."""
    old, new = text.split("\n\n"), wanted.split("\n\n")
    for place, what in ((0, "head"), (1, "table of differences"), (3, "conclusion"), (-1, "last sentence")):
        if len(old) < 4 or old[place] != new[place]:
            yield f"the {what} must be what its JSON gives", f"{old[place] if len(old) >= 4 else text:.120}"
    if len(old) >= 4 and _left(old[2]) != _left(new[2]):
        yield "the costs must be what its JSON gives", f"{old[2]:.120}"


def _left(table: str) -> list[list[str]]:
    """The cells of a table as far as they tell of one's own runs."""
    lines = [line for line in table.splitlines() if set(line) - set("|-")]
    return [[cell.partition(" / ")[0].strip() for cell in line.split("|")] for line in lines]


def _infinite(where: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value, start=1):
            yield from _infinite(f"{where}.{name}".lstrip("."), part)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} {value}"
