import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import scipy.stats  # noqa: F401 - pytester forgets what a test imports, and scipy cannot be imported twice
import tiny
from fakes import SPEC, fake_run, with_accuracy, write_spec

from hap.harness import make  # noqa: F401 - nor can what is checked by type
from hap.harness.plugin import EXECUTOR
from hap.harness.processes.workers import InProcess
from hap.harness.records import store
from hap.harness.records.freshness import decides, entrances
from hap.harness.spec.spec import load_spec
from hap.harness.task import MissingData
from hap.harness.verdicts import judge  # noqa: F401 - the same


@pytest.fixture
def project(pytester, monkeypatch):
    """A folder of somebody's with one spec, whose runs are made up."""
    made = []

    def run(case, seed, *, known, say, keep):
        made.append((case.name, seed))
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other people's plugins take a second a time
    pytester.made = made
    pytester.spec = write_spec(pytester.path)
    pytester.makepyprojecttoml("[tool.other]\nx = 1\n")
    return pytester


class Here:
    """Has the plugin make its records in this process, where a test has put something in the place of a run."""

    def pytest_configure(self, config):
        config.stash[EXECUTOR] = InProcess()


def check(pytester, *args, here=True):
    given = ("-p", "hap.harness.plugin", "-p", "no:cacheprovider", "-ra")
    return pytester.runpytest_inprocess(*given, *args, plugins=[Here()] if here else [])


def evidence(project, **accuracies):
    """Evidence of every case and seed; accuracies: case -> selected accuracy of each seed."""
    spec = load_spec(project.spec)
    for case in spec.cases.values():
        for seed in spec.seeds:
            run = fake_run(case, seed)
            if case.name in accuracies:
                run = with_accuracy(run, "selected", accuracies[case.name][seed])
            store.save(run, project.path / "results")


def test_a_spec_becomes_items(project):
    result = check(project, "--collect-only", "-q")
    lines = [line for line in result.outlines if "::" in line]
    assert [line.split("::")[1] for line in lines] == [
        "check[table]",
        *[f"run[{case}-seed{seed}]" for case in ("hap", "random") for seed in range(3)],
        "claim[1-more-than-70-of-the-parameters-go]",
        "claim[2-hap-is-no-worse-than-random]",
    ]


def test_only_the_folder_reproductions_is_looked_at(project):
    for folder in ("other", "reproductions/deeper"):
        (project.path / folder).mkdir()
        (project.path / folder / "x.toml").write_text(SPEC)
    (project.path / "reproductions" / "notes.txt").write_text("no spec")
    items = [line for line in check(project, "--collect-only", "-q").outlines if "::" in line]
    assert all(line.startswith("reproductions/table.toml::") for line in items)
    assert len(items) == 9


def test_nothing_happens_in_a_project_without_specs(pytester):
    pytester.makepyfile("def test_it(): pass")
    pytester.makepyprojecttoml("[tool.other]\nx = 1\n")
    check(pytester).assert_outcomes(passed=1)


def test_everything_is_made_and_judged_and_then_there_is_nothing_to_do(project):
    evidence(project, random=[93.0, 93.1, 93.2])
    for file in (project.path / "results").rglob("seed1.json"):
        file.unlink()
    check(project, "reproductions").assert_outcomes(passed=9)
    assert project.made == [("hap", 1), ("random", 1)]
    check(project, "reproductions").assert_outcomes(passed=9)
    assert len(project.made) == 2


def test_again_makes_evidence_anew(project):
    evidence(project)
    check(project, "-m", "run").assert_outcomes(passed=6, deselected=3)
    assert project.made == []
    check(project, "-m", "run", "--again").assert_outcomes(passed=6, deselected=3)
    assert len(project.made) == 6


def test_claims_are_judged_without_a_run(project):
    evidence(project, random=[93.0, 93.1, 93.25])
    check(project, "-m", "claim").assert_outcomes(passed=2, deselected=7)
    assert project.made == []


def test_absent_evidence_skips_with_the_reason(project):
    result = check(project, "-m", "claim")
    result.assert_outcomes(skipped=2, deselected=7)
    result.stdout.fnmatch_lines(["SKIPPED*ABSENT: more than 70 %*no evidence for seed 0, 1, 2"])


def test_an_undecided_claim_skips_with_the_reason(project):
    evidence(project, random=[90.0, 94.0, 98.0])
    result = check(project, "-m", "claim")
    result.assert_outcomes(passed=1, skipped=1, deselected=7)
    result.stdout.fnmatch_lines(
        ["SKIPPED*UNDECIDED: hap is no worse*the interval crosses the bound; 114 further seeds would*"]
    )


