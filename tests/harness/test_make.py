import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from fakes import fake_run, write_spec

from hap import HapError
from hap.harness.make import Job, ensure, jobs, make
from hap.harness.processes import files
from hap.harness.processes.progress import Event, silent
from hap.harness.processes.workers import InProcess
from hap.harness.spec.spec import load_spec


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(tmp_path / "cache"))
    return load_spec(write_spec(tmp_path))


@pytest.fixture
def case(spec):
    return spec.cases["hap"]


@pytest.fixture
def runs(monkeypatch):
    """Counts the runs that a fake procedure makes."""
    made = []

    def run(case, seed, *, known, say, keep):
        made.append((case.name, seed))
        say(Event("running"))
        return fake_run(case, seed, created=f"made {len(made)}")

    monkeypatch.setattr("hap.harness.run.run", run)
    return made


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def broke(job, why):
    raise why


def quiet(what):
    """A step of a command that says nothing."""
    return nullcontext(silent)


def test_ensure_makes_a_record_once(case, tmp_path, runs):
    said = []
    first = ensure(Job(case, 0, tmp_path), say=said.append)
    assert ensure(Job(case, 0, tmp_path), say=said.append) == first
    assert (runs, said) == ([("hap", 0)], ["running"])
    assert left_in(tmp_path / "table") == ["seed0.json"]


def test_again_repeats(case, tmp_path, runs):
    assert ensure(Job(case, 0, tmp_path)).created == "made 1"
    assert ensure(Job(case, 0, tmp_path, again=True)).created == "made 2"
    assert ensure(Job(case, 0, tmp_path)).created == "made 2"


CHILD = """
import sys, time, os
from pathlib import Path
import hap.harness.run as procedure
from hap.harness.make import Job, ensure
from hap.harness.spec.spec import load_spec
from fakes import fake_run

def run(case, seed, *, known, say, keep):
    with open("log", "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(1.0)
    return fake_run(case, seed, created=str(os.getpid()))

procedure.run = run
if sys.argv[1] == "hang":
    def hang(descriptor):
        Path("hanging").touch()
        time.sleep(60)
    os.fsync = hang
print(ensure(Job(load_spec(Path("reproductions/table.toml")).cases["hap"], 0, Path("results"))).created)
"""


def start(folder, how="normal"):
    places = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", CHILD, how], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


def test_two_processes_make_one_record(case, tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    told = [process.communicate(timeout=60)[0].strip() for process in both]
    ran = (tmp_path / "log").read_text().split()
    assert [process.returncode for process in both] == [0, 0]
    assert len(ran) == 1
    assert told == ran * 2
    assert left_in(tmp_path / "results") == ["seed0.json"]


def test_a_process_killed_while_it_writes_harms_nothing(case, tmp_path, runs):
    process = start(tmp_path, "hang")
    deadline = time.monotonic() + 60
    while not (tmp_path / "hanging").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    file = Job(case, 0, tmp_path / "results").file
    assert len(left_in(file.parent)) == 2  # a lock that nobody holds and a part of a record
    assert not file.exists()
    assert ensure(Job(case, 0, tmp_path / "results")).created == "made 1"
    assert left_in(file.parent) == ["seed0.json"]


def test_whoever_waits_finds_what_the_other_made(case, tmp_path, monkeypatch):
    """Two threads: their locks are as far apart as those of two processes."""
    made, started, go_on = [], threading.Event(), threading.Event()

    def run(case, seed, *, known, say, keep):
        made.append(seed)
        started.set()
        assert go_on.wait(30)
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ensure, Job(case, 0, tmp_path))
        assert started.wait(30)
        second = pool.submit(ensure, Job(case, 0, tmp_path))
        time.sleep(0.1)  # for the second to reach the lock; if it does not, the test passes for less
        go_on.set()
        assert first.result() == second.result() == fake_run(case, 0)
    assert made == [0]
    assert left_in(tmp_path / "table") == ["seed0.json"]


def hold(file, ready, done):
    """Another process that makes a record."""
    with files.locked(file):
        ready.set()
        done.wait(300)


def held(file):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(file, ready, done))
    other.start()
    assert ready.wait(300)
    return other, done


def test_a_record_that_another_process_makes_comes_last(spec, tmp_path, monkeypatch):
    """Two processes on two GPUs take different records, and do not wait for each other's."""
    order, results, case = [], tmp_path / "results", spec.cases["hap"]
    busy = Job(case, 0, results).file
    other, done = held(busy)

    def run(case, seed, *, known, say, keep):
        order.append(seed)
        if len(order) == 2:
            done.set()  # the other gives up without a record, so it is made here after all
            other.join(60)
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    assert files.is_locked(busy)
    make([Job(case, seed, results) for seed in spec.seeds], InProcess(), quiet, broke)
    assert order == [1, 2, 0]


def test_where_all_are_being_made_it_waits(spec, tmp_path, monkeypatch):
    results, case = tmp_path / "results", spec.cases["hap"]
    other, done = held(Job(case, 0, results).file)
    monkeypatch.setattr("hap.harness.run.run", lambda case, seed, *, known, say, keep: fake_run(case, seed))
    start = time.monotonic()
    threading.Timer(0.5, done.set).start()
    make([Job(case, 0, results)], InProcess(), quiet, broke)
    assert time.monotonic() - start >= 0.4
    other.join(60)
    assert Job(case, 0, results).file.exists()


def test_a_lock_that_no_one_holds_is_not_busy(spec, tmp_path):
    file = Job(spec.cases["hap"], 0, tmp_path).file
    file.parent.mkdir(parents=True)
    assert not files.is_locked(file)
    file.with_name(f".{file.name}.lock").touch()  # left by a process that was killed
    assert not files.is_locked(file)


def test_a_case_that_is_not_there_is_one_line(spec, tmp_path):
    assert [job.case.name for job in jobs(tmp_path / "table.toml", spec, None, tmp_path)] == ["hap"] * 3 + [
        "random"
    ] * 3
    with pytest.raises(HapError, match="--case nothing: must be a case of table, one of hap, random"):
        jobs(tmp_path / "table.toml", spec, "nothing", tmp_path)


def test_the_command_that_makes_one_record_names_a_folder_that_is_not_the_usual_one(spec, tmp_path):
    path = tmp_path / "reproductions" / "table.toml"
    (usual, *_), (other, *_) = (jobs(path, spec, "hap", folder) for folder in (tmp_path / "results", tmp_path / "a b"))
    assert usual.alone == f"hap record {path} hap 0"
    assert other.alone == f"hap record {path} hap 0 --results '{tmp_path / 'a b'}'"
