import json
import os
import re
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from fakes import fake_run, write_spec
from test_history import ROW
from test_regressions import nights, timings
from typer.testing import CliRunner

from hap import HapError
from hap.harness.cli import app as cli
from hap.harness.nightly import history, speed
from hap.harness.nightly import measure as nightly
from hap.harness.processes import provenance
from hap.harness.processes.workers import InProcess
from hap.harness.spec.spec import load_spec
from hap.harness.task import Data, MissingData

ROOT = Path(__file__).parents[3]
RATIOS = {"tracing": 2.0, "curvature": 3.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tiny spec, its benchmarks replaced by numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HAP_CACHE", raising=False)
    monkeypatch.setattr(speed, "works", lambda root: {})
    monkeypatch.setattr(speed, "ratios", lambda works, reference: dict(RATIOS))
    write_spec(tmp_path, tiny.SPEC, "tiny")
    return tmp_path


@pytest.fixture
def made_up(folder, monkeypatch):
    """Runs that are numbers, and take no time."""

    def run(case, seed, *, known, say, keep):
        return replace(fake_run(case, seed % 7), seed=seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    monkeypatch.setattr("hap.harness.records.store._belongs", lambda run, file: None)
    monkeypatch.setattr("hap.harness.records.store.save", saved)
    return folder


def saved(run, results):
    from dataclasses import asdict

    for file in (results / run.spec / f"{run.case}-{run.key}").glob(".seed*.lock"):
        environment = {"python": "3.11", "torch": "2.15", "device": "cpu", "threads": 1}
        content = json.dumps(asdict(replace(run, environment=environment)))
        file.with_name(file.name[1:].removesuffix(".lock")).write_text(content)


def hap(*args):
    """The command, with records made in this process, where a test has put something in the place of a run."""
    return CliRunner().invoke(cli.app, args, obj=InProcess())


@pytest.mark.slow
def test_a_scorer_with_a_sign_error_is_found_by_the_real_command(folder, monkeypatch):
    """Five nights of real runs: trained, traced, scored, pruned and tested with seeds of their own."""
    write_spec(folder, tiny.SPEC.replace("[0.5, 0.7]", "[0.5]"), "tiny")
    for night in range(4):
        told = hap("nightly", "tiny", "--night", f"n{night}", "--no-speed")
        assert told.exit_code == 0, told.output
    monkeypatch.setattr(tiny, "SIGN", -1)
    told = hap("nightly", "tiny", "--night", "n4", "--no-speed", "--summary", "s.md", "--junit", "j.xml")
    assert told.exit_code == 1
    lines = [line for line in told.stdout.splitlines() if line.startswith("REGRESSION ")]
    assert lines
    assert any(line.startswith("REGRESSION tiny/hap@50/accuracy/one_shot: 9") for line in lines)
    assert all("(night n4; before it " in line for line in lines)
    assert "at most 1 % of quiet nights say so falsely\n" in told.stdout
    assert "# Night n4" in (folder / "s.md").read_text()
    suite = ElementTree.parse(folder / "j.xml").getroot()
    assert len(suite.findall("testcase/failure")) == len(lines)
    kept = history.load(folder / ".hap" / "history.jsonl")
    assert {(row.night, row.case, row.stage) for row in kept} == {
        (f"n{i}", "hap@50", stage) for i in range(5) for stage in ("one_shot", "selected")
    }
    assert len({row.seed for row in kept}) == 15
    assert {row.claim for row in kept if row.stage == "one_shot"} == {"Half of the network is enough"}
    assert not (folder / "results").exists()
    assert not list((folder / ".hap" / "nightly").iterdir())


def test_a_night_says_what_it_measured(made_up):
    told = hap("nightly")
    assert told.exit_code == 0
    assert "/7] tiny hap@50 seed " in told.stdout
    assert "benchmarks: there after" in told.stdout
    assert " are in .hap/history.jsonl\n" in told.stdout
    assert "0 of 0 series got worse, 6 are too young to be compared; at most 1 % of quiet" in told.stdout
    kept = history.load(made_up / ".hap" / "history.jsonl")
    assert len(kept) == 2 * 2 * 3 + 2
    speeds = [row for row in kept if row.spec == "speed"]
    assert {row.case: (row.metric, row.value, row.seed) for row in speeds} == {
        name: ("ratio", value, None) for name, value in RATIOS.items()
    }
    assert speeds[0].machine["threads"] == speed.THREADS
    assert len(speeds[0].code) == 64
    assert hap("nightly").exit_code == 0
    again = history.load(made_up / ".hap" / "history.jsonl")
    first, second = history.nights(again)
    assert second == f"{first}.2"
    assert {row.seed for row in again if row.night == first and row.seed} & {
        row.seed for row in again if row.night == second and row.seed
    } == set()


def test_committed_evidence_is_not_touched(made_up):
    results = made_up / "results"
    results.mkdir()
    (results / "kept").write_text("as it was")
    hap("nightly")
    assert [(each.name, each.read_text()) for each in results.iterdir()] == [("kept", "as it was")]


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        (nights([97.5] * 20 + [96.5] * 2, 0.4), "digits/hap/accuracy/selected: 97.5"),
        (timings([2.0] * 15 + [2.6] * 2, spec="speed", stage=""), "speed/hap/ratio: 2"),
    ],
)
def test_what_a_history_hides_is_found_by_the_command(folder, bad, where):
    """One percent lower accuracy, and a kernel 30 % slower."""
    history.append(Path("h.jsonl"), bad)
    told = hap("nightly", "--no-run", "--history", "h.jsonl")
    assert told.exit_code == 1
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("REGRESSION ")]
    assert line.startswith(f"REGRESSION {where}")
    assert " since " in line
    name = line.split()[1].removesuffix(":")
    assert hap("nightly", "--accept", name, "--why", "by design", "--history", "h.jsonl").exit_code == 0
    last = [row for row in bad if row.night == bad[-1].night]
    history.append(Path("h.jsonl"), [replace(row, night="after") for row in last])
    assert hap("nightly", "--no-run", "--history", "h.jsonl").exit_code == 0


