"""The pytest plugin: a .toml in a folder `reproductions` becomes check, run and claim items; decides nothing itself.

    pytest reproductions             check each spec, make the evidence that is missing, judge the claims
    pytest reproductions -m claim    judge committed evidence only
    pytest reproductions -m run      make evidence only; --again makes it anew

Other projects enable it by `-p hap.harness.plugin`. It imports nothing heavy before a spec is collected.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hap import HapError


class Stop(Exception):  # noqa: N818 - not an error of ours but the one line that a failed claim leaves
    """The one line of an item that fails."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --again and --results."""
    group = parser.getgroup("hap", "reproductions (hap)")
    group.addoption("--again", action="store_true", help="make evidence anew where it exists")
    group.addoption(
        "--results", type=Path, metavar="DIR", help="where evidence lies (default: results/ beside reproductions/)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Names the markers."""
    config.addinivalue_line("markers", "check: a spec reads and the functions it names exist")
    config.addinivalue_line("markers", "run: makes the evidence of one case and seed; nothing to do where it exists")
    config.addinivalue_line("markers", "claim: judges a claim on the evidence there is, without a run")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "SpecFile | None":
    """A spec for each .toml directly in a folder `reproductions`."""
    if file_path.suffix == ".toml" and file_path.parent.name == "reproductions":
        return SpecFile.from_parent(parent, path=file_path)
    return None


class SpecFile(pytest.File):
    """The items of one spec."""

    def collect(self) -> Iterator[pytest.Item]:
        """A check; and, if the spec reads, a run for each case and seed, and each claim."""
        from hap.harness.spec import load_spec

        try:
            spec, error = load_spec(self.path), None
        except HapError as caught:
            spec, error = None, str(caught)
        yield self._item(f"check[{self.path.stem}]", "check", partial(_check, error))
        if spec is None:
            return
        results = self.config.getoption("--results") or self.path.parent.parent / "results"
        again = self.config.getoption("--again")
        for case in spec.cases.values():
            for seed in spec.seeds:
                yield self._item(f"run[{case.name}-seed{seed}]", "run", partial(_run, spec, case, seed, results, again))
        for number, claim in enumerate(spec.claims, start=1):
            yield self._item(f"claim[{number}-{_slug(claim.text)}]", "claim", partial(_claim, spec, claim, results))

    def _item(self, name: str, mark: str, do: Callable[[], None]) -> "SpecItem":
        item = SpecItem.from_parent(self, name=name, do=do)
        item.add_marker(mark)
        return item


class SpecItem(pytest.Item):
    """One thing to do for a spec."""

    def __init__(self, *, do: Callable[[], None], **given: Any) -> None:
        """An item that calls `do`."""
        super().__init__(**given)
        self.do = do

    def runtest(self) -> None:
        """Does it."""
        self.do()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """One line for what a person can mend, a traceback for the rest."""
        return str(excinfo.value) if excinfo.errisinstance((HapError, Stop)) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """The file and the name of the item."""
        return self.path, None, self.name


def _check(error: str | None) -> None:
    if error is not None:
        raise Stop(error)


def _run(spec: Any, case: Any, seed: int, results: Path, again: bool) -> None:
    from hap.harness import store
    from hap.harness.spec import require
    from hap.harness.tasks import MissingData

    try:
        if again or not store.path(results, case, seed).exists():
            require(spec)
        store.ensure(case, seed, results, again=again)
    except MissingData as error:
        pytest.skip(str(error))


def _claim(spec: Any, claim: Any, results: Path) -> None:
    from hap.harness import store
    from hap.harness.judge import Outcome, judge

    verdict = judge(claim, store.evidence(spec, results, (claim.case, claim.against)), spec.seeds)
    if verdict.outcome in (Outcome.ABSENT, Outcome.UNDECIDED):
        pytest.skip(verdict.line)
    if verdict.surprising:
        raise Stop(
            verdict.line
            if claim.known is None
            else f"`known` is out of date, remove it: {claim.known} ({verdict.line})"
        )
    if claim.known is not None:
        pytest.xfail(f"{claim.known} ({verdict.line})")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-")
