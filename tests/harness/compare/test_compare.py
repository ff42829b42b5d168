import json
import os
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
from hap.harness.compare import conclusions as comparison
from hap.harness.compare import rivals as compare
from hap.harness.compare.differences import Pairs, differences
from hap.harness.make import Job, ensure
from hap.harness.processes.workers import InProcess
from hap.harness.records import store
from hap.harness.spec.spec import load_spec

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
    assert head == ["case", "stage", "seeds", "yours", "hap", "difference", "95 % interval", "p (Holm)", "rank"]
    assert [line[0] for line in lines] == ["hap@50", "hap@70"]
    spec = load_spec(folder / "reproductions" / "tiny.toml")
    mine = [store.load(file) for file in sorted(Path(os.environ["HAP_CACHE"]).rglob("strangers-worst@50-*/seed?.json"))]
    theirs = store.evidence(spec, folder / "results", ["hap@50"])["hap@50"]
    accuracies = [np.array([run.metrics["one_shot"]["accuracy"] for run in runs]) for runs in (mine, theirs)]
    means = [each.mean() for each in accuracies]
    assert lines[0][3:6] == [f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[0] - means[1]:+.2f}"]
    assert lines[0][8] == "4 of 4"  # behind hap, random and implanted, all with half of the parameters gone
    assert lines[1][8] == "2 of 2"
    assert "| hap@50 | 5" in text
    assert "Intervals over 3 seeds are Student's, for the bootstrap needs 10 seeds" in text
    assert "Both ran with the same torch, device and threads" in text
    assert "says nothing of others" in text


def test_haps_own_score_is_no_different_from_itself(folder):
    text = hap("compare", "strangers:same", "--spec", "tiny", "--against", "hap@50").stdout
    lines = rows(text[text.index("strangers:same in") :])[1:]
    assert [(line[5], line[6], line[7]) for line in lines] == [("+0.00", "no spread seen", "1")]
    assert "Nothing can be concluded: no difference from hap is told from chance." in text


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
    before = compare.rival("edited.a:f", {}, "score").folder
    assert compare.rival("edited.a:f", {}, "score").folder == before
    (package / "helper.py").write_text("x = 1\n")
    assert compare.rival("edited.a:f", {}, "score").folder != before


def test_a_namespace_package_is_known_by_what_is_in_its_folder(tmp_path, monkeypatch):
    package = tmp_path / "unmarked"
    package.mkdir()
    (package / "a.py").write_text("def f(model, loss, batches, groups, *, rng): return 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    rival = compare.rival("unmarked.a:f", {}, "score")
    assert compare.rival("unmarked.a:f", {}, "score") == rival
    function = rival.ref.load()
    says = r"^unmarked.a:f: raised ZeroDivisionError: .* \(in a.py, line 1\)$"
    with pytest.raises(HapError, match=says), compare.blaming(rival):
        function(0, 0, 0, 0, rng=0)
    (package / "helper.py").write_text("x = 1\n")
    assert compare.rival("unmarked.a:f", {}, "score").folder != rival.folder


def test_a_module_that_exits_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "script_of_a_stranger.py").write_text("import sys\nsys.exit('usage: none')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HapError, match=r"script_of_a_stranger:f: must name a function .* \(SystemExit: usage: none"):
        compare.rival("script_of_a_stranger:f", {}, "score")


def test_record_keeps_the_result_where_no_spec_reads_it(folder):
    before, found = files(folder), lint(Path("reproductions"), Path("results"))
    told = hap("compare", "strangers:score", "--spec", "tiny", "--record", "--against", "hap@50")
    assert told.exit_code == 0, told.output
    assert lint(Path("reproductions"), Path("results")) == found
    new = sorted(files(folder).keys() - before.keys())
    assert [file.parent.relative_to(folder).as_posix() for file in new] == ["results/compare/tiny"] * 2
    assert [file.suffix for file in new] == [".json", ".md"]
    assert f"recorded in {new[0].relative_to(folder)}\n" in told.stdout
    table = json.loads(new[0].read_text())
    assert (table["function"]["use"], table["role"], table["spec"]) == ("strangers:score", "score", "tiny")
    assert [run["seed"] for run in table["runs"]] == [0, 1, 2]
    assert [each[:1] + each[2:3] for each in table["against"]] == [["hap@50", seed] for seed in (0, 1, 2)]
    assert new[1].read_text().startswith("strangers:score in the place of hap, tiny: test accuracy in points")
    assert {file: content for file, content in files(folder).items() if file in before} == before
    for file in new:
        file.unlink()


def damaged(table, damage):
    """The JSON of a recorded comparison with one thing changed."""
    damage(table)
    return json.dumps(table, indent=1)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda table: table["differences"][0].update(mine=99.0), "must be the mean of its runs"),
        (lambda table: table["differences"][0].update(mean=9.0), "mean must be"),
        (lambda table: table["differences"][0].update(p=float("nan")), "numbers must be finite"),
        (lambda table: table["differences"][0].update(case="gone"), "must be whole"),
        (lambda table: table["runs"].pop(), "with the seeds [0, 1, 2] of hap@50 (found [0, 1])"),
        (lambda table: table["runs"].append({}), "must be whole"),
        (lambda table: table["runs"][1].update(seconds=table["runs"][0]["seconds"]), "its seconds must be its own"),
        (lambda table: table["runs"][1]["metrics"]["selected"].update(accuracy=99.0), "selected must be"),
        (lambda table: table["function"].update(use="strangers:worst"), "its name must be strangers-worst-"),
        (lambda table: table.pop("role"), "must be whole"),
        (lambda table: table.update(schema=0), "schema must be 1 (found 0)"),
    ],
)
def test_what_is_wrong_with_a_recorded_comparison_is_found(folder, damage, told):
    before = files(folder)
    hap("compare", "strangers:score", "--spec", "tiny", "--record", "--against", "hap@50")
    file = next((folder / "results" / "compare" / "tiny").glob("*.json"))
    file.write_text(damaged(json.loads(file.read_text()), damage))
    lines = [each.line for each in lint(Path("reproductions"), Path("results")) if "compare" in str(each.file)]
    for new in files(folder).keys() - before.keys():
        new.unlink()
    assert any(told in line for line in lines), lines