def test_a_damaged_history_is_one_line_before_anything_runs(made_up, monkeypatch):
    monkeypatch.setattr("hap.harness.run.run", lambda *a, **o: pytest.fail("must not run"))
    Path("h.jsonl").write_text("{\n")
    told = hap("nightly", "--history", "h.jsonl")
    assert told.exit_code == 2
    assert told.stderr.startswith("hap: h.jsonl: line 1: damaged: must be JSON")
    assert told.stderr.count("\n") == 1
    assert Path("h.jsonl").read_text() == "{\n"


def test_what_breaks_does_not_stop_the_night(made_up, monkeypatch):
    def run(case, seed, *, known, say, keep):
        if case.name == "hap@70":
            raise ZeroDivisionError("a bug")
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    told = hap("nightly", "--junit", "j.xml", "--summary", "s.md")
    assert told.exit_code == 1
    assert told.stdout.count("BROKE: ZeroDivisionError: a bug") == 3
    assert len(history.load(made_up / ".hap" / "history.jsonl")) == 2 * 3 + 2
    errors = ElementTree.parse(made_up / "j.xml").getroot().findall("testcase/error")
    assert len(errors) == 3
    assert "Traceback" in errors[0].text
    assert "BROKE: ZeroDivisionError" in (made_up / "s.md").read_text()


@pytest.mark.slow
def test_a_record_that_ends_its_process_does_not_end_the_night(folder):
    """The real command, its records in a process of their own, which dies with some."""
    case = '[cases.aborts]\nlike = "hap"\nscore = "strangers:aborts"\n\n[[claims]]'
    write_spec(folder, tiny.SPEC.replace("[0.5, 0.7]", "[0.5]").replace("[[claims]]", case), "tiny")
    arguments = ["nightly", "tiny", "--night", "n1", "--no-speed", "--junit", "j.xml", "--summary", "s.md"]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 1, told.output
    lines = [line for line in told.stdout.splitlines() if " BROKE: its process was ended by SIGABRT; to repeat" in line]
    assert len(lines) == 3
    assert re.search(r"^tiny aborts@50 seed \d+ BROKE: .*: hap record reproductions/tiny.toml aborts@50 \d+ ", lines[0])
    assert {row.case for row in history.load(Path(".hap/history.jsonl"))} == {"hap@50"}
    errors = ElementTree.parse("j.xml").getroot().findall("testcase/error")
    assert ["SIGABRT" in error.get("message") for error in errors] == [True] * 3
    assert Path("s.md").read_text().count("SIGABRT") == 3


