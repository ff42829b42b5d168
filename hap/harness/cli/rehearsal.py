"""A rehearsal: specs shrunk, their records in a temporary folder, reported there; nothing of it is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hap.harness.processes.files import caching
from hap.harness.records import store
from hap.harness.report import write as report
from hap.harness.report.tables import tables
from hap.harness.spec.cases import smoke
from hap.harness.spec.spec import Spec


@contextmanager
def rehearsal(spec: Spec, root: Path) -> Iterator[tuple[Spec, Path]]:
    """Gives the spec as small as it goes, one seed, and a folder for its records; then judges and reports them.

    Of cases that differ in their budget alone, NAME@30 and NAME@50, the first. `root` has the scripts of the figures.
    """
    first = {name.partition("@")[0]: name for name in reversed(spec.cases)}
    cases = {name: smoke(case) for name, case in spec.cases.items() if name in first.values()}
    claims = tuple(claim for claim in spec.claims if {claim.case, claim.against} <= {None, *cases})
    small = spec.model_copy(update={"cases": cases, "claims": claims, "seeds": spec.seeds[:1], "tier": "cpu"})
    with TemporaryDirectory(prefix="hap-") as folder, caching(Path(folder) / "cache"):
        yield small, Path(folder)
        runs = store.evidence(small, Path(folder))
        tables(small, runs, Path(folder))
        report.figures(small, runs, Path(folder), root)
        report.verdicts(small, runs)
