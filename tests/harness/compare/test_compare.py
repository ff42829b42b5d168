import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from fakes import fake_run, with_accuracy, write_spec
from scipy import stats
from typer.testing import CliRunner

import hap.harness.run as procedure
from hap import HapError
from hap.harness.cli import app as cli
from hap.harness.cli.lint import lint
from hap.harness.compare import comparison, conclusions
from hap.harness.make import Job, ensure
from hap.harness.processes.workers import InProcess
from hap.harness.records import store
from hap.harness.spec.spec import load_spec
from hap.harness.verdicts import judge

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "tests" / "example_package"
SPEC = (
    tiny.SPEC.split("[[claims]]")[0]
    + """
[cases.random]
like = "hap"
score = "hap.methods:random"
budget = {params = 0.5}

[cases.implanted]
like = "hap"
implant = "hap.implants:zero"
budget = {params = 0.5, implant = 0.2}
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a spec and its committed evidence, of real runs on a tiny network."""
    folder = tmp_path_factory.mktemp("compare")
    spec = load_spec(write_spec(folder, SPEC, "tiny"))
    for case in spec.cases.values():
        for seed in spec.seeds:
            ensure(Job(case, seed, folder / "results"))
    write_spec(folder, SPEC, "bare")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """There, with a cache of its own; what lies in the folder must not change unless told."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("HAP_CACHE", str(tmp_path / "cache"))
    return made


def hap(*args):
    """The command, with records made in this process, where a test has put something in the place of a run."""
    return CliRunner().invoke(cli.app, args, obj=InProcess())


@pytest.fixture(scope="module")
def kept(made, tmp_path_factory):
    """What --record wrote under results/compare of a comparison with hap@50, taken away from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("HAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        told = hap("compare", "strangers:score", "--spec", "tiny", "--record", "--against", "hap@50")
    assert told.exit_code == 0, told.output
    return (made / "results" / "compare").rename(tmp_path_factory.mktemp("kept") / "compare")


@pytest.fixture
def recorded(folder, kept):
    """The folder of that comparison, there for one test."""
    there = shutil.copytree(kept, folder / "results" / "compare")
    yield next(there.iterdir())
    shutil.rmtree(there)


def findings():
    return [each.line for each in lint(Path("reproductions"), Path("results")) if "compare" in str(each.file)]


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(text):
    """The cells of the first table."""
    lines = text.split("\n\n")[2 if text.startswith("\n") else 1].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def test_the_worst_score_is_told_from_haps_and_nothing_is_left_behind(folder):
    before = files(folder)
    told = hap("compare", "strangers:worst", "--spec", "tiny")
    assert told.exit_code == 0, told.output
    assert files(folder) == before
    text = told.stdout[told.stdout.index("strangers:worst in the place of hap") :]
    head, *lines = rows(text)
    assert head == ["case", "stage", "seeds", "yours", "hap", "difference", "95 % interval", "method", "rank"]
    assert [line[0] for line in lines] == ["hap@50", "hap@70"]
    spec = load_spec(folder / "reproductions" / "tiny.toml")
    mine = [store.load(file) for file in sorted(Path(os.environ["HAP_CACHE"]).rglob("strangers-worst@50-*/seed?.json"))]
    theirs = store.evidence(spec, folder / "results", ["hap@50"])["hap@50"]
    accuracies = [np.array([run.metrics["one_shot"]["accuracy"] for run in runs]) for runs in (mine, theirs)]
    means = [each.mean() for each in accuracies]
    assert lines[0][3:6] == [f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[0] - means[1]:+.2f}"]
    assert lines[0][8] == "4 of 4"  # behind hap, random and implanted, all with half of the parameters gone
    assert lines[1][8] == "2 of 2"
    assert [row[1][0] for row in rows("\n\n".join(text.split("\n\n")[1:]))[1:]] == ["5", "7"]  # percent and more
    method = 'over seeds and 450 images, Holm over 2 of "comparison": p 0.'
    assert [line[7].startswith(method) for line in lines] == [True, True]
    assert "fewer than 10 seeds show large differences only" in text
    assert "Both ran with the same torch, device and threads" in text
    assert "says nothing of others" in text


def test_haps_own_score_is_no_different_from_itself(folder):
    text = hap("compare", "strangers:same", "--spec", "tiny", "--against", "hap@50").stdout
    lines = rows(text[text.index("strangers:same in") :])[1:]
    assert [(line[5], line[6], line[7]) for line in lines] == [
        ("+0.00", "none", "equal by chance: the spread is not known")
    ]
    assert "Nothing can be concluded: no difference from hap can be told from chance." in text


def test_an_interrupted_comparison_goes_on_and_an_option_begins_anew(folder, monkeypatch):
    real, done = procedure.run, []

    def run(case, seed, **how):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((case.name, seed))
        return real(case, seed, **how)

    monkeypatch.setattr(procedure, "run", run)
    assert hap("compare", "strangers:score", "--spec", "tiny").exit_code == 130
    monkeypatch.setattr(
        procedure, "run", lambda case, seed, **how: done.append((case.name, seed)) or real(case, seed, **how)
    )
    assert hap("compare", "strangers:score", "--spec", "tiny").exit_code == 0
    assert done == [(f"strangers-score@{size}", seed) for size in (50, 70) for seed in (0, 1, 2)]
    assert hap("compare", "strangers:score", "--spec", "tiny").exit_code == 0
    assert len(done) == 6
    told = hap("compare", "strangers:score", "--against", "hap@50", "--spec", "tiny", "--options", "width=3", "name=y")
    assert told.exit_code == 0
    assert len(done) == 9
    keys = {file.parent.name for file in Path(os.environ["HAP_CACHE"]).rglob("seed0.json")}
    assert len(keys) == 3


def test_an_edit_of_the_package_runs_it_anew(tmp_path, monkeypatch):
    package = tmp_path / "edited"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f(model, loss, batches, groups, *, rng): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = comparison.rival("edited.a:f", {}, "score").folder
    assert comparison.rival("edited.a:f", {}, "score").folder == before
    (package / "helper.py").write_text("x = 1\n")
    assert comparison.rival("edited.a:f", {}, "score").folder != before


def test_a_namespace_package_is_known_by_what_is_in_its_folder(tmp_path, monkeypatch):
    package = tmp_path / "unmarked"
    package.mkdir()
    (package / "a.py").write_text("def f(model, loss, batches, groups, *, rng): return 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    rival = comparison.rival("unmarked.a:f", {}, "score")
    assert comparison.rival("unmarked.a:f", {}, "score") == rival
    function = rival.ref.load()
    says = r"^unmarked.a:f: raised ZeroDivisionError: .* \(in a.py, line 1\)$"
    with pytest.raises(HapError, match=says), comparison.blaming(rival):
        function(0, 0, 0, 0, rng=0)
    (package / "helper.py").write_text("x = 1\n")
    assert comparison.rival("unmarked.a:f", {}, "score").folder != rival.folder


def test_a_module_that_exits_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "script_of_a_stranger.py").write_text("import sys\nsys.exit('usage: none')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HapError, match=r"script_of_a_stranger:f: must name a function .* \(SystemExit: usage: none"):
        comparison.rival("script_of_a_stranger:f", {}, "score")


def test_record_keeps_a_spec_with_its_records_which_lint_and_judge_read_as_any_other(folder, request):
    request.addfinalizer(lambda: shutil.rmtree(folder / "results" / "compare"))
    before, found = files(folder), lint(Path("reproductions"), Path("results"))
    told = hap(
        "compare", "strangers:score", "--spec", "tiny", "--record", "--against", "hap@50", "--options", "width=2"
    )
    assert told.exit_code == 0, told.output
    assert {file: content for file, content in files(folder).items() if file in before} == before
    (kept,) = (folder / "results" / "compare").iterdir()
    assert lint(Path("reproductions"), Path("results")) == found
    assert sorted(files(folder).keys() - before.keys()) == sorted(files(kept))
    spec = load_spec(kept / "tiny.toml")
    assert kept.name == comparison.name(spec)
    assert kept.name.startswith("tiny-strangers-score-")
    base = load_spec(folder / "reproductions" / "tiny.toml")
    mine = spec.cases["strangers-score@50"]
    assert mine.score.model_dump() == {"use": "strangers:score", "options": {"width": 2}}
    assert mine.model_copy(update={"score": base.cases["hap@50"].score, "name": "hap@50"}) == base.cases["hap@50"]
    evidence = store.evidence(spec, kept)
    names = ["hap@50", "random", "implanted"]  # those with half of the parameters gone
    assert {name: runs for name, runs in evidence.items() if runs and name != mine.name} == store.evidence(
        base, folder / "results", names
    )
    assert [run.seed for run in evidence[mine.name]] == [0, 1, 2]
    page = (kept / comparison.PAGE).read_text()
    assert page.startswith("strangers:score in the place of hap, tiny: test accuracy in points")
    assert page in told.stdout
    assert f"recorded in {(kept / 'tiny.toml').relative_to(folder)}\n" in told.stdout
    judged = hap("judge", str(kept / "tiny.toml"), "--results", str(kept))
    assert "strangers-score@50 is better than hap@50 before fine-tuning" in judged.stdout
    assert f"({rows(page)[1][6].replace('+', '').split()[0][:4]}" in judged.stdout


def swapped(name, old, new):
    """Damage to a file of a recorded comparison: the first place of one text becomes another."""

    def damage(kept):
        (file,) = kept.rglob(name)
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return damage


def changed(change):
    """Damage to the record of seed 1 of the stranger's case; `change` is also given the record of seed 0."""

    def damage(kept):
        file = next(kept.rglob("strangers-score@50-*/seed1.json"))
        table = json.loads(file.read_text())
        change(table, json.loads(file.with_name("seed0.json").read_text()))
        file.write_text(json.dumps(table, indent=1))

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (changed(lambda run, _: run["metrics"]["one_shot"].update(accuracy=99.0)), "selected must be one_shot"),
        (
            changed(lambda run, _: [run["metrics"][each].update(accuracy=99.0) for each in store.STAGES[1:]]),
            "one_shot accuracy must be that of its bits",
        ),
        (changed(lambda run, _: run["seconds"].update(score=99.0)), "comparison.md: it must be what its records give"),
        (changed(lambda run, _: run["cost"]["pruned"].update(params=float("nan"))), "must be whole, and where it"),
        (changed(lambda run, other: run.update(seconds=other["seconds"])), "its seconds must be its own"),
        (changed(lambda run, _: run.pop("plan")), "must be whole, and where it belongs"),
        (changed(lambda run, _: run.update(schema=0)), "schema: must be 1 (found 0)"),
        (lambda kept: next(kept.rglob("strangers*/seed2.json")).unlink(), "must be there (found none)"),
        (lambda kept: next(kept.rglob("hap@50*/seed2.json")).unlink(), "must be there (found none)"),
        (lambda kept: next(kept.rglob("hap@50*/seed2.json")).with_name("seed7.json").touch(), "found seed7.json"),
        (lambda kept: (kept / "notes.txt").touch(), "must be its spec, its page, or a record"),
        (lambda kept: (kept / comparison.PAGE).unlink(), "must be there (found none)"),
        (lambda kept: (kept / "tiny.toml").unlink(), "a comparison must be a folder with one spec (found 0 specs)"),
        (lambda kept: (kept / "tiny.toml").rename(kept.parent / "tiny.toml"), "must be a folder with one spec"),
        (lambda kept: kept.rename(kept.with_name("mine")), "its name must be tiny-strangers-score-"),
        (swapped("tiny.toml", "strangers:score", "strangers:worst"), "it must be what its records give"),
        (swapped("tiny.toml", 'use" = "strangers:score', 'use" = "strangers:worst'), "its name must be tiny-"),
        (swapped("tiny.toml", 'case = "strangers-score@50"', 'case = "gone"'), "claims[1].case: must be a case"),
        (swapped("tiny.toml", "value = 0.0", "value = -9.0"), "its claims must be those that `hap compare` writes"),
        (swapped("tiny.toml", "[[claims]]", "[[other]]"), "a comparison must be whole"),
        (swapped("tiny.toml", "title", "titel"), "a comparison must be whole"),
        (swapped(comparison.PAGE, "strangers:score in", "Something in"), "(found 'Something in the place"),
        (swapped(comparison.PAGE, "Your method is worse", "Your method is better"), "(found 'Your method is better"),
        (swapped(comparison.PAGE, " of 4 |", " of 5 |"), "it must be what its records give"),
        (swapped(comparison.PAGE, "says nothing of others", "holds for all"), "it must be what its records give"),
        (lambda kept: (kept / comparison.PAGE).write_bytes(b"\xff"), "a comparison must be whole"),
        (lambda kept: (kept / comparison.PAGE).write_text(""), "it must be what its records give"),
        (
            lambda kept: (kept / "tiny.toml").write_text((kept / "tiny.toml").read_text() + NARROW),
            "claims[2]",
        ),
    ],
)
def test_what_is_wrong_with_a_recorded_comparison_is_found(recorded, damage, told):
    assert findings() == []
    damage(recorded)
    assert any(told in line for line in findings()), findings()


NARROW = """
[[claims]]
text = "one that nobody made"
source = "none"
case = "random"
against = "strangers-score"
metric = "accuracy"
op = ">="
value = 0
over = "seeds"
family = "a test"
"""


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"seeds = []", b""])
def test_a_comparison_that_is_damaged_hides_no_other(recorded, content):
    other = recorded.with_name("another")
    shutil.copytree(recorded, other)
    (recorded / "tiny.toml").write_bytes(content)
    lines = findings()
    assert [line.partition(" (")[0].endswith("a comparison must be whole") for line in lines] == [False, True]
    assert "another: its name must be" in lines[0]