def interrupted(monkeypatch, *arguments):
    """A night that ends after three runs."""
    made = []

    def run(case, seed, *, known, say, keep):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(seed)
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    assert hap("nightly", "--no-speed", *arguments).exit_code == 130
    more = []
    monkeypatch.setattr(
        "hap.harness.run.run", lambda case, seed, *, known, say, keep: more.append(seed) or fake_run(case, seed)
    )
    return more


def test_an_interrupted_night_goes_on_with_the_same_seeds(made_up, monkeypatch):
    more = interrupted(monkeypatch)
    assert history.load(made_up / ".hap" / "history.jsonl") == []
    assert hap("nightly", "--no-speed").exit_code == 0
    assert len(more) == 3
    assert len(history.load(made_up / ".hap" / "history.jsonl")) == 12


def test_an_interrupted_night_goes_on_on_another_day(made_up, monkeypatch):
    days = iter(["2026-11-22", "2026-11-23", "2026-11-24"])
    first = nightly.name
    monkeypatch.setattr(nightly, "name", lambda taken: first(taken, next(days)))
    more = interrupted(monkeypatch)
    write_spec(made_up, tiny.SPEC, "other")
    assert hap("nightly", "--no-speed", "other").exit_code == 0  # other specs are another night
    assert len(more) == 6
    assert hap("nightly", "--no-speed", "tiny").exit_code == 0
    assert len(more) == 9
    assert history.nights(history.load(made_up / ".hap" / "history.jsonl")) == ["2026-11-23", "2026-11-22"]
    assert not list((made_up / ".hap" / "nightly").rglob("*.json"))


def test_a_night_of_other_code_does_not_go_on(made_up, monkeypatch):
    more = interrupted(monkeypatch, "--night", "n1")
    monkeypatch.setattr(nightly.provenance, "code", lambda: {"commit": None, "dirty": False, "sha256": "f" * 64})
    told = hap("nightly", "--no-speed", "--night", "n1")
    assert (told.exit_code, told.stderr) == (2, "hap: --night n1: was begun by other code; choose another name\n")
    told = hap("nightly", "--no-speed")
    assert told.exit_code == 0
    assert "night n1 was begun by other code and never ended: its runs are dropped" in told.stdout
    assert len(more) == 6
    assert not (made_up / ".hap" / "nightly" / "n1").exists()


def test_a_night_torn_by_a_full_disk_is_not_gone_on_with(made_up, monkeypatch):
    interrupted(monkeypatch, "--night", "n1")
    (made_up / ".hap" / "nightly" / "n1" / "night.json").write_text('{"spe')
    assert hap("nightly", "--no-speed", "--night", "n2").exit_code == 0
    assert history.nights(history.load(made_up / ".hap" / "history.jsonl")) == ["n2"]


def test_a_machine_without_the_data_leaves_a_spec_out_and_says_so(made_up, monkeypatch):
    def missing(**options):
        raise MissingData("tiny: a file expected, found none")

    monkeypatch.setattr(tiny, "ready", missing)
    told = hap("nightly", "--summary", "s.md")
    assert told.exit_code == 0
    assert "tiny is left out: tiny: a file expected" in told.stdout
    assert "- tiny is left out" in (made_up / "s.md").read_text()
    told = hap("nightly", "--no-speed")
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
    assert "nothing could be measured: tiny is left out" in told.stderr


