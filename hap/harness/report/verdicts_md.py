"""The verdicts of all specs -> results/VERDICTS.md, for reading on a forge."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hap.harness.processes.files import atomic_write
from hap.harness.records.record import Run
from hap.harness.report.markup import markdown, plain, slug
from hap.harness.spec.spec import Spec
from hap.harness.verdicts.judge import Outcome, Verdict, describe

INTRODUCTION = """\
Judged from the records in this folder, and from nothing else. `nox -s judge` judges them again, in seconds;
`nox -s reproduce -- NAME` makes the records of a spec; `nox -s figures` writes this file and [index.html](index.html),
which has the same verdicts with plots.

STALE: when this file was written, code or data that decide the numbers had changed since the commits that each section
names. What such evidence says is told in the remark, and counts for nothing until it is made again.

Bounds are over seeds, or "over seeds and N images" where the claim is about new images too. Where they name a "test set
of N", the records do not say which images were right, and its error is a bound from counts, on the safe side."""


@dataclass(frozen=True)
class Entry:
    """What is known of a spec: its records and verdicts, or why it could not be judged."""

    name: str
    spec: Spec | None = None
    runs: dict[str, list[Run]] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    mistake: str = ""

    @property
    def title(self) -> str:
        """The title of the spec, as far as it reads."""
        return self.spec.title if self.spec else self.name


def summary(entries: Sequence[Entry], results: Path) -> Path:
    """Writes results/VERDICTS.md: how many claims hold of each spec, then each claim; a spec that does not read too."""
    parts = ["# Verdicts", INTRODUCTION, _counts(entries), *map(_section, entries)]
    file = results / "VERDICTS.md"
    atomic_write(file, ("\n\n".join(parts) + "\n").encode())
    return file


def outcomes(entries: Sequence[Entry]) -> list[str]:
    """The outcomes that there are or may be, in the order of the judge."""
    found = [str(verdict.outcome) for entry in entries for verdict in entry.verdicts]
    return list(dict.fromkeys([*map(str, Outcome), *found]))


def commits(entry: Entry) -> str:
    """Which commits made the records, the latest record's first, with their number; nothing without records."""
    runs = sorted((run for each in entry.runs.values() for run in each), key=lambda run: run.created, reverse=True)
    made = Counter(map(commit, runs))
    return ", ".join(f"{count} at {place}" for place, count in made.items())


def commit(run: Run) -> str:
    """That of a record, in short, and whether there were changes on top of it."""
    return str(run.code.get("commit") or "unknown")[:10] + (" with changes" if run.code.get("dirty") else "")


def observed(verdict: Verdict) -> str:
    """What was observed, with its bounds; a dash where nothing was."""
    if verdict.observed is None:
        return "-"
    return f"{verdict.observed:.4g}{verdict.bounds}"


def seeds(verdict: Verdict) -> int:
    """The number of seeds behind what was observed."""
    return len(verdict.seeds) if verdict.observed is not None else 0


def remark(verdict: Verdict) -> str:
    """Why a verdict is no clearer, and what is known of it."""
    known = f"known: {verdict.claim.known}" if verdict.claim.known else ""
    stale = f"the evidence says {verdict.says}" if verdict.outcome is Outcome.STALE else ""
    return "; ".join(part for part in (stale, verdict.reason, known) if part)


def _counts(entries: Sequence[Entry]) -> str:
    names, total, rows = outcomes(entries), Counter[str](), []
    for entry in entries:
        found = Counter(str(verdict.outcome) for verdict in entry.verdicts)
        total += found
        rows.append([f"[{entry.title}](#{slug(entry.title)})", *(str(found[name] or "") for name in names)])
    return markdown(["spec", *names], [*rows, ["all", *(f"**{total[name]}**" for name in names)]])


def _section(entry: Entry) -> str:
    if entry.spec is None:
        return f"## {plain(entry.title)}\n\nNot judged. {plain(entry.mistake)}"
    head = ["", "verdict", "claim", "claimed", "observed", "seeds", "remark"]
    table = markdown(head, ([str(number), *_cells(each)] for number, each in enumerate(entry.verdicts, start=1)))
    made = f" Records: {told}." if (told := commits(entry)) else ""
    stands = f" A stand-in for {plain(entry.spec.stand_in)}: it shows nothing of that." if entry.spec.stand_in else ""
    about = f"Spec `{entry.name}`, {plain(entry.spec.paper)}.{stands}{made}"
    parts = [f"## {plain(entry.title)}", about, table, _sources(entry.verdicts)]
    return "\n\n".join(part for part in parts if part)


def _cells(verdict: Verdict) -> list[str]:
    told = [verdict.claim.text, describe(verdict.claim), observed(verdict)]
    stands = " (stand-in)" if verdict.stand_in else ""
    return [f"**{verdict.outcome}**{stands}", *told, str(seeds(verdict)), remark(verdict)]


def _sources(verdicts: Sequence[Verdict]) -> str:
    """A line a source, with the numbers of its claims."""
    claims: dict[str, list[int]] = {}
    for number, verdict in enumerate(verdicts, start=1):
        claims.setdefault(verdict.claim.source, []).append(number)
    return "\n".join(f"- {_numbers(numbers)}: {plain(source)}" for source, numbers in claims.items())


def _numbers(numbers: list[int]) -> str:
    """`Claims 1, 3-5`: what stands next to each other is drawn together."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    told = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
    return f"Source of claim{'s' * (len(numbers) > 1)} {told}"