def test_files_that_are_no_comparison_are_found(folder):
    before = files(folder)
    hap("compare", "strangers:score", "--spec", "tiny", "--record", "--against", "hap@50")
    record, page = sorted((folder / "results" / "compare" / "tiny").iterdir())
    whole, text = record.read_bytes(), page.read_text()

    def told():
        return [each.line for each in lint(Path("reproductions"), Path("results")) if "compare" in str(each.file)]

    assert told() == []
    for damage in (b"{", b"\xff", b"[]", b"null", b"{}"):
        record.write_bytes(damage)
        assert [line.partition(" (")[0].endswith("a comparison must be whole") for line in told()] == [True]
    record.write_bytes(whole)
    page.write_text(text.replace("strangers:score in", "Something in"))
    assert [line for line in told() if "the head must be what its JSON gives" in line]
    page.write_text(text.replace(text.split("\n\n")[3], "All is proven."))
    assert [line for line in told() if "the conclusion must be what its JSON gives" in line]
    page.write_text("")
    assert told()
    page.unlink()
    assert [f"{page.name} must lie beside it (found none)" in line for line in told()] == [True]
    page.write_text(text)
    record.unlink()
    assert [f"{record.name} must lie beside it (found none)" in line for line in told()] == [True]
    page.rename(page.with_suffix(".txt"))
    assert ["a comparison must be <spec>/" in line for line in told()] == [True]
    for new in files(folder).keys() - before.keys():
        new.unlink()


@pytest.mark.parametrize(("use", "role", "case"), [("method", "method", "hap@50"), ("implant", "implant", "implanted")])
def test_a_method_and_an_implant_are_compared_too(folder, use, role, case):
    told = hap("compare", f"strangers:{use}", "--role", role, "--spec", "tiny", "--against", case)
    assert told.exit_code == 0, told.output
    assert f"strangers:{use} in the place of {case.partition('@')[0]}, tiny" in told.stdout


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


def pairs(spec, differences_by_case, others=()):
    """Made-up runs: HAP at 90 %, a rival so far from it for each seed."""
    found = []
    for name, apart in differences_by_case.items():
        case = spec.cases[name]
        theirs = [with_accuracy(fake_run(case, s), "one_shot", 90.0) for s in range(len(apart))]
        mine = [with_accuracy(run, "one_shot", 90.0 + d) for run, d in zip(theirs, apart, strict=True)]
        ranked = {n: [with_accuracy(run, "one_shot", a) for run in theirs] for n, a in others}
        found.append(Pairs(case, mine, theirs, ranked))
    return found


@pytest.fixture
def spec(made):
    return load_spec(made / "reproductions" / "tiny.toml")


def sized(pairs, samples):
    """The pairs, on a test set of so many samples."""
    runs = [
        [replace(run, data={**run.data, "test_samples": samples}) for run in each]
        for each in (pairs.mine, pairs.theirs)
    ]
    return Pairs(pairs.case, *runs, pairs.others)


def test_intervals_are_students_paired_by_seed_and_wider_by_the_test_set(spec):
    (given,) = pairs(spec, {"hap@50": (apart := [1.0, 1.5, 2.25, 1.25])})
    (found,), (wide,) = (differences(spec, [sized(given, samples)]) for samples in (10**15, 450))
    expected = stats.ttest_1samp(apart, 0)
    low, high = expected.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-3)
    assert wide.interval.low < low - 0.1 < high + 0.1 < wide.interval.high
    assert wide.p > found.p