def test_a_spec_for_a_gpu_is_left_out_where_there_is_none(made_up, monkeypatch):
    monkeypatch.delenv("HAP_DEVICE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_spec(made_up, tiny.SPEC.replace('"quick"', '"gpu"'), "large")
    told = hap("nightly", "--no-speed")
    assert told.exit_code == 0
    assert "large is left out: large: a GPU expected" in told.stdout
    assert {row.spec for row in history.load(made_up / ".hap" / "history.jsonl")} == {"tiny"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "spec nothing: must be a file or a name in"),
        (["--tier", "huge"], "--tier huge: no spec is of this tier"),
        (["--no-run"], ".hap/history.jsonl: a history with a night is needed to judge it again, found none"),
        (["--night", "n1", "--history", "h.jsonl"], "--night n1: must be new, found it in h.jsonl"),
        *[
            (["--night", name], f"--night {name}: must be of letters, digits, '.', '_' and '-'")
            for name in ("..", ".", "/tmp/n1", "a/b", "", "-1")
        ],
        (["--history", "h.jsonl/more"], "h.jsonl"),
        (["--accept", "x/y", "--history", "h.jsonl"], "--accept x/y: must be a series of h.jsonl, one of digits/hap/"),
        (["--accept", "digits/hap/accuracy/selected", "--history", "h.jsonl"], "needs a reason, --why TEXT"),
    ],
)
def test_bad_input_is_one_line(made_up, arguments, says, monkeypatch):
    history.append(Path("h.jsonl"), [ROW])
    monkeypatch.setattr(nightly, "measure", None)  # nothing is measured before it is told
    told = hap("nightly", *arguments)
    assert told.exit_code == 2
    assert says in told.stderr
    assert told.stderr.count("\n") == 1


def test_a_full_disk_keeps_the_records_of_the_night(made_up, monkeypatch):
    def full(file, rows):
        raise HapError(f"{file}: cannot be written (No space left on device); what was there before is untouched")

    monkeypatch.setattr(history, "append", full)
    told = hap("nightly", "--no-speed", "--night", "n1")
    assert told.exit_code == 2
    assert "No space left on device" in told.stderr
    assert len(list((made_up / ".hap" / "nightly" / "n1").rglob("seed*.json"))) == 6


def test_regressions_are_told_where_the_summary_cannot_be_written(made_up):
    told = hap("nightly", "--no-speed", "--summary", "/proc/none/s.md")
    assert told.exit_code == 2
    assert "series got worse" in told.stdout
    assert "/proc/none/s.md" in told.stderr


def test_seeds_are_those_of_the_night_and_as_many_as_the_spec_has(made_up):
    spec = load_spec(made_up / "reproductions" / "tiny.toml")
    assert nightly.seeds("2026-11-22", spec) == nightly.seeds("2026-11-22", spec)
    assert len({*nightly.seeds("a", spec), *nightly.seeds("b", spec)}) == 6
    assert nightly.name([], "2026-11-22") == "2026-11-22"
    assert nightly.name(["2026-11-22", "2026-11-22.2"], "2026-11-22") == "2026-11-22.3"


class Clock:
    """Time that passes as works say, on a machine whose pace changes."""

    def __init__(self, paces):
        self.paces, self.calls = paces, 0

    def work(self, seconds):
        def once():
            self.calls += 1
            return seconds * self.paces[self.calls % len(self.paces)]

        return once


@pytest.mark.parametrize("pace", [[1.0], [5.0], [1.0, 1.02, 0.98]])
def test_a_ratio_is_free_of_the_pace_of_the_machine(pace):
    clock = Clock(pace)
    found = speed.ratios({"a": clock.work(2.0), "b": clock.work(0.5)}, clock.work(1.0), rounds=9)
    assert found == {"a": pytest.approx(2.0, rel=0.05), "b": pytest.approx(0.5, rel=0.05)}


def test_a_pause_in_one_round_does_not_move_a_ratio():
    times = iter([1.0] * 3 + [1.0, 9.0, 1.0] + [1.0] * 30)
    found = speed.ratios({"a": lambda: 2 * next(times)}, lambda: 1.0, rounds=5)
    assert found == {"a": 2.0}