def test_a_comparison_is_checked_without_the_package_of_the_stranger(folder, tmp_path, monkeypatch, request):
    request.addfinalizer(lambda: shutil.rmtree(folder / "results" / "compare"))
    (tmp_path / "visitor.py").write_text("from strangers import score\n")
    with monkeypatch.context() as there:
        there.syspath_prepend(tmp_path)
        assert hap("compare", "visitor:score", "--spec", "tiny", "--record", "--against", "hap@50").exit_code == 0
    monkeypatch.delitem(sys.modules, "visitor")
    (kept,) = (folder / "results" / "compare").iterdir()
    assert findings() == []
    with pytest.raises(HapError, match="must name a function that exists"):
        load_spec(kept / "tiny.toml")


def test_what_was_recorded_before_is_replaced(recorded):
    """Of a case as it was, records would stay that belong to nothing."""
    (old := recorded / "tiny" / "hap@50-0123456789").mkdir()
    (old / "seed0.json").touch()
    assert hap("compare", "strangers:score", "--spec", "tiny", "--record", "--against", "hap@50").exit_code == 0
    assert findings() == []


def test_a_comparison_is_judged_and_aged_as_any_spec_is(folder, tmp_path):
    """Of other sources, but the same where they decide, is of one age; `hap judge` and `hap compare` say the same."""
    copy = tmp_path / "copy"
    for part in ("reproductions", "results"):
        shutil.copytree(folder / part, copy / part)
    spec = write_spec(copy, SPEC + NARROW.replace("strangers-score", "hap@50"), "tiny")

    def age(**code):
        for file in (copy / "results" / "tiny").glob("hap@50-*/*.json"):
            run = json.loads(file.read_text())
            file.write_text(json.dumps({**run, "code": {**run["code"], **code}}))
        evidence = ["--results", str(copy / "results")]
        told = hap("compare", "strangers:worst", "--spec", "tiny", "--against", "hap@50", "--record", *evidence)
        assert told.exit_code == 0, told.output
        return hap("judge", str(spec), *evidence).stdout, told.stdout

    judged, told = age(sha256="0" * 64, commit=None)
    assert "STALE" not in judged
    assert conclusions.AGE not in told
    judged, told = age(decides="0" * 64)
    assert "STALE" in judged
    says = "stale, what decides it has changed since it was made. What is stale counts for nothing; --rerun runs"
    assert f"{conclusions.AGE}: {says}" in told
    (kept,) = (copy / "results" / "compare").iterdir()
    assert "STALE" in hap("judge", str(kept / "tiny.toml"), "--results", str(kept)).stdout
    lines = [each.line for each in lint(copy / "reproductions", copy / "results") if "compare" in str(each.file)]
    assert lines == []
    assert conclusions.AGE not in hap("compare", "strangers:worst", "--spec", "tiny", "--rerun").stdout