def test_intervals_of_many_seeds_are_the_wider_of_bca_and_student(spec):
    (given,) = pairs(spec, {"hap@50": (apart := list(np.random.default_rng(0).exponential(1, 20)))})
    (found,) = differences(spec, [sized(given, 10**15)])
    bca = stats.bootstrap((apart,), np.mean, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    student = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    assert found.interval.kind == "BCa"
    assert bca.high > student.high  # skewed to the right
    assert found.interval.low == pytest.approx(student.low, abs=0.01)
    assert found.interval.high == pytest.approx(bca.high, abs=0.05)


def test_the_differences_of_a_comparison_are_one_family(spec):
    two = {"hap@50": [1.0, 1.2, 1.1], "hap@70": [0.1, -0.2, 0.2]}
    both = differences(spec, pairs(spec, two))
    alone = [differences(spec, pairs(spec, {name: apart}))[0] for name, apart in two.items()]
    assert both[0].p == pytest.approx(2 * alone[0].p)
    assert both[1].p == pytest.approx(max(alone[1].p, both[0].p))
    assert [each.interval for each in both] == [each.interval for each in alone]


def test_a_rank_counts_who_is_ahead(spec):
    others = (("a", 95.0), ("b", 91.0), ("c", 92.0), ("d", 80.0))
    (found,) = differences(spec, pairs(spec, {"hap@50": [0.9, 1.0, 1.1]}, others))
    assert (found.rank, found.ranked) == (3, 5)  # equal to none: 91 is not ahead of 91


def sentences(spec, given):
    return " ".join(comparison.sentences(spec, given, differences(spec, given), "hap"))


def test_the_sentences_say_what_can_be_concluded(spec):
    text = sentences(spec, pairs(spec, {"hap@50": [5.0, 5.1, 5.2], "hap@70": [0.4, -0.3, 0.1]}))
    assert "Your method is better than hap before fine-tuning in hap@50 by 5.10." in text
    assert "Of the other 1 of 2 differences nothing can be concluded, equality neither." in text
    assert "worse than hap before fine-tuning in hap@50 by 5.10" in sentences(
        spec, pairs(spec, {"hap@50": [-5.0, -5.1, -5.2]})
    )
    assert "One seed has no spread: nothing can be said of chance." in sentences(spec, pairs(spec, {"hap@50": [9.0]}))
    twenty = sentences(spec, pairs(spec, {"hap@50": list(np.linspace(0.5, 1.5, 20))}))
    assert "Intervals over 20 seeds are the wider of the bootstrap's (BCa) and Student's" in twenty
    assert "find large differences only" not in twenty


def test_the_sentences_say_what_was_not_the_same(spec):
    given = pairs(spec, {"hap@50": [1.0, 1.5]})
    elsewhere = [replace(run, environment={"torch": "3.0", "threads": 2}) for run in given[0].mine]
    worse = [
        replace(run, data={**run.data, "official": False}, code={"commit": None, "sha256": "9"}) for run in elsewhere
    ]
    other = [with_accuracy(worse[0], "dense", 50.0), worse[1]]
    text = sentences(spec, [replace(given[0], mine=other)])
    assert "made elsewhere (torch 3.0 here, None there; threads 2 here, None there)" in text
    assert "times cannot be compared. They are of another state of the code, commit abc. --rerun" in text
    assert "not the same for seed 0: pairs share less" in text
    assert "an unofficial copy" in text


def test_a_method_that_misses_the_budget_is_neither_better_nor_ranked(spec):
    """A ratio of groups may be missed, for the published code does; what is better with less pruned says nothing."""
    given = pairs(spec, {"hap@50": [5.0, 5.1, 5.2], "hap@70": [5.0, 5.1, 5.3]})
    mine = [replace(run, plan={**run.plan, "removed": {"params": 0.4}}) for run in given[0].mine]
    given[0] = replace(given[0], mine=mine)
    found = differences(spec, given)
    assert [(each.verdict, each.short) for each in found] == [("open", True), ("better", False)]
    table = "head\n\n" + comparison.quality(given, found, "hap")
    assert [row[-1] for row in rows(table)] == ["rank", "budget missed", "1 of 1"]
    text = sentences(spec, given)
    assert "better than hap before fine-tuning in hap@70" in text
    assert "prunes less than the budget asks (0.5 of the params in hap@50): budgets differ, so nothing" in text
    alone = sentences(spec, given[:1])
    assert "Nothing can be concluded. Your method prunes less" in alone


def test_every_spec_of_ours_has_cases_of_hap_first():
    for path in sorted((ROOT / "reproductions").glob("*.toml")):
        spec = load_spec(path)
        cases = compare.baselines(spec, "score")
        assert all(case.score.use in ("hap.methods:hessian_trace",) for case in cases), spec.name
        assert len({(case.budget.unit, case.budget.target) for case in cases}) == len(cases)


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
