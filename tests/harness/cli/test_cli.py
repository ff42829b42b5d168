import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from fakes import LARGE, SPEC, fake_run, with_accuracy, write_spec
from typer.testing import CliRunner

from hap.harness.cli import app as cli
from hap.harness.cli import terminal
from hap.harness.processes.progress import Event
from hap.harness.processes.workers import InProcess
from hap.harness.records import store
from hap.harness.spec.spec import load_spec
from hap.harness.task import Data, MissingData

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one spec, whose runs are made up: hap is a little better than random."""

    def run(case, seed, *, known, say, keep):
        say(Event("fine-tuning", 0.5))
        better = 0.5 if case.name == "hap" else 0.0
        return with_accuracy(fake_run(case, seed), "selected", 94.0 + better + seed / 10 * better)

    monkeypatch.setattr("hap.harness.run.run", run)
    monkeypatch.chdir(tmp_path)
    write_spec(tmp_path)
    return tmp_path


def hap(*args):
    """The command, with records made in this process, where a test has put something in the place of a run."""
    return CliRunner().invoke(cli.app, args, obj=InProcess())


def test_run_makes_judges_reports_and_sums_up(folder):
    told = hap("run", "table")
    assert told.exit_code == 0
    assert "table [1/6] hap seed 0\n" in told.stdout
    assert "table [6/6] random seed 2: there after 0." in told.stdout
    assert (
        "  HOLDS     hap is no worse than random\n"
        f"             observed 0.55 (0.4657 to 0.6343; Student, test set of {LARGE}) over 3 seeds, "
        "claimed accuracy selected of hap - random >= 0 ± 0.5\n"
        "             its records do not say which samples were right, so the error of the test set is a bound, on the "
        "safe side\n"
        "             whether its code is that of today is not known: git has no commit abc here\n"
        "             source: the suite\n"
    ) in told.stdout
    for file in ("results/table", "results/tables/table.csv", "results/tables/table.md", "results/VERDICTS.md"):
        assert (folder / file).exists()
        assert f" {file}\n" in told.stdout
    assert len(list((folder / "results").rglob("seed*.json"))) == 6


def test_run_makes_only_what_is_missing_unless_told_again(folder, monkeypatch):
    hap("run", "table")
    made = []
    monkeypatch.setattr(
        "hap.harness.run.run", lambda case, seed, *, known, say, keep: made.append(seed) or fake_run(case, seed)
    )
    assert hap("run", "all").exit_code == 0
    assert made == []
    hap("run", "table", "--again", "--case", "random")
    assert made == [0, 1, 2]


def test_one_case_and_another_folder(folder):
    told = hap("run", "reproductions/table.toml", "--case", "hap", "--results", "mine")
    assert told.exit_code == 0
    assert "ABSENT" in told.stdout
    assert len(list((folder / "mine").rglob("seed*.json"))) == 3
    assert not (folder / "results").exists()


def test_a_case_is_also_the_name_of_all_its_budgets(folder):
    write_spec(folder, SPEC.split("[[claims]]")[0].replace("params = 0.7", "params = [0.5, 0.7]"), "many")
    hap("run", "many", "--case", "hap")
    assert len(list((folder / "results" / "many").iterdir())) == 2


def test_a_terminal_gets_a_bar(folder, monkeypatch):
    from rich.console import Console

    console = Console(force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(cli, "out", console)
    told = hap("run", "table")
    assert told.exit_code == 0
    assert "6/6" in told.stdout
    assert "table [1/6]" not in told.stdout


def test_tiers_choose_specs(folder):
    write_spec(folder, SPEC.replace('tier = "quick"', 'tier = "gpu"'), "slow")
    assert hap("run", "--tier", "quick").exit_code == 0
    assert [path.name for path in (folder / "results").iterdir() if path.name in ("table", "slow")] == ["table"]
    told = hap("run", "--tier", "cpu")
    assert (told.exit_code, told.stderr) == (2, "hap: --tier cpu: no spec is of this tier\n")


def test_judge_runs_nothing_and_fails_on_a_surprise(folder):
    told = hap("judge")
    assert told.exit_code == 0
    assert told.stdout.count("ABSENT") == 2
    hap("run", "table")
    write_spec(folder, SPEC.replace("value = 70", "value = 80"))
    told = hap("judge", "table")
    assert told.exit_code == 1
    assert "  FAILS     more than 70 % of the parameters go" in told.stdout
    write_spec(folder, SPEC.replace("value = 70", 'value = 80\nknown = "a made-up world"'))
    told = hap("judge", "table")
    assert told.exit_code == 0
    assert "known: a made-up world" in told.stdout


def test_judge_for_a_release_fails_on_what_is_absent_or_of_unknown_age(folder):
    assert hap("judge", "--release").exit_code == 1
    hap("run", "table")
    assert hap("judge").exit_code == 0
    told = hap("judge", "table", "--release")
    assert told.exit_code == 1
    assert "whether its code is that of today is not known: git has no commit abc here" in told.stdout


def test_report_writes_from_evidence(folder):
    told = hap("report")
    assert told.exit_code == 0
    names = ["tables/table.csv", "tables/table.md", "tables/table.tex", "VERDICTS.md", "index.html"]
    assert told.stdout.split() == [f"results/{name}" for name in names]


def test_report_tells_in_one_line_what_the_page_lacks(folder, monkeypatch):
    hap("run", "table")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    told = hap("report")
    assert told.exit_code == 0
    line = "no interactive plots: vl_convert not installed; pip install 'hap[page]'"
    assert told.stdout.splitlines()[-1] == f"index.html has {line}"
    text = (folder / "results" / "index.html").read_text()
    assert f'<p class="warning">{line}</p>' in unescape(text)
    assert "vegaEmbed(" not in text.partition('"use strict"')[0]


def test_list_tells_what_there_is(folder):
    write_spec(folder, "x = 1", "broken")
    hap("run", "table", "--case", "hap")
    lines = hap("list").stdout.splitlines()
    assert lines[0].split() == "broken cannot be read: reproductions/broken.toml: title: is required".split()
    assert lines[1].split() == "table quick 2 cases, 3 of 6 runs made: A made-up table".split()


def test_list_tells_what_a_spec_needs(folder):
    write_spec(folder, 'needs = "an H200, 12 minutes a seed"\n' + SPEC)
    assert hap("list").stdout.endswith(": A made-up table; needs an H200, 12 minutes a seed\n")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("run",), "name a spec: table or all"),
        (("run", "tabel"), "spec tabel: must be a file or a name in {}/reproductions, which has table"),
        (("judge", "tabel"), "spec tabel: must be"),
        (("report", "tabel"), "spec tabel: must be"),
        (("run", "table", "--case", "x"), "--case x: must be a case of table, one of hap, random"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, args, line):
    told = hap(*args)
    assert told.exit_code == 2
    assert told.stderr.startswith("hap: " + line.format(folder))
    assert told.stderr.count("\n") == 1


def test_a_malformed_spec_is_one_line(folder):
    write_spec(folder, SPEC.replace("params = 0.7", "params = 7"))
    told = hap("run", "table")
    assert told.exit_code == 2
    assert told.stderr.startswith("hap: reproductions/table.toml: cases.hap.budget.params: ")
    assert told.stderr.count("\n") == 1


def test_missing_data_stops_a_spec_and_leaves_it_out_of_many(folder, monkeypatch):
    def run(case, seed, *, known, say, keep):
        raise MissingData("cifar10: not in ./data; get it")

    monkeypatch.setattr("hap.harness.run.run", run)
    told = hap("run", "table")
    assert (told.exit_code, told.stderr) == (2, "hap: cifar10: not in ./data; get it\n")
    write_spec(folder, name="other")
    told = hap("run", "all")
    assert told.exit_code == 0
    assert "other is left out: cifar10: not in ./data; get it" in told.stdout


def test_an_interruption_keeps_what_is_finished_and_says_so(folder, monkeypatch):
    def run(case, seed, *, known, say, keep):
        if seed == 1:
            raise KeyboardInterrupt
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    told = hap("run", "table")
    assert told.exit_code == 130
    assert told.stderr == f"\nhap: interrupted; {terminal.KEPT}\n"
    assert [path.name for path in (folder / "results").rglob("*") if path.is_file()] == ["seed0.json"]


PLACES = [str(Path(__file__).parents[1]), str(ROOT)]


def started(folder, *args):
    """The real command, in a process of its own, its records in another."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*PLACES, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "hap", *args],
        cwd=folder,
        env=env | {"HAP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def strange(folder, *names, budget=0.5):
    """A spec of the tiny network with a case for each of these functions of strangers, after one of HAP."""
    head, _, claims = tiny.SPEC.replace("[0.5, 0.7]", f"[{budget}]").partition("[[claims]]")
    cases = "".join(f'[cases.{name}]\nlike = "hap"\nscore = "strangers:{name}"\n\n' for name in names)
    return write_spec(folder, f"{head}{cases}[[claims]]{claims}".replace("[0, 1, 2]", "[0]"), "strange")


@pytest.mark.slow
@pytest.mark.parametrize("both", [True, False], ids=["of a terminal", "to the command alone"])
def test_control_c_in_a_real_process(tmp_path, both):
    """A terminal sends the signal to the command and to its worker; finished records are kept, nothing else is left."""
    strange(tmp_path, "slow")
    process = started(tmp_path, "run", "strange")
    deadline = time.monotonic() + 120
    while not (tmp_path / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT) if both else process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.strip() == f"hap: interrupted; {terminal.KEPT}"
    assert [path.name for path in (tmp_path / "results").rglob("*.*") if path.suffix != ".txt"] == ["seed0.json"]
    assert not list((tmp_path / "cache").rglob(".*"))


@pytest.mark.slow
def test_records_that_end_their_process_are_broken_and_the_others_are_made(tmp_path):
    """A score that aborts, one that is killed and one that lacks memory; then the command that repeats one."""
    path = strange(tmp_path, "aborts", "killed", "exhausts", "same")
    process = started(tmp_path, "run", "strange")
    told, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (1, "")
    again = f"; to repeat it: hap record {path.relative_to(tmp_path)}"
    assert f"strange: aborts@50 seed 0 is BROKEN: its process was ended by SIGABRT{again} aborts@50 0\n" in told
    assert "strange: killed@50 seed 0 is BROKEN: its process was ended by SIGKILL, as the system does when" in told
    assert f"exhausts@50 seed 0 is BROKEN: memory ran out (a made-up lack of it){again} exhausts@50 0\n" in told
    assert "[5/5] same@50 seed 0: there after" in told
    assert "  UNDECIDED Half of the network is enough\n" in told  # for one seed says nothing of chance
    assert "\n3 of 5 records are BROKEN, as said above\n" in told
    made = sorted(file.parent.name.partition("-")[0] for file in (tmp_path / "results" / "strange").rglob("*.json"))
    assert made == ["hap@50", "same@50"]
    assert (tmp_path / "results" / "VERDICTS.md").exists()
    process = started(tmp_path, "record", str(path), "aborts@50", "0")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors == "hap: strange: aborts@50 seed 0 is BROKEN: its process was ended by SIGABRT\n"


@pytest.fixture
def workload(monkeypatch):
    def ready(*, width):
        return Data("digits", "a" * 64, width == 8, "a note")

    monkeypatch.setattr("fakes.ready", ready, raising=False)


@pytest.mark.usefixtures("workload")
def test_doctor_tells_machine_data_and_specs(folder):
    write_spec(folder, "x = 1", "broken")
    write_spec(folder, SPEC.replace("width = 8", "width = 9"), "mirror")
    told = hap("doctor")
    assert told.exit_code == 0
    assert told.stdout.startswith("hap 0.1.0, Python 3.")
    assert "threads" in told.stdout
    assert "workload fakes:task: found digits (official), sha256 aaaaaaaaaaaaaaaa, a note\n" in told.stdout
    assert "workload fakes:task: found digits (UNOFFICIAL copy)" in told.stdout
    assert "spec table: yes: hap run table\n  evidence: ABSENT, none of 6 records\n" in told.stdout
    assert "needs" not in told.stdout
    assert "spec broken: NO, reproductions/broken.toml: title: is required\n" in told.stdout


@pytest.mark.usefixtures("folder", "workload")
def test_doctor_tells_memory_disk_and_what_can_be_installed(monkeypatch):
    monkeypatch.setattr("hap.harness.cli.doctor.find_spec", lambda name: None if name == "submitit" else name)
    told = hap("doctor").stdout
    memory, free = re.search(r"^memory: (\d+) GiB; disk: (\d+) GiB free in /", told, re.MULTILINE).groups()
    assert int(memory) > 0
    assert int(free) == pytest.approx(shutil.disk_usage(".").free / 2**30, abs=2)
    assert "extra cluster (hap run --slurm): NO, without submitit: python -m pip install 'hap[cluster]'" in told
    assert "extra heads (attention heads): yes" in told


def test_doctor_tells_of_the_machine_where_there_are_no_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = hap("doctor")
    assert told.exit_code == 0
    assert "memory: " in told.stdout
    assert told.stdout.endswith("specs: none here; they lie in reproductions/ of a checkout\n")
    told = hap("judge")
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
    assert "/reproductions expected, found none" in told.stderr


def test_doctor_tells_what_is_missing(folder, monkeypatch):
    def missing(*, width):
        raise MissingData("CIFAR-10 not found: looked in ./data; get it from a mirror")

    monkeypatch.setattr("fakes.ready", missing, raising=False)
    told = hap("doctor")
    assert told.exit_code == 0
    assert "workload fakes:task: NO, CIFAR-10 not found: looked in ./data; get it from a mirror\n" in told.stdout
    assert "spec table: NO, its workload is missing\n" in told.stdout
    write_spec(folder, SPEC.replace('tier = "quick"', 'tier = "gpu"'))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (
        "spec table: NO, its workload is missing and it needs a GPU\n"
        "  needs: a GPU; the data that its workload misses, above\n"
        "  evidence: ABSENT, none of 6 records\n"
    ) in hap("doctor").stdout


@pytest.mark.usefixtures("workload")
def test_doctor_knows_that_a_gpu_is_needed(folder, monkeypatch):
    import torch

    write_spec(folder, SPEC.replace('tier = "quick"', 'tier = "gpu"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "spec table: NO, it needs a GPU\n  needs: a GPU; digits, which is here\n" in hap("doctor").stdout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=48 * 2**30))
    told = hap("doctor").stdout
    assert "spec table: yes: hap run table\n  needs: a GPU; digits, which is here\n" in told
    assert "of the GPU 48 GiB" in told


@pytest.mark.usefixtures("workload")
def test_doctor_repeats_what_a_spec_says_it_needs(folder):
    write_spec(folder, 'needs = "a GPU of 16 GiB, 12 minutes a seed on an H200"\n' + SPEC)
    told = hap("doctor").stdout
    assert "  needs: a GPU of 16 GiB, 12 minutes a seed on an H200; digits, which is here\n" in told


@pytest.mark.usefixtures("workload")
def test_doctor_counts_evidence(folder):
    hap("run", "table", "--case", "hap")
    assert "  evidence: 3 of 6 records, the rest ABSENT\n" in hap("doctor").stdout
    assert "  evidence: ABSENT, none of 6 records\n" in hap("doctor", "--results", "elsewhere").stdout
    hap("run", "table")
    assert "  evidence: all 6 records\n" in hap("doctor").stdout
    next((folder / "results").rglob("seed0.json")).write_text("{")
    told = hap("doctor")
    assert told.exit_code == 0
    assert re.search(r"  evidence: NO, .*seed0\.json: damaged record: .*\n", told.stdout)


def test_doctor_makes_a_task_that_offers_nothing_quicker(monkeypatch):
    from types import SimpleNamespace

    from hap.harness.cli import doctor
    from hap.harness.spec.functions import Ref

    data = Data("digits", "a" * 64, True, "")
    monkeypatch.setattr("fakes.task", lambda seed, *, width: SimpleNamespace(data=data))
    assert doctor.ready(Ref(use="fakes:task", options={"width": 2}), 0) == data


HEAVY = ("torch", "pandas", "matplotlib", "scipy.stats")


@pytest.mark.parametrize(
    ("args", "not_imported", "says"),
    [
        ("--help", (*HEAVY, "numpy", "scipy", "pydantic"), "doctor"),
        ("list", (*HEAVY, "scipy"), "digits"),
        ("judge digits", HEAVY, "HOLDS"),
        ("judge digts", (*HEAVY, "numpy"), "spec digts: must be a file or a name"),
        ("run digts", (*HEAVY, "numpy"), "spec digts: must be a file or a name"),
        ("cost digts", (*HEAVY, "numpy"), "spec digts: must be a file or a name"),
        ("report digts", (*HEAVY, "numpy"), "spec digts: must be a file or a name"),
    ],
)
def test_a_command_imports_nothing_heavy_that_it_does_not_need(args, not_imported, says):
    code = (
        f"import sys\nsys.argv = {['hap', *args.split()]}\nfrom hap.harness.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        f"print([m for m in {not_imported} if m in sys.modules])"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTHONPATH"))}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert told.stdout.strip().endswith("[]")
    assert says in told.stdout + told.stderr


def test_python_m_hap_is_the_same_command():
    told = subprocess.run([sys.executable, "-m", "hap", "judge", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert told.stderr.startswith("hap: spec nothing: must be a file or a name in ")


def test_records_of_another_folder_are_found_by_the_path_of_the_spec(folder, monkeypatch):
    spec = load_spec(folder / "reproductions" / "table.toml")
    store.save(fake_run(spec.cases["hap"], 0), folder / "results")
    monkeypatch.chdir("/")
    assert "no evidence for seed 1, 2" in hap("judge", str(folder / "reproductions" / "table.toml")).stdout


def test_a_spec_for_a_gpu_is_not_begun_without_one_but_its_records_are_read(folder, monkeypatch):
    write_spec(folder, SPEC.replace('"quick"', '"gpu"\nneeds = "a GPU of 16 GiB"'), "big")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("HAP_DEVICE", raising=False)
    told = hap("run", "big")
    assert told.exit_code == 2
    assert "hap: big: a GPU expected (a GPU of 16 GiB), found none; --smoke rehearses it on a CPU" in told.stderr
    assert "big is left out: big: a GPU expected" in hap("run", "all").stdout
    assert len(list((folder / "results" / "table").rglob("seed*.json"))) == 6
    assert not (folder / "results" / "big").exists()
    monkeypatch.setenv("HAP_DEVICE", "cpu")
    assert hap("run", "big").exit_code == 0
    monkeypatch.delenv("HAP_DEVICE")
    assert hap("run", "big").exit_code == 0


def test_smoke_goes_through_every_stage_and_keeps_nothing(folder, monkeypatch):
    seen = []

    def run(case, seed, *, known, say, keep):
        seen.append((case.name, seed, case.finetune.epochs, Path(os.environ["HAP_CACHE"]).parent))
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    monkeypatch.setattr(
        "hap.harness.report.write.figures", lambda spec, runs, results, root: seen.append((spec.name, root))
    )
    write_spec(
        folder,
        SPEC.replace('"quick"', '"gpu"').partition("[[claims]]")[0].replace("params = 0.7", "params = [0.5, 0.7]"),
    )
    before = sorted(folder.rglob("*"))
    told = hap("run", "table", "--smoke")
    assert told.exit_code == 0, told.stderr
    assert "table: went through every stage; nothing of it is kept" in told.stdout
    assert [each[:3] for each in seen[:-1]] == [("hap@50", 0, 1), ("random@50", 0, 1)]
    assert seen[-1] == ("table", folder)
    assert not seen[0][3].exists()
    assert sorted(folder.rglob("*")) == before
    seen.clear()
    assert hap("run", "table", "--smoke", "--case", "hap@70").exit_code == 0
    assert seen[0][0] == "hap@70"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), MemoryError()])