@pytest.mark.parametrize(("use", "role", "case"), [("method", "method", "hap@50"), ("implant", "implant", "implanted")])
def test_a_method_and_an_implant_are_compared_too(folder, use, role, case):
    told = hap("compare", f"strangers:{use}", "--role", role, "--spec", "tiny", "--against", case)
    assert told.exit_code == 0, told.output
    assert f"strangers:{use} in the place of {case.partition('@')[0]}, tiny" in told.stdout


def test_some_of_the_seeds_can_be_compared(folder):
    told = hap("compare", "strangers:worst", "--spec", "tiny", "--seeds", "0,2")
    assert told.exit_code == 0, told.stderr
    lines = rows(told.stdout[told.stdout.index("strangers:worst in the place of hap") :])[1:]
    assert [line[2] for line in lines] == ["2", "2"]
    assert "must be of the seeds of tiny" in hap("compare", "strangers:worst", "--spec", "tiny", "--seeds", "9").stderr


def test_haps_cases_can_be_run_here_too(folder):
    told = hap("compare", "strangers:same", "--spec", "tiny", "--against", "hap@50", "--rerun")
    assert told.exit_code == 0, told.output
    assert "/6] hap@50 seed 2: there after" in told.stdout
    assert "+0.00" in told.stdout


def test_what_can_be_compared_with_is_listed(folder):
    told = hap("compare", "--list")
    assert told.exit_code == 0
    assert told.stdout.splitlines() == [
        "bare: A tiny network on the digits",
        "  no evidence of hap@50, hap@70 yet: hap run bare",
        "tiny: A tiny network on the digits",
        "  in the place of hap@50 (0.5 of params), hap@70 (0.7 of params); seeds 0, 1, 2; by accuracy",
        "  ranked among hap, random, implanted; implants: yes",
        "  data: digits, here",
    ]


