"""The one entrance: what can be done in this repository. `nox --list` shows it, `nox` alone does all that CI does.

Every session runs in the one environment `.venv`, because torch is too large for one each. It is built by the first
session, and again when pyproject.toml or constraints.txt changed. `nox --no-venv` takes the Python that is there.
"""

import json
import os
import re
import shutil
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import nox

ROOT = Path(__file__).parent
VENV = ROOT / ".venv"
STAMP = VENV / ".hap-stamp"
LEAST_BRANCHES = 95.0  # percent of hap/ that the tests must take
WORKERS = min(4, os.cpu_count() or 1)
SPREAD = ("-n", str(WORKERS), "--dist", "loadfile")  # a file to a worker, for its fixtures
# a machine may forbid compiled files, and each of the hundred processes that tests start would compile everything
KEPT = {"PYTHONDONTWRITEBYTECODE": ""}

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "judge", "tests"]
SUPPORTED = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["requires-python"]  # ">=3.11,<3.14"
MINORS = range(*map(int, re.findall(r"3\.(\d+)", SUPPORTED)))
session = nox.session(venv_backend="none")  # not nox's own environments: they cannot be shared


@session
def tests(session: nox.Session) -> None:
    """Run the tests that are not slow; `-- --slow`: all; `-- --coverage`: all, measured; `-- ARGS`: pytest alone."""
    if session.posargs == ["--coverage"]:
        _covered(session)
    elif session.posargs == ["--slow"]:
        _run(session, "pytest", *SPREAD, "-m", "slow or not slow")
    else:
        _run(session, "pytest", *(session.posargs or SPREAD))


def _covered(session: nox.Session) -> None:
    """The tests, then the slow ones, and the branch coverage of hap/ over both."""
    _run(session, "coverage", "erase")
    for marked in ("not slow", "slow"):
        # not pytest-cov: `-p hap.harness.plugin` imports hap before that plugin could measure it
        _run(session, "coverage", "run", "-m", "pytest", *SPREAD, "-m", marked)
    _run(session, "coverage", "combine", "--quiet")
    _run(session, "coverage", "report")
    _run(session, "coverage", "json", "--quiet", "-o", ".coverage-branches.json")
    totals = json.loads((ROOT / ".coverage-branches.json").read_text())["totals"]
    percent = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"branch coverage of hap/: {percent:.1f} % ({totals['covered_branches']} of {totals['num_branches']})")
    if percent < LEAST_BRANCHES:
        session.error(f"at least {LEAST_BRANCHES} % of the branches of hap/ must be covered")


@session
def lint(session: nox.Session) -> None:
    """Check the style of all Python files with ruff, and the order of the rooms with import-linter."""
    _run(session, "ruff", "check", ".")
    _run(session, "ruff", "format", "--check", ".")
    session.run(str(Path(_python(session)).with_name("lint-imports")), "--no-cache", external=True)


@session
def types(session: nox.Session) -> None:
    """Check the types of hap/ with mypy, strictly."""
    _run(session, "mypy")


@session
def reproduce(session: nox.Session) -> None:
    """Make evidence, judge, report: the digits anew, or what is missing of `-- NAME`, `-- all`; `--ranks N` shares."""
    # anew, for the repository has records of the digits, and to read them would reproduce nothing
    what, launch = list(session.posargs or ["digits", "digits-bert", "--again"]), list[str]()
    if "--ranks" in what:
        at = what.index("--ranks")
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", *what[at + 1 : at + 2], "-m"]
        del what[at : at + 2]
    _run(session, *launch, "hap", "run", *what)


@session
def judge(session: nox.Session) -> None:
    """Judge the committed evidence; runs nothing, takes seconds, needs no GPU."""
    _run(session, "pytest", "reproductions", "-m", "claim", *session.posargs)


@session
def figures(session: nox.Session) -> None:
    """Write the tables, the figures, VERDICTS.md and index.html again from the committed evidence."""
    _run(session, "hap", "report", *session.posargs)


@session
def bench(session: nox.Session) -> None:
    """Time tracing, curvature and surgery, with the peers beside them."""
    _run(session, "pytest", "benchmarks", "-o", "python_files=bench_*.py", *session.posargs)


@session
def nightly(session: nox.Session) -> None:
    """Measure anew what this machine can, and fail where something got worse than in the nights before."""
    _run(session, "hap", "nightly", *session.posargs)


def _run(session: nox.Session, *command: str) -> None:
    session.run(_python(session), "-m", *command, external=True, env=KEPT)


def _python(session: nox.Session) -> str:
    """The Python of `.venv`, made ready; or with --no-venv the one that has torch."""
    if "--no-venv" in sys.argv:
        return sys.executable if find_spec("torch") else shutil.which("python") or sys.executable
    python = str(VENV / "bin" / "python")
    wanted = sha256((ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()).hexdigest()
    if not STAMP.is_file() or STAMP.read_text() != wanted or not Path(python).exists():
        if not Path(python).exists():
            _create(session)
        session.log("installing into .venv, once; torch is several gigabytes")
        packages = ("-c", "constraints.txt", "-e", ".[test,bench,lint]")
        session.run(python, "-m", "pip", "install", *packages, external=True)
        STAMP.write_text(wanted)
    return python


def _create(session: nox.Session) -> None:
    """An empty `.venv`, of this Python if it is supported, else of another one."""
    other = [f"python3.{minor}" for minor in reversed(MINORS)]
    chosen = [sys.executable] if sys.version_info[0] == 3 and sys.version_info[1] in MINORS else other
    choices = [part for name in chosen for part in ("--python", name)]
    session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", *choices, str(VENV), external=True)
