import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from hap.harness.processes import provenance
from hap.harness.records import freshness
from hap.harness.records.freshness import FRESH, age, at_commit, deciding, differing, newest, on_disk, parsed
from hap.harness.records.store import load

RUN = '''
"""A procedure."""
from hap.harness import tools
from hap.harness.processes import files
from hap.methods import taylor as first
import hap.cost as cost

def run(case):
    """Runs."""
    return first(tools.half(case), cost.macs) + files.write

def unused():
    return tools.other
'''
TOOLS = '''
from hap import couple

LIMIT: float = 3  # a constant

def half(x):
    # a comment
    return couple(x) / 2 if x < LIMIT else Big

class Big:
    """Too big."""
    size = 3

def other():
    pass
'''
PACKAGE = {
    "hap": "def __getattr__(name): pass",
    "hap.harness": "",
    "hap.harness.run": RUN,
    "hap.harness.tools": TOOLS,
    "hap.harness.processes.files": "write = 1",
    "hap.methods": "def taylor(x, y): return x\n\ndef random(x): return 4",
    "hap.cost": "def macs(): return _walk\n\ndef _walk(): return macs",
    "hap.structure.groups": "def couple(x): return x",
}
ALL = ["hap.harness.run:run"]


def sources(**changed):
    texts = {**PACKAGE, **{f"hap.{name}": text for name, text in changed.items()}}
    return {name: parsed(text) for name, text in texts.items()}


def harness(name, text):
    return {**sources(), f"hap.harness.{name}": parsed(text)}


def changes(package, roots=ALL):
    return differing(deciding(sources(), roots), deciding(package, roots))


def test_what_decides_is_what_is_reached_by_name():
    """Through an alias, an attribute of a module, a lazy name of the package, a constant; not what is only kept."""
    assert sorted(deciding(sources(), ALL)) == [
        *("cost._walk", "cost.macs", "methods.taylor", "run.run", "structure.groups.couple"),
        *("tools.Big", "tools.LIMIT", "tools.half"),
    ]
    assert "methods.random" in deciding(sources(), [*ALL, "hap.methods:random", "a.stranger:score"])


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("run", '"""Runs."""', '"""Runs it, and\n    says so.\n    """'),
        ("run", '"""A procedure."""', "# none"),
        ("run", "return tools.other", "return 5"),
        ("run", "def unused", "def newly():\n    return 1\n\ndef unused"),
        ("tools", "# a comment", "# another\n\n"),
        ("tools", "  # a constant", ""),
        ("tools", '"""Too big."""', '"""Much too big."""'),
        ("tools", "def other():\n    pass", ""),
        ("processes.files", "write = 1", "write = 2"),
    ],
)
def test_what_decides_nothing_is_no_change(module, old, new):
    text = PACKAGE[f"hap.harness.{module}"]
    assert old in text
    assert changes(harness(module, text.replace(old, new))) == []


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        ("run", "first(tools", "1 + first(tools", ["run.run"]),
        ("tools", "/ 2", "/ 3", ["tools.half"]),
        ("tools", "= 3  #", "= 4  #", ["tools.LIMIT"]),
        ("tools", "size = 3", "size = 4", ["tools.Big"]),
        ("tools", "x < LIMIT", "x < LIMIT + other", ["tools.half", "tools.other"]),
        ("tools", "    return couple", "        return couple", ["tools.half"]),
    ],
)
def test_what_decides_is_a_change(module, old, new, changed):
    text = PACKAGE[f"hap.harness.{module}"].replace("    # a comment\n", "    if x:\n      pass\n")
    before = harness(module, text)
    after = harness(
        module, text.replace(old, new).replace("if x:\n      pass\n        return", "if x:\n        return")
    )
    assert differing(deciding(before, ALL), deciding(after, ALL)) == changed


def test_a_function_that_moves_is_the_same():
    moved = harness(
        "tools", TOOLS.split("class Big")[0].replace("import couple", "import couple\nfrom hap.big import Big")
    )
    assert changes({**moved, "hap.big": parsed("class Big:\n    size = 3")}) == []


def test_a_score_that_a_case_does_not_name_does_not_age_it():
    other = {**sources(), "hap.methods": parsed(PACKAGE["hap.methods"].replace("return 4", "return 5"))}
    assert changes(other) == []
    assert changes(other, [*ALL, "hap.methods:random"]) == ["methods.random"]