def test_memory_that_runs_out_breaks_a_record_and_no_more(folder, monkeypatch, error):
    def run(case, seed, *, known, say, keep):
        if seed == 1:
            raise error
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    told = hap("run", "table")
    assert told.exit_code == 1
    assert (
        f"table: hap seed 1 is BROKEN: memory ran out ({error}); to repeat it: hap record reproductions/" in told.stdout
    )
    assert "2 of 6 records are BROKEN" in told.stdout
    assert len(list((folder / "results").rglob("seed*.json"))) == 4


def test_a_seed_of_no_spec_is_repeated_elsewhere(folder):
    """As that of a night."""
    told = hap("record", "reproductions/table.toml", "hap", "7")
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
    assert hap("record", "reproductions/table.toml", "hap", "7", "--results", "elsewhere").exit_code == 0
    assert [file.name for file in (folder / "elsewhere").rglob("*.json")] == ["seed7.json"]


def test_by_jobs_only_what_is_missing_is_sent(folder, monkeypatch):
    spec = load_spec(folder / "reproductions" / "table.toml")
    store.save(fake_run(spec.cases["hap"], 1), folder / "results")
    sent = []
    monkeypatch.setattr("hap.harness.cli.slurm.fan_out", lambda records, given, say: sent.extend(records))
    hap("run", "table", "--case", "hap", "--slurm", "cluster=local")
    assert [(record.job.case.name, record.job.seed) for record in sent] == [("hap", 0), ("hap", 2)]
    hap("run", "table", "--case", "hap", "--slurm", "cluster=local", "--again")
    assert len(sent) == 5