ON_TINY = [
    (["score", "--options", "depth=3"], "strangers:score.depth: unknown option; known are"),
    (["score", "--options", "width=wide"], "strangers:score.width: Input should be a valid"),
    (["untyped", "--options", "power=null"], "--options: a string, finite number, true, false, list or table expected"),
    (["untyped", "--options", "power=NaN"], "--options: a string, finite number, true, false, list or table expected"),
    (["score", "--options", "width"], "--options width: must be NAME=VALUE, each name once"),
    (["score", "--options", "width=1", "width=2"], "--options width=2: must be NAME=VALUE"),
    (["score", "--role", "idea"], "--role idea: must be one of score, method, implant"),
    (["score", "--against", "x"], "--against x: must be a case of tiny with this role, one of hap, random, implanted"),
    (["none"], "strangers:none: must name a function that exists (AttributeError"),
    (["no_groups"], "strangers:no_groups: cannot be called with what it is given"),
    (["nan"], "strangers:nan: scores: finite numbers expected, found 80 that are not"),
    (["short"], "strangers:short: scores: one number for each of 80 groups expected, found shape [3]"),
    (["a_list"], "strangers:a_list: a tensor of 80 real numbers expected, found list"),
    (["imaginary"], "strangers:imaginary: a tensor of 80 real numbers expected, found torch.complex64"),
    (["broken"], "strangers:broken: raised ZeroDivisionError: division by zero (in strangers.py, line "),
    (["no_plan", "--role", "method"], "strangers:no_plan: a model and its Plan expected, found Sequential"),
    (["no_module", "--role", "implant"], "strangers:no_module: "),
    (["leaves"], "strangers:leaves: raised SystemExit: no license (in strangers.py, line "),
    (["meta"], "strangers:meta: a tensor of 80 real numbers expected, found a tensor on the device meta"),
    (
        ["padded", "--role", "implant"],
        "strangers:padded: tiny: a model that takes the example of tiny expected, found ",
    ),
    *(
        ([name, "--role", "method"], f"strangers:{name}: {says}")
        for name, says in {
            "sparing": "a plan that removes 0.5 of the params expected, found 0.0",
            "boasting": "a plan that removes 0.5 of the params expected, found 0.0",
            "untouched": "the pruned model must be the one planned, with 0.50",
            "itself": "a pruned copy of the model expected, found the model itself",
            "another": "the pruned model must be the one planned, with 0.50",
            "stuck": "a model that takes the example of tiny expected, found RuntimeError: ",
            "squeezed": "a model with outputs of shape [[1, 10]] expected, as before, found [[5, 2]]",
            "of_others": "plan: 0 with 16 rows expected, as in the model, found 0",
            "not_json": "a plan that JSON can hold expected, found TypeError: ",
        }.items()
    ),
]
OTHERWISE = [
    ([], "compare: a function and --spec are needed; --list names the specs"),
    (["strangers:score"], "compare: a function and --spec are needed"),
    (["strangers:score", "--spec", "nothing"], "spec nothing: must be a file or a name in"),
    (["strangers:score", "--spec", "all"], "--spec all: must be one spec, found 2"),
    (["strangers.score", "--spec", "tiny"], "function.use: String should match pattern"),
    (["nowhere:score", "--spec", "tiny"], "nowhere:score: must name a function that exists (ModuleNotFoundError"),
    (["strangers:score", "--spec", "bare"], "bare: committed evidence of hap@50 expected, found none; `hap run`"),
]