def record(code, data="1" * 64, created="2026-01-01", **config):
    given = {"task": {"use": "pkg.task:task", "options": {}}, **config}
    return SimpleNamespace(code=code, config=given, data={"name": "digits", "sha256": data}, created=created)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `hap` of one procedure in a repository of its own, and its commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository" / "hap"
    (folder / "harness").mkdir(parents=True)
    (folder / "harness" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "harness" / "run.py").write_text("def run():\n    return 1\n")
    git = partial(subprocess.run, cwd=folder, check=True, capture_output=True, text=True)
    git(["git", "init", "-q"])
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"])
    return folder


def rewrite(package, text):
    (package / "harness" / "run.py").write_text(text)
    for cached in (on_disk, at_commit, freshness._deciding, freshness._checksum):
        cached.cache_clear()


def test_a_record_is_fresh_until_what_decides_it_changes(package):
    made = record(provenance.code(package))
    assert age(made, {}, package) == FRESH
    rewrite(package, '"""Said."""\n\n\ndef run():\n    """Runs."""\n    return 1  # one\n')
    assert age(made, {}, package) == FRESH
    rewrite(package, "def run():\n    return 2\n")
    told = age(made, {}, package)
    assert told.state == "stale"
    assert told.why == f"1 definition of what decides it changed since {made.code['commit'][:10]} (run.run)"
    rewrite(package, "def run():\n    return a, b\n\na = 1\nb = 2\n")
    assert "3 definitions of what decides it changed since" in age(made, {}, package).why


def test_a_record_that_carries_its_digest_needs_no_git(package, monkeypatch):
    roots = freshness.entrances(record({}).config)
    made = record({**provenance.code(package), "decides": freshness.decides(roots, package)})
    monkeypatch.setenv("PATH", "")
    rewrite(package, "def run():\n    return 1  # one\n")
    assert age(made, {}, package) == FRESH
    rewrite(package, "def run():\n    return 2\n")
    assert (age(made, {}, package).state, age(made, {}, package).why) == (
        "stale",
        "what decides it has changed since it was made",
    )


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ({"commit": "a" * 40, "dirty": False}, "git has no commit aaaaaaaaaa here"),
        ({"commit": "a" * 40, "dirty": True}, "it names no clean commit"),
        ({"commit": None, "dirty": None}, "it names no clean commit"),
        ({"commit": "--output=x", "dirty": False}, "git has no commit --output=x here"),
    ],
)
def test_where_the_code_cannot_be_had_it_says_so(package, code, why):
    told = age(record({**code, "sha256": "0" * 64}), {}, package)
    assert (told.state, told.why) == ("unknown", f"whether its code is that of today is not known: {why}")
    assert not list(package.glob("x"))


def test_without_git_it_says_so(package, monkeypatch):
    made = record(provenance.code(package))
    rewrite(package, "def run():\n    return 1  # one\n")
    monkeypatch.setenv("PATH", "")
    assert age(made, {}, package).state == "unknown"


def test_evidence_of_older_data_is_stale(package):
    old, new = (record(provenance.code(package), data=d * 64, created=f"2026-01-0{d}") for d in "12")
    latest = newest([new, old])
    assert latest == {"digits": "2" * 64}
    assert age(new, latest, package) == FRESH
    told = age(old, latest, package)
    assert (told.state, told.why) == ("stale", "it was made of digits 1111111111, newer evidence of 2222222222")


def test_the_package_on_disk_reads_and_a_run_reaches_the_method():
    reached = deciding(on_disk(), ["hap.harness.run:run", "hap.methods:hessian_trace"])
    assert {
        "methods.hessian_trace",
        "hessian.exact.exact",
        "structure.tracing.trace",
        "surgery.apply.apply",
        "train.loop.fit",
    } <= reached.keys()
    assert not [name for name in reached if name.partition(".")[0] in ("verdicts", "report", "make", "cli", "plugin")]


def test_the_age_of_the_committed_evidence_is_told():
    """Fresh, stale or not known, with the reason, also where this is no checkout; never an error."""
    results = Path(__file__).parents[3] / "results"
    files = {load(file).code["commit"]: file for file in sorted(results.glob("*/*/seed0.json"))}
    assert files
    for file in files.values():
        found = age(load(file), {})
        assert found.state in ("fresh", "stale", "unknown")
        assert bool(found.why) == (found.state != "fresh")