LOOKS = SPEC.replace("seeds = [0, 1, 2]", "seeds = {looks = [3, 6, 12]}")


def noisy(monkeypatch, until=12):
    """Runs of which the difference is open with fewer than `until` seeds, and then clear."""
    made = []

    def run(case, seed, *, known, say, keep):
        made.append((case.name, seed))
        gap = (3.0 if seed % 2 else -3.0) if seed < until else 40.0
        accuracy = 50.0 + gap * (case.name == "hap")
        return with_accuracy(fake_run(case, seed), "selected", accuracy, 0.1 + seed / 99)

    monkeypatch.setattr("hap.harness.run.run", run)
    return made


def test_a_run_makes_the_first_look_and_more_only_for_open_claims(folder, monkeypatch):
    write_spec(folder, LOOKS)
    made = noisy(monkeypatch)
    assert hap("run", "table").exit_code == 0
    assert sorted(made) == [(case, seed) for case in ("hap", "random") for seed in range(3)]
    told = hap("run", "table", "--until-decided")
    assert sorted(made) == [(case, seed) for case in ("hap", "random") for seed in range(12)]
    assert "table: 6 more records, for claims that are open" in told.stdout
    assert "look 3 of 3" in told.stdout
    assert hap("run", "table", "--until-decided").exit_code == 0
    assert len(made) == 24