def test_the_reference_takes_time_and_the_processor_has_a_name():
    assert speed.product()() > 0
    assert provenance.processor()


def test_a_folder_without_benchmarks_says_so(tmp_path):
    with pytest.raises(MissingData, match=r"watched\.py expected, which a checkout has, found none"):
        speed.works(tmp_path)


@pytest.mark.slow
def test_the_works_of_this_checkout_are_those_of_its_benchmarks(monkeypatch):
    """The cheapest of them is done once; all of them are timed by a night."""
    found = speed.works(ROOT)
    kinds = [name.split()[0] for name in found]
    assert {"curvature", "tracing", "training", "latency"} <= set(kinds)
    latency = next(work for name, work in found.items() if name.startswith("latency"))
    assert 0 < latency() < 60


def test_the_workflows_run_what_a_person_runs():
    folder = ROOT / ".github" / "workflows"
    night, push = (yaml.safe_load((folder / f"{name}.yml").read_text()) for name in ("nightly", "ci"))
    assert any(step.get("run") == "bash .ci/run" for step in push["jobs"]["ci"]["steps"])
    assert night["jobs"]["nightly"]["runs-on"] == ["self-hosted", "gpu"]
    assert set(night[True]) == {
        "schedule",
        "workflow_dispatch",
    }  # `on`; pull requests of strangers run on no own machine
    script = "\n".join(step.get("run", "") for step in night["jobs"]["nightly"]["steps"])
    assert "nox -s nightly -- $SPECS --history .hap/history/history.jsonl" in script
    schedules = [each["cron"] for each in night[True]["schedule"]]
    chosen = night["jobs"]["nightly"]["env"]["SPECS"]
    assert f"github.event.schedule == '{schedules[1]}'" in chosen
    short = re.findall(r"'([a-z0-9 -]+)' *}}", chosen)[0].split()
    assert all((ROOT / "reproductions" / f"{name}.toml").is_file() for name in short)
    assert "push origin HEAD:history" in script


def git(*arguments, cwd):
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_the_history_of_the_workflow_is_a_branch_that_grows_by_a_commit_a_night(tmp_path):
    """The steps of the workflow themselves, on a repository beside its origin; a row stands for what a night adds."""
    text = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    scripts = {step.get("name"): step.get("run") for step in text["jobs"]["nightly"]["steps"]}
    origin, clone, who = (
        tmp_path / "origin",
        tmp_path / "clone",
        ["-c", "user.name=x", "-c", "user.email=x@example.org"],
    )
    git("init", "-q", "--bare", str(origin), cwd=tmp_path)
    git("clone", "-q", str(origin), str(clone), cwd=tmp_path)
    (clone / "code").write_text("x")
    git("add", ".", cwd=clone)
    git(*who, "commit", "-qm", "Begin", cwd=clone)
    git("push", "-q", "origin", "HEAD:main", cwd=clone)
    for night in range(3):
        run = partial(subprocess.run, cwd=clone, check=True, env={**os.environ, "GITHUB_STEP_SUMMARY": "summary.tmp"})
        run(["bash", "-e", "-c", scripts["Fetch the history"]], capture_output=True)
        assert (
            sorted(each.name for each in (clone / ".hap" / "history").iterdir())
            == [".git", "history.jsonl"][: 1 + (night > 0)]
        )
        history.append(clone / ".hap" / "history" / "history.jsonl", [replace(ROW, night=f"n{night}")])
        run(["bash", "-e", "-c", scripts["Keep the history"]], capture_output=True)
    assert git("log", "--format=%s", "history", cwd=origin).split("\n") == ["Add a night"] * 3 + [""]
    kept = git("show", "history:history.jsonl", cwd=origin)
    assert [json.loads(line)["night"] for line in kept.splitlines()] == ["n0", "n1", "n2"]
    assert git("status", "--porcelain", "--", "code", cwd=clone) == ""


def test_data_of_a_task_is_what_makes_it_ready():
    assert isinstance(tiny.ready(), Data)
