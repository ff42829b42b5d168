"""The pytest plugin: a .toml in a folder `reproductions` becomes check, run and claim items; decides nothing itself.

    pytest reproductions             check each spec, make the evidence that is missing, judge the claims
    pytest reproductions -m claim    judge committed evidence only; --release: what is not decided, or old, fails
    pytest reproductions -m run      make evidence only; --again makes it anew

Other projects enable it by `-p hap.harness.plugin`. It imports nothing heavy before a spec is collected.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hap import HapError

if TYPE_CHECKING:
    from hap.harness.processes.workers import Executor
    from hap.harness.verdicts.judge import Verdict


# what makes records; a plugin of the caller may put another in its place
EXECUTOR: "pytest.StashKey[Executor]" = pytest.StashKey()


class Stop(Exception):  # noqa: N818 - not an error of ours but the one line that a failed claim leaves
    """The one line of an item that fails."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --again, --release and --results."""
    group = parser.getgroup("hap", "reproductions (hap)")
    group.addoption("--release", action="store_true", help="fail claims that are UNDECIDED, ABSENT or STALE")
    group.addoption("--again", action="store_true", help="make evidence anew where it exists")
    group.addoption(
        "--results", type=Path, metavar="DIR", help="where evidence lies (default: results/ beside reproductions/)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Names the markers."""
    config.addinivalue_line("markers", "check: a spec reads and the functions it names exist")
    config.addinivalue_line("markers", "run: makes the evidence of one case and seed; nothing to do where it exists")
    config.addinivalue_line("markers", "claim: judges a claim on the evidence there is, without a run")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process that made records."""
    close = getattr(config.stash.get(EXECUTOR, None), "close", None)
    if close is not None:
        close()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "SpecFile | None":
    """A spec for each .toml directly in a folder `reproductions`."""
    if file_path.suffix == ".toml" and file_path.parent.name == "reproductions":
        return SpecFile.from_parent(parent, path=file_path)
    return None


class SpecFile(pytest.File):
    """The items of one spec."""

    judged: "list[Verdict] | None" = None  # of all claims, for they are a family; gone when a run is made

    def collect(self) -> Iterator[pytest.Item]:
        """A check; and, if the spec reads, a run for each case and seed, and each claim."""
        from hap.harness.spec.spec import load_spec

        try:
            spec, error = load_spec(self.path), None
        except HapError as caught:
            spec, error = None, str(caught)
        yield self._item(f"check[{self.path.stem}]", "check", partial(_check, error))
        if spec is None:
            return
        results = self.config.getoption("--results") or self.path.parent.parent / "results"
        for case in spec.cases.values():
            for seed in spec.first:
                yield self._item(f"run[{case.name}-seed{seed}]", "run", partial(_run, spec, case, seed, results))
        for index, claim in enumerate(spec.claims):
            name = f"claim[{index + 1}-{_slug(claim.text)}]"
            yield self._item(name, "claim", partial(_claim, spec, index, results))

    def verdict(self, spec: Any, index: int, results: Path) -> "Verdict":
        """That of a claim on the evidence there is."""
        from hap.harness.records import store
        from hap.harness.verdicts import judge

        if self.judged is None:
            self.judged = judge.of_today(spec, store.evidence(spec, results))
        return self.judged[index]

    def _item(self, name: str, mark: str, do: "Callable[[SpecItem], None]") -> "SpecItem":
        item = SpecItem.from_parent(self, name=name, do=do)
        item.add_marker(mark)
        return item


class SpecItem(pytest.Item):
    """One thing to do for a spec."""

    def __init__(self, *, do: "Callable[[SpecItem], None]", **given: Any) -> None:
        """An item that calls `do` with itself."""
        super().__init__(**given)
        self.do = do

    @property
    def file(self) -> SpecFile:
        """The spec it is of."""
        assert isinstance(self.parent, SpecFile)
        return self.parent

    def runtest(self) -> None:
        """Does it."""
        self.do(self)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """One line for what a person can mend, a traceback for the rest."""
        return str(excinfo.value) if excinfo.errisinstance((HapError, Stop)) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """The file and the name of the item."""
        return self.path, None, self.name


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line for each claim that was judged."""
    reports = [report for each in terminalreporter.stats.values() for report in each]
    told = {report.nodeid: dict(report.user_properties) for report in reports if hasattr(report, "user_properties")}
    lines = [properties["verdict"] for properties in told.values() if "verdict" in properties]
    if lines:
        terminalreporter.section("claims")
        for line in lines:
            terminalreporter.line(line)


def _check(error: str | None, item: SpecItem) -> None:
    if error is not None:
        raise Stop(error)


def _run(spec: Any, case: Any, seed: int, results: Path, item: SpecItem) -> None:
    from hap.harness.make import Job, alone, attempt
    from hap.harness.processes.workers import Worker
    from hap.harness.spec.spec import require
    from hap.harness.task import MissingData

    again, command = item.config.getoption("--again"), alone(item.path, case, seed, results)
    job, item.file.judged = Job(case, seed, results, again, command), None
    try:
        if job.missing:
            require(spec)
        attempt(job, item.config.stash.setdefault(EXECUTOR, Worker()))
    except MissingData as error:
        pytest.skip(str(error))


def _claim(spec: Any, index: int, results: Path, item: SpecItem) -> None:
    verdict = item.file.verdict(spec, index, results)
    item.user_properties += _properties(verdict)
    if item.config.getoption("--release") and not verdict.released and not verdict.surprising:
        raise Stop(verdict.line)
    if verdict.says in ("ABSENT", "UNDECIDED") or (verdict.outcome == "STALE" and not verdict.surprising):
        pytest.skip(verdict.line)  # what is stale is not shown; what it contradicts is still told
    known = verdict.claim.known
    if verdict.surprising:
        raise Stop(verdict.line if known is None else f"`known` is out of date, remove it: {known} ({verdict.line})")
    if known is not None:
        pytest.xfail(f"{known} ({verdict.line})")


def _properties(verdict: "Verdict") -> list[tuple[str, object]]:
    """What JUnit XML tells of a claim; what is not known is left out."""
    claim = verdict.claim
    told = {
        "outcome": verdict.outcome,
        "evidence": verdict.says,
        "source": claim.source,
        "value": verdict.observed,
        "low": verdict.low,
        "high": verdict.high,
        "op": claim.op,
        "bound": claim.value,
        "tolerance": claim.tolerance,
        "confidence": claim.confidence,
        "seeds": " ".join(map(str, verdict.seeds)),
        "further_seeds": verdict.further,
        "verdict": verdict.line,
    }
    return [
        (name, part if isinstance(part, float | int) else str(part)) for name, part in told.items() if part is not None
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-")
