"""Whether claims were grouped anew after their evidence was made: the spec as it was at the commits of its records.

Families decide how a claim is corrected, so who changes them after the evidence was seen can choose what is decided. A
spec that does, must say why (`regrouped`). Claims are the same where what they compare and how is the same; before
families were declared, all comparisons of a spec were one, which is another grouping too. Where git does not have the
commit of a record, or the spec at it, nothing is known.
"""

import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hap.harness.records.record import Run
from hap.harness.spec.spec import Claim, Spec

Same = tuple[Any, ...]  # what a claim compares, and how
NONE = "none declared"


class Moved(NamedTuple):
    """A claim that was of another family when a record was made."""

    number: int
    before: str
    now: str
    commit: str


class Grouping(NamedTuple):
    """What of a spec was grouped anew, and the commits of its records of which nothing is known."""

    moved: list[Moved]
    unknown: list[str]


def regrouped(path: Path, spec: Spec, runs: Iterable[Run]) -> Grouping:
    """The claims of the spec of this file that were of other families when its records were made."""
    commits = sorted({str(run.code["commit"]) for run in runs if run.code.get("commit")})
    moved, unknown = dict[int, Moved](), []
    for commit in commits:
        before = _families(commit, path.absolute())
        if before is None:
            unknown.append(commit)
            continue
        for number, claim in enumerate(spec.claims, start=1):
            was = before.get(_same(claim), claim.family)
            if was != claim.family and not (was == NONE and claim.against is None):
                moved.setdefault(number, Moved(number, was, claim.family, commit))
    return Grouping([moved[number] for number in sorted(moved)], unknown)


def _same(claim: Claim | Mapping[str, Any]) -> Same:
    table = claim.model_dump() if isinstance(claim, Claim) else claim
    names = ("case", "against", "metric", "op", "value")
    return (*(table.get(name) for name in names), table.get("stage", "selected"))


@lru_cache(maxsize=64)  # many records have the same commit
def _families(commit: str, path: Path) -> dict[Same, str] | None:
    """The families of the claims of a spec at a commit; None where git does not have it."""
    if not re.fullmatch("[0-9a-f]{7,64}", commit):  # what a record says is no option of git
        return None
    command = ["git", "-C", str(path.parent), "show", f"{commit}:./{path.name}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
        table = tomllib.loads(done.stdout.decode()) if done.returncode == 0 else {}
        return {_same(claim): claim.get("family", NONE) for claim in table["claims"]}
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, AttributeError):
        return None
