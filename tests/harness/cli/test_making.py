import multiprocessing
import threading
import time

import pytest
from fakes import fake_run, write_spec
from rich.console import Console

from hap import HapError
from hap.harness.cli import making
from hap.harness.processes import files
from hap.harness.records import store
from hap.harness.spec.spec import load_spec


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(tmp_path / "cache"))
    return load_spec(write_spec(tmp_path))


def quiet():
    return Console(quiet=True)


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
    busy = store.path(results, case, 0)
    other, done = held(busy)

    def run(case, seed, *, say, keep):
        order.append(seed)
        if len(order) == 2:
            done.set()  # the other gives up without a record, so it is made here after all
            other.join(60)
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    assert store.busy(results, case, 0)
    assert not store.busy(results, case, 1)
    making.make(spec, [case], results, quiet())
    assert order == [1, 2, 0]


def test_where_all_are_being_made_it_waits(spec, tmp_path, monkeypatch):
    results, case = tmp_path / "results", spec.cases["hap"]
    one = spec.model_copy(update={"seeds": (0,)})
    other, done = held(store.path(results, case, 0))
    monkeypatch.setattr("hap.harness.run.run", lambda case, seed, *, say, keep: fake_run(case, seed))
    start = time.monotonic()
    threading.Timer(0.5, done.set).start()
    making.make(one, [case], results, quiet())
    assert time.monotonic() - start >= 0.4
    other.join(60)
    assert store.path(results, case, 0).exists()


def test_a_lock_that_no_one_holds_is_not_busy(spec, tmp_path):
    file = store.path(tmp_path, spec.cases["hap"], 0)
    file.parent.mkdir(parents=True)
    assert not files.is_locked(file)
    file.with_name(f".{file.name}.lock").touch()  # left by a process that was killed
    assert not files.is_locked(file)


def test_a_case_that_is_not_there_is_one_line(spec):
    assert [case.name for case in making.cases(spec, None)] == list(spec.cases)
    with pytest.raises(HapError, match="--case nothing: must be a case of table, one of hap, random"):
        making.cases(spec, "nothing")


def test_by_jobs_only_what_is_missing_is_sent(spec, tmp_path, monkeypatch):
    results, path = tmp_path / "results", tmp_path / "reproductions" / "table.toml"
    store.save(fake_run(spec.cases["hap"], 1), results)
    sent = []
    monkeypatch.setattr(making.slurm, "fan_out", lambda records, given, again, say: sent.extend(records))
    making.by_jobs({path: spec}, "hap", {path: results}, {"cluster": "local"}, False, quiet())
    assert [(record.case.name, record.seed) for record in sent] == [("hap", 0), ("hap", 2)]
    making.by_jobs({path: spec}, "hap", {path: results}, {"cluster": "local"}, True, quiet())
    assert len(sent) == 5