def test_a_clear_claim_takes_no_further_seeds(folder):
    write_spec(folder, LOOKS)
    assert hap("run", "table", "--until-decided").exit_code == 0  # hap is a little better for each seed
    assert len(list((folder / "results").rglob("seed*.json"))) == 6


def test_seeds_can_be_chosen(folder):
    write_spec(folder, LOOKS)
    assert hap("run", "table", "--seeds", "1,4-5", "--case", "hap").exit_code == 0
    names = sorted(file.name for file in (folder / "results").rglob("seed*.json"))
    assert names == ["seed1.json", "seed4.json", "seed5.json"]
    assert "--seeds: must be of the seeds of table, 0 to 11, found 12" in hap("run", "table", "--seeds", "12").stderr
    assert "--seeds: numbers as in 0,2,5-7 expected, found 'x'" in hap("run", "table", "--seeds", "x").stderr
    assert "not with --seeds" in hap("run", "table", "--seeds", "1", "--until-decided").stderr


def test_power_is_told_before_anything_is_spent(folder):
    write_spec(folder, SPEC.replace("[finetune]", "minutes = 6\n\n[finetune]"))
    told = hap("power", "table")
    assert told.exit_code == 0
    first = next(line for line in told.stdout.splitlines() if "params_pruned of hap >= 70" in line)
    assert first.split()[:2] == ["1", "3"]
    assert first.split()[4] == "0.3"  # of an hour: three seeds of six minutes
    assert first.endswith("effect 2 (spread of what is assumed)")
    assert "of 2 claims have a power of 80% or more with their seeds" in told.stdout
    assert not (folder / "results").exists()
    write_spec(folder, SPEC.replace("params_pruned = {seeds = 0.5}", ""))
    assert "assumed.params_pruned: is needed where records do not say a spread" in hap("power", "table").stderr
    assert "name a spec: table or all" in hap("power").stderr