@pytest.mark.parametrize(
    ("arguments", "says"),
    OTHERWISE + [([f"strangers:{name}", "--spec", "tiny", *more], says) for (name, *more), says in ON_TINY],
)
def test_bad_input_is_one_line(folder, unchecked, arguments, says):
    told = hap("compare", *arguments)
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1), told.output
    assert told.stderr.startswith(f"hap: {says}"), told.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("aborts", "its process was ended by SIGABRT\n"),
        ("broken", "raised ZeroDivisionError: division by zero (in strangers.py, line "),
        ("exhausts", "raised MemoryError: a made-up lack of it (in strangers.py, line "),
    ],
)
def test_a_function_that_ends_its_process_is_one_line(folder, name, says):
    """In a worker, as the command makes its runs."""
    told = CliRunner().invoke(cli.app, ["compare", f"strangers:{name}", "--spec", "tiny", "--against", "hap@50"])
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1), told.output
    assert told.stderr.startswith(f"hap: strangers:{name}: {says}")


def test_other_data_than_those_of_the_evidence_are_refused(folder, monkeypatch):
    data = tiny.ready()
    monkeypatch.setattr(tiny, "ready", lambda **options: replace(data, sha256="f" * 64))
    told = hap("compare", "strangers:score", "--spec", "tiny")
    assert told.exit_code == 2
    assert "tiny: the data of the committed evidence expected, sha256" in told.stderr
    assert "OTHERS than those of the evidence" in hap("compare", "--list").stdout


