import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pieces
import pytest

from hap import HapError
from hap.harness.processes.workers import Broken, InProcess, Worker

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def worker():
    with Worker() as made:
        yield made


def heard(executor, work, *args):
    events = []
    return executor(work, *args, say=events.append), [(str(event), event.fraction) for event in events]


@pytest.mark.parametrize("kind", [InProcess, Worker])
def test_work_has_its_value_its_lines_and_what_was_known_before(kind):
    executor = kind()
    (first, one), lines = heard(executor, pieces.counts, 2)
    (second, two), _ = heard(executor, pieces.counts, 3)
    assert (first, second) == (2, 5)
    assert lines == [("begun", 0.0), ("done", 1.0)]
    assert one == two
    assert (one == os.getpid()) == (kind is InProcess)
    if kind is Worker:
        executor.close()


def test_a_worker_works_in_the_surroundings_of_the_moment(worker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAP_CACHE", "one")
    monkeypatch.syspath_prepend(tmp_path / "more")
    name, folder, path = worker(pieces.looks, "HAP_CACHE")
    assert (name, folder, path) == ("one", str(tmp_path), sys.path)
    monkeypatch.delenv("HAP_CACHE")
    assert worker(pieces.looks, "HAP_CACHE")[0] is None


@pytest.mark.parametrize(
    ("work", "arg", "says"),
    [
        (pieces.ends, signal.SIGABRT, "its process was ended by SIGABRT"),
        (pieces.ends, signal.SIGTERM, "its process was ended by SIGTERM"),
        (pieces.ends, signal.SIGKILL, "its process was ended by SIGKILL, as the system does when memory runs out"),
        (pieces.ends, signal.SIGRTMIN + 1, f"its process was ended by signal {signal.SIGRTMIN + 1}"),
        (pieces.exits, 3, "its process ended with exit status 3"),
        (pieces.exits, None, "its process ended with exit status 0"),
    ],
)
def test_a_process_that_ends_is_one_line_and_the_next_work_has_another(worker, work, arg, says):
    _, before = worker(pieces.counts, 1)
    with pytest.raises(Broken) as caught:
        worker(work, arg)
    assert str(caught.value) == says
    assert isinstance(caught.value, HapError)
    count, after = worker(pieces.counts, 1)
    assert (count, after == before) == (1, False)  # nothing is known to the new one


def test_a_child_that_goes_on_hides_no_death(worker, tmp_path):
    start = time.monotonic()
    with pytest.raises(Broken, match="SIGABRT"):
        worker(pieces.leaves_a_child, str(tmp_path / "child"))
    assert time.monotonic() - start < 50
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_mistake_comes_back_as_it_was(worker):
    with pytest.raises(pieces.Missing) as caught:
        worker(pieces.raises, "hap")
    assert str(caught.value) == "data: must be there"
    assert caught.value.__dict__["rank"] == 3
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("defect", ZeroDivisionError, "division by zero"),
        ("awkward", RuntimeError, "Awkward: one and two"),
        ("local", RuntimeError, "an answer that can be sent expected, found "),
    ],
)
def test_a_defect_comes_back_with_its_traceback(worker, kind, error, says):
    with pytest.raises(error, match=says) as caught:
        worker(pieces.raises, kind)
    if kind != "local":
        text = "".join(traceback.format_exception(caught.value))
        assert 'pieces.py", line ' in text
        assert "in raises" in text
    assert worker(pieces.counts, 1)[0] >= 1


def test_what_cannot_be_sent_is_said(worker):
    with pytest.raises(RuntimeError, match="an answer that can be sent expected, found "):
        worker(pieces.gives_a_lambda)


def test_after_a_lack_of_memory_the_process_is_another(worker):
    _, before = worker(pieces.counts, 1)
    with pytest.raises(MemoryError, match="none left"):
        worker(pieces.raises, "memory")
    assert worker(pieces.counts, 1)[1] != before


def test_work_that_is_interrupted_ends_and_leaves_nothing_open(tmp_path):
    def interrupt(event):
        raise KeyboardInterrupt

    before = multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt), Worker() as executor:
        executor(pieces.cleans_up, str(tmp_path), say=interrupt)
    assert (tmp_path / "clean").exists()
    assert multiprocessing.active_children() == before


PARENT = """
import sys
from pathlib import Path
import pieces
from hap.harness.processes.workers import Worker

if __name__ == "__main__":
    with Worker() as executor:
        Path("pid").write_text(str(executor(pieces.counts, 1)[1]))
        executor(pieces.cleans_up, ".", say=lambda event: Path(event).touch())
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process lives is read from /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_with_its_parent(tmp_path, how):
    """Whatever ends the parent: what the worker has to clean is clean, and it is gone."""
    (tmp_path / "parent.py").write_text(PARENT)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.DEVNULL,
        # a shell's background job ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait(lambda: (tmp_path / "here").exists())
    parent.send_signal(how)
    parent.wait(60)
    pid = (tmp_path / "pid").read_text()
    wait(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    assert (tmp_path / "clean").exists()


def wait(there):
    deadline = time.monotonic() + 60
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert there()