def test_a_claim_that_fails_leaves_one_line_and_no_traceback(project):
    evidence(project, random=[97.0, 97.2, 97.1])
    result = check(project, "-m", "claim")
    result.assert_outcomes(passed=1, failed=1, deselected=7)
    result.stdout.fnmatch_lines(
        ["FAILS: hap is no worse than random [[]the suite]: observed -3 (*) over 3 seeds, claimed*"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*plugin.py*")


def known(project):
    project.spec.write_text(SPEC + 'known = "a made-up world"\n')


def test_each_verdict_is_a_line_of_the_summary(project):
    evidence(project, random=[93.0, 93.1, 93.25])
    result = check(project, "-m", "claim")
    result.stdout.fnmatch_lines(
        [
            "*= claims =*",
            "HOLDS: more than 70 % of the parameters go [[][[]Yu22] abstract]: observed 72 (72 to 72; exact) over*",
            "HOLDS: hap is no worse than random [[]the suite]: observed 0.9833 (0.9347 to 1.032; Student, *",
        ]
    )
    check(project, "-m", "run").stdout.no_fnmatch_line("*= claims =*")


def test_junit_carries_what_a_verdict_is_made_of(project):
    evidence(project, random=[93.0, 93.1, 93.25])
    check(project, "-m", "claim", "--junitxml=claims.xml").assert_outcomes(passed=2, deselected=7)
    cases = ElementTree.parse(project.path / "claims.xml").getroot().iter("testcase")
    told = [{each.get("name"): each.get("value") for each in case.iter("property")} for case in cases]
    assert float(told[1]["value"]) == pytest.approx(0.98333, abs=1e-4)
    assert float(told[1]["low"]) < float(told[1]["value"]) < float(told[1]["high"])
    kept = {name: told[1][name] for name in ("outcome", "evidence", "source", "op", "bound", "tolerance", "seeds")}
    assert kept == {
        "outcome": "HOLDS",
        "evidence": "HOLDS",
        "source": "the suite",
        "op": ">=",
        "bound": "0.0",
        "tolerance": "0.5",
        "seeds": "0 1 2",
    }
    assert told[1]["verdict"].startswith("HOLDS: hap is no worse than random [the suite]: observed")
    assert "further_seeds" not in told[1]


def test_junit_of_a_claim_without_evidence_has_no_value(project):
    check(project, "-m", "claim", "--junitxml=claims.xml")
    case = next(ElementTree.parse(project.path / "claims.xml").getroot().iter("testcase"))
    told = {each.get("name"): each.get("value") for each in case.iter("property")}
    assert told["outcome"] == "ABSENT"
    assert "value" not in told


SELECTED = {"hap": [94.0, 94.1, 94.2], "random": [93.0, 93.1, 93.25]}


def today(project, change=None):
    """Evidence of today's code, except where what decides it is said to be `change`."""
    spec = load_spec(project.spec)
    for case in spec.cases.values():
        for seed in spec.seeds:
            made = fake_run(case, seed)
            code = {**made.code, "decides": change or decides(entrances(case.config))}
            made = with_accuracy(replace(made, code=code), "selected", SELECTED[case.name][seed])
            store.save(made, project.path / "results")


def test_a_release_passes_on_claims_that_hold_on_evidence_of_today(project):
    today(project)
    check(project, "-m", "claim", "--release").assert_outcomes(passed=2, deselected=7)


def test_evidence_of_other_code_shows_nothing_and_a_release_fails_on_it(project):
    today(project, "0" * 64)
    result = check(project, "-m", "claim")
    result.assert_outcomes(skipped=2, deselected=7)
    result.stdout.fnmatch_lines(
        ["STALE: hap is no worse*; the evidence says HOLDS, but what decides it has changed since it was made"]
    )
    result = check(project, "-m", "claim", "--release")
    result.assert_outcomes(failed=2, deselected=7)
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_release_fails_on_evidence_whose_age_is_not_known(project):
    evidence(project, random=SELECTED["random"])
    check(project, "-m", "claim").assert_outcomes(passed=2, deselected=7)
    result = check(project, "-m", "claim", "--release")
    result.assert_outcomes(failed=2, deselected=7)
    result.stdout.fnmatch_lines(
        ["HOLDS: *; whether its code is that of today is not known: git has no commit abc here"]
    )


def test_a_release_fails_on_what_is_absent(project):
    result = check(project, "-m", "claim", "--release")
    result.assert_outcomes(failed=2, deselected=7)
    result.stdout.fnmatch_lines(["ABSENT: *"])


def test_a_release_fails_on_what_is_undecided(project, monkeypatch):
    monkeypatch.setitem(SELECTED, "random", [90.0, 94.0, 98.0])
    today(project)
    result = check(project, "-m", "claim", "--release")
    result.assert_outcomes(failed=1, passed=1, deselected=7)
    result.stdout.fnmatch_lines(["UNDECIDED: *"])


def test_a_release_may_go_out_with_a_failure_that_is_known(project, monkeypatch):
    known(project)
    monkeypatch.setitem(SELECTED, "random", [97.0, 97.2, 97.1])
    today(project)
    check(project, "-m", "claim", "--release").assert_outcomes(passed=1, xfailed=1, deselected=7)
    today(project, "0" * 64)
    check(project, "-m", "claim").assert_outcomes(skipped=2, deselected=7)
    check(project, "-m", "claim", "--release").assert_outcomes(failed=2, deselected=7)


def test_a_claim_known_to_fail_is_an_expected_failure(project):
    known(project)
    evidence(project, random=[97.0, 97.2, 97.1])
    result = check(project, "-m", "claim")
    result.assert_outcomes(passed=1, xfailed=1, deselected=7)
    result.stdout.fnmatch_lines(["XFAIL*a made-up world*"])


def test_a_claim_known_to_fail_that_holds_fails(project):
    known(project)
    evidence(project, random=[93.0, 93.1, 93.25])
    result = check(project, "-m", "claim")
    result.assert_outcomes(passed=1, failed=1, deselected=7)
    result.stdout.fnmatch_lines(["`known` is out of date, remove it: a made-up world (HOLDS: *"])


def test_a_claim_known_to_fail_without_evidence_skips(project):
    known(project)
    check(project, "-m", "claim").assert_outcomes(skipped=2, deselected=7)


def test_a_malformed_spec_fails_in_one_line(project):
    project.spec.write_text(SPEC.replace("params = 0.7", "params = 7"))
    result = check(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*reproductions/table.toml: cases.hap.budget.params: *7*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_missing_data_skips_a_run_with_the_reason(project, monkeypatch):
    def run(case, seed, *, known, say, keep):
        raise MissingData("cifar10: looked in ./data; get it from the registry")

    monkeypatch.setattr("hap.harness.run.run", run)
    result = check(project, "-m", "run")
    result.assert_outcomes(skipped=6, deselected=3)
    result.stdout.fnmatch_lines(["SKIPPED*cifar10: looked in ./data; get it from the registry"])


def test_a_run_that_breaks_shows_where(project, monkeypatch):
    monkeypatch.setattr("hap.harness.run.run", lambda case, seed, *, known, say, keep: 1 / 0)
    result = check(project, "-m", "run")
    result.assert_outcomes(failed=6, deselected=3)
    result.stdout.fnmatch_lines(["*ZeroDivisionError*"])


def test_a_run_that_ends_its_process_fails_in_one_line(project):
    """A worker makes it, and dies; the next makes the rest."""
    case = '[cases.aborts]\nlike = "hap"\nscore = "strangers:aborts"\n\n[[claims]]'
    spec = tiny.SPEC.replace("[0.5, 0.7]", "[0.5]").replace("[[claims]]", case).replace("[0, 1, 2]", "[0]")
    project.spec.write_text(spec)
    result = check(project, "-m", "run", here=False)
    result.assert_outcomes(passed=1, failed=1, deselected=2)
    command = "hap record *reproductions/table.toml aborts@50 0"
    result.stdout.fnmatch_lines([f"its process was ended by SIGABRT; to repeat it: {command}"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_damaged_record_fails_in_one_line(project):
    evidence(project)
    file = store.path(project.path / "results", load_spec(project.spec).cases["hap"], 0)
    file.write_text("{")
    result = check(project, "-k", "run and hap-seed0")
    result.assert_outcomes(failed=1, deselected=8)
    result.stdout.fnmatch_lines([f"*{file}: damaged record: *"])


def test_results_may_lie_elsewhere(project, tmp_path):
    check(project, "-m", "run", f"--results={tmp_path / 'mine'}").assert_outcomes(passed=6, deselected=3)
    assert len(list((tmp_path / "mine").rglob("seed*.json"))) == 6
    assert not (project.path / "results").exists()


def test_the_plugin_costs_nothing_before_a_spec_is_collected():
    heavy = ("torch", "pydantic", "scipy", "pandas", "rich", "typer", "numpy")
    code = f"import sys, hap.harness.plugin; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert told.stdout.strip() == "[]"