@pytest.fixture
def compared(folder):
    """Made-up runs: HAP at 90 %, a stranger so far from it for each seed; the comparison and its runs by case."""

    def make(apart, others=(), name="tiny"):
        path = folder / "reproductions" / f"{name}.toml"
        cases = [load_spec(path).cases[name] for name in apart]
        seeds = range(len(next(iter(apart.values()))))
        runs = {case.name: [with_accuracy(fake_run(case, seed), "one_shot", 90.0) for seed in seeds] for case in cases}
        for name, accuracy in others:
            case = load_spec(path).cases[name]
            runs[name] = [with_accuracy(fake_run(case, seed), "one_shot", accuracy) for seed in seeds]
        spec = load_spec(comparison.written(path, comparison.rival("strangers:score", {}, "score"), cases, runs))
        for mine, theirs in comparison.pairs(spec):
            each = zip(runs[theirs.name], apart[theirs.name], strict=True)
            own = [with_accuracy(run, "one_shot", 90.0 + value) for run, value in each]
            runs[mine.name] = [replace(run, case=mine.name, key=mine.key, config=mine.config) for run in own]
        return spec, runs

    return make


def differences(spec, runs):
    judged = judge.verdicts(spec.claims, runs, spec.seeds)
    return [conclusions.difference(spec, runs, verdict) for verdict in judged]


def sized(runs, samples):
    """The runs, on a test set of so many samples."""
    return {
        name: [replace(run, data={**run.data, "test_samples": samples}) for run in each] for name, each in runs.items()
    }


def test_intervals_are_students_paired_by_seed_and_wider_by_the_test_set(compared):
    spec, runs = compared({"hap@50": (apart := [1.0, 1.5, 2.25, 1.25])})
    (found,), (wide,) = (differences(spec, sized(runs, samples)) for samples in (10**15, 450))
    low, high = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    assert (found.verdict.low, found.verdict.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.says, wide.says) == ("better", "open")
    assert wide.verdict.low < low - 0.1 < high + 0.1 < wide.verdict.high


def test_intervals_of_many_seeds_are_the_wider_of_bca_and_student(compared):
    spec, runs = compared({"hap@50": (apart := list(np.random.default_rng(0).exponential(1, 20)))})
    (found,) = differences(spec, runs)
    bca = stats.bootstrap((apart,), np.mean, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    student = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    assert found.verdict.method.startswith("BCa")
    assert bca.high > student.high  # skewed to the right
    assert found.verdict.low == pytest.approx(student.low, abs=0.01)
    assert found.verdict.high == pytest.approx(bca.high, abs=0.05)


def test_the_differences_of_a_comparison_are_one_family(compared):
    """The oracle for p-values is scipy's one-sided t-test; a page has two digits of them."""
    two = {"hap@50": [1.0, 1.2, 1.1], "hap@70": [0.1, -0.2, 0.2]}
    both = differences(*compared(two))
    alone = [differences(*compared({name: apart}))[0] for name, apart in two.items()]
    tested = [stats.ttest_1samp(apart, 0, alternative="greater").pvalue for apart in two.values()]
    told = [float(each.verdict.method.rpartition(": p ")[2]) for each in both]
    assert told == [pytest.approx(2 * tested[0], rel=0.05), pytest.approx(tested[1], rel=0.05)]
    assert [(each.verdict.low, each.verdict.high) for each in both] == [
        (each.verdict.low, each.verdict.high) for each in alone
    ]
    near = stats.ttest_1samp(apart := [1.0, 1.4, 0.65], 0, alternative="greater").pvalue
    assert 0.0125 < near < 0.025
    assert differences(*compared({"hap@50": apart}))[0].says == "better"
    assert [each.says for each in differences(*compared({"hap@50": apart, "hap@70": apart[::-1]}))] == ["open"] * 2


RANKED = SPEC + "".join(f'[cases.{name}]\nlike = "hap"\nbudget = {{params = 0.5}}\n' for name in "abcd")


def test_a_rank_counts_who_is_ahead(compared, folder):
    others = (("a", 95.0), ("b", 91.0), ("c", 92.0), ("d", 80.0))
    path = write_spec(folder, RANKED, "ranked")
    (found,) = differences(*compared({"hap@50": [0.9, 1.0, 1.1]}, others, "ranked"))
    path.unlink()
    assert (found.rank, found.ranked) == (3, 6)  # 91 is not ahead of 91, and HAP is one of them


def page(spec, runs):
    return conclusions.page(spec, runs, judge.verdicts(spec.claims, runs, spec.seeds))


def test_the_sentences_say_what_can_be_concluded(compared):
    text = page(*compared({"hap@50": [5.0, 5.1, 5.2], "hap@70": [0.4, -0.3, 0.1]}))
    assert "Your method is better than hap before fine-tuning in hap@50 by 5.10." in text
    assert "Of the other 1 of 2 differences nothing can be concluded, equality neither." in text
    worse = page(*compared({"hap@50": [-5.0, -5.1, -5.2]}))
    assert "worse than hap before fine-tuning in hap@50 by 5.10" in worse
    one = page(*compared({"hap@50": [9.0]}))
    assert "One seed has no spread: nothing can be said of chance." in one
    assert "Nothing can be concluded: no difference from hap can be told from chance." in one
    twenty = page(*compared({"hap@50": list(np.linspace(0.5, 1.5, 20))}))
    assert "| BCa" in twenty
    assert "show large differences only" not in twenty


def test_methods_that_are_equal_for_every_seed_are_not_better(compared):
    (found,) = differences(*compared({"hap@50": [0.0, 0.0, 0.0]}))
    assert (found.verdict.observed, found.says) == (0, "open")
    sure = replace(found, verdict=replace(found.verdict, says=judge.Outcome.HOLDS))
    assert sure.says == "open"  # no worse, and no better


def elsewhere(runs, name, **changes):
    return {**runs, name: [replace(run, **changes) for run in runs[name]]}


def test_the_sentences_say_what_was_not_the_same(compared):
    spec, runs = compared({"hap@50": [1.0, 1.5]})
    mine = "strangers-score@50"
    data = {**runs[mine][0].data, "official": False}
    runs = elsewhere(runs, mine, environment={"torch": "3.0", "threads": 2}, data=data)
    runs[mine][0] = with_accuracy(runs[mine][0], "dense", 50.0)
    text = page(spec, runs)
    assert "made elsewhere (torch 3.0 here, None there; threads 2 here, None there)" in text
    assert "times cannot be compared. --rerun" in text
    assert "not the same for seed 0: pairs share less" in text
    assert "an unofficial copy" in text


def test_a_method_that_misses_the_budget_is_neither_better_nor_ranked(compared):
    """A ratio of groups may be missed, for the published code does; what is better with less pruned says nothing."""
    apart = {"hap@50": [5.0, 5.1, 5.2], "hap@70": [5.0, 5.1, 5.3]}
    missed = {"plan": {"removed": {"params": 0.4}}}
    spec, runs = compared(apart)
    runs = elsewhere(runs, "strangers-score@50", **missed)
    assert [(each.says, each.short) for each in differences(spec, runs)] == [("open", True), ("better", False)]
    text = page(spec, runs)
    assert [row[-1] for row in rows(text)] == ["rank", "budget missed", "1 of 2"]
    assert "better than hap before fine-tuning in hap@70" in text
    assert "prunes less than the budget asks (0.5 of the params in hap@50): nothing can be concluded there" in text
    spec, runs = compared({"hap@50": apart["hap@50"]})
    alone = page(spec, elsewhere(runs, "strangers-score@50", **missed))
    assert "Nothing can be concluded.\n\nYour method prunes less" in alone


def test_a_method_brings_implants_and_updates_of_its_own(folder):
    """In the place of a case that has both, it has neither."""
    text = SPEC.replace('implant = "hap', 'update = "hap.updates:least_squares"\nimplant = "hap')
    path = write_spec(folder, text, "updated")
    cases = comparison.baselines(load_spec(path), "method", "implanted")
    runs = {case.name: [fake_run(case, 0)] for case in cases}
    spec = load_spec(comparison.written(path, comparison.rival("strangers:method", {}, "method"), cases, runs))
    path.unlink()
    ((mine, theirs),) = comparison.pairs(spec)
    assert (mine.score, mine.implant, mine.update) == (None, None, None)
    assert theirs.implant is not None
    assert theirs.update is not None


@pytest.mark.parametrize("role", comparison.ROLES)
def test_every_spec_of_ours_has_one_more_case_in_a_comparison_and_keeps_its_keys(folder, role):
    for path in sorted((ROOT / "reproductions").glob("*.toml")):
        base = load_spec(path)
        if role == "implant" and not any(case.implant for case in base.cases.values()):
            continue
        cases = comparison.baselines(base, role)
        evidence = {each.name: [fake_run(each, 0)] for each in base.cases.values() if comparison.alike(each, cases[0])}
        evidence |= {case.name: [fake_run(case, 0)] for case in cases}
        rival = comparison.rival(f"strangers:{role}", {}, role)
        spec = load_spec(comparison.written(path, rival, cases, evidence))
        assert [theirs for _, theirs in comparison.pairs(spec)] == cases
        assert {name: spec.cases[name].key for name in evidence} == {name: base.cases[name].key for name in evidence}
        assert len(spec.claims) == sum(1 + bool(case.finetune) for case in cases)
        for mine, theirs in comparison.pairs(spec):
            assert getattr(mine, role) == rival.ref
            assert (mine.task, mine.budget, mine.finetune) == (theirs.task, theirs.budget, theirs.finetune)


def test_every_spec_of_ours_has_cases_of_hap_first():
    for path in sorted((ROOT / "reproductions").glob("*.toml")):
        spec = load_spec(path)
        cases = comparison.baselines(spec, "score")
        assert all(case.score.use in ("hap.methods:hessian_trace",) for case in cases), spec.name
        assert len({(case.budget.unit, case.budget.target) for case in cases}) == len(cases)


@pytest.mark.slow
def test_a_package_of_a_stranger_is_installed_and_compared(folder, tmp_path):
    """As a person would: pip install, then the command in a process of its own, in a folder with specs and evidence."""
    there = tmp_path / "site"
    source = tmp_path / "source"
    source.mkdir()
    for file in [PACKAGE / "pyproject.toml", *(PACKAGE / "second_opinion").glob("*.py")]:
        copy = source / file.relative_to(PACKAGE)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    installed = subprocess.run([*pip, "--target", str(there), str(source)], capture_output=True, text=True)
    if installed.returncode and ("No module named" in installed.stderr or "BackendUnavailable" in installed.stderr):
        pytest.skip(f"pip or setuptools is not there to install the example: {installed.stderr.strip()[-200:]}")
    assert installed.returncode == 0, installed.stderr
    assert (there / "second_opinion" / "scoring.py").exists()
    path = os.pathsep.join([str(there), str(ROOT), str(ROOT / "tests" / "harness")])
    mine = ["second_opinion.scoring:energy", "--options", "power=1"]
    command = [sys.executable, "-m", "hap", "compare", *mine, "--against", "hap@50", "--spec", "tiny"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "second_opinion.scoring:energy in the place of hap, tiny" in done.stdout
    assert " of 4" in done.stdout
