import errno
import json
import os
from dataclasses import asdict, replace

import pytest
from fakes import edited, fake_run, without, write_spec

from hap import HapError
from hap.harness.make import Job, ensure
from hap.harness.processes.files import atomic_write
from hap.harness.records import store
from hap.harness.spec.spec import load_spec


@pytest.fixture
def case(tmp_path):
    return load_spec(write_spec(tmp_path)).cases["hap"]


@pytest.fixture
def runs(monkeypatch):
    """Counts the runs that a fake procedure makes."""
    made = []

    def run(case, seed, *, known, say, keep):
        made.append((case.name, seed))
        return fake_run(case, seed, created=f"made {len(made)}")

    monkeypatch.setattr("hap.harness.run.run", run)
    return made


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_path_names_spec_case_key_and_seed(case, tmp_path):
    assert store.path(tmp_path, case, 3) == tmp_path / "table" / f"hap-{case.key}" / "seed3.json"


def test_a_record_comes_back_as_it_was_saved(case, tmp_path):
    run = fake_run(case, 1)
    file = store.save(run, tmp_path / "results")
    assert file == store.path(tmp_path / "results", case, 1)
    assert store.load(file) == run
    assert left_in(tmp_path / "results") == ["seed1.json"]


def test_evidence_is_what_is_there_in_the_order_of_the_seeds(tmp_path):
    spec = load_spec(write_spec(tmp_path))
    for seed in (2, 0):
        store.save(fake_run(spec.cases["hap"], seed), tmp_path)
    found = store.evidence(spec, tmp_path)
    assert {name: [run.seed for run in runs] for name, runs in found.items()} == {"hap": [0, 2], "random": []}
    assert list(store.evidence(spec, tmp_path, ("random", None))) == ["random"]


DAMAGE = {
    "empty": (lambda table: "", "file: must be JSON"),
    "cut short": (lambda table: json.dumps(table)[:-40], "file: must be JSON"),
    "a list": (lambda table: "[]", "schema: must be 1 (found [])"),
    "another schema": (lambda table: table | {"schema": 2}, "schema: must be 1 (found 2)"),
    "a field less": (lambda table: without(table, "plan"), "fields: must be exactly those of a Run (found ['plan'])"),
    "a field more": (lambda table: table | {"colour": 1}, "(found ['colour'])"),
    "a wrong type": (lambda table: table | {"seed": "0"}, "seed: Input should be a valid integer (found '0')"),
    "a wrong number": (
        lambda table: table | {"metrics": table["metrics"] | {"last": {"accuracy": "high", "loss": 1.0}}},
        "metrics.last.accuracy: Input should be a valid number",
    ),
    "a stage less": (lambda table: without(table, "metrics", "last"), "metrics: must have dense, one_shot"),
    "no loss": (lambda table: without(table, "metrics", "last", "loss"), "metrics.last: must have accuracy and loss"),
    "no cost": (lambda table: without(table, "cost", "pruned"), "cost: must have dense, pruned; missing"),
    "no macs": (lambda table: without(table, "cost", "dense", "macs"), "cost.dense.macs: is required"),
    "no parameters": (
        lambda table: edited(table, "cost", "dense", "params", to=0),
        "cost.dense.params: Input should be gre",
    ),
    "half a MAC": (
        lambda table: edited(table, "cost", "pruned", "macs", to=0.5),
        "cost.pruned.macs: Input should be a valid",
    ),
    "no latency": (lambda table: edited(table, "cost", "dense", "latency_seconds", to={"1": "x"}), "latency_seconds"),
    "no data": (lambda table: table | {"data": {}}, "data.name: is required"),
    "data without a sum": (lambda table: without(table, "data", "sha256"), "data.sha256: is required"),
    "no code": (lambda table: without(table, "code", "sha256"), "code.sha256: is required"),
    "a task that is no table": (lambda table: edited(table, "config", "task", to="x"), "config.task: Input should be"),
    "a score without a name": (lambda table: edited(table, "config", "score", to={}), "config.score.use: is required"),
    "an epoch without a test": (
        lambda table: table | {"epochs": [{"epoch": 0, "validation": {"accuracy": 1.0, "loss": 1.0}}]},
        "epochs[1].test: is required",
    ),
    "nested without end": (lambda table: "[" * 100_000, "file: must be JSON"),
    "another seed": (lambda table: table | {"seed": 1}, "seed: must be that of its path, 0 (found 1)"),
    "another key": (lambda table: table | {"key": "0123456789"}, "key: must be that of its path"),
    "another case": (lambda table: table | {"case": "x"}, "case: must be that of its path, hap (found 'x')"),
    "another spec": (lambda table: table | {"spec": "x"}, "spec: must be that of its path, table (found 'x')"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_record_is_refused_in_one_line(case, tmp_path, runs, name):
    damage, rule = DAMAGE[name]
    file = store.save(fake_run(case, 0), tmp_path)
    damaged = damage(json.loads(file.read_text()))
    file.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(HapError) as caught:
        ensure(Job(case, 0, tmp_path))
    text = str(caught.value)
    assert text.startswith(f"{file}: damaged record: ")
    assert rule in text
    assert "\n" not in text
    assert runs == []
    assert ensure(Job(case, 0, tmp_path, again=True)).created == "made 1"


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(HapError, match=r"seed0\.json: a record must be readable \(found No such file"):
        store.load(tmp_path / "table" / "hap-0" / "seed0.json")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(case, tmp_path, runs, monkeypatch, broken):
    before = ensure(Job(case, 0, tmp_path))
    monkeypatch.setattr(os, broken, no_space)
    with pytest.raises(HapError) as caught:
        ensure(Job(case, 0, tmp_path, again=True))
    file = store.path(tmp_path, case, 0)
    assert str(caught.value) == (
        f"{file}: cannot be written (No space left on device); what was there before is untouched"
    )
    monkeypatch.undo()
    assert store.load(store.path(tmp_path, case, 0)) == before
    assert left_in(tmp_path / "table") == ["seed0.json"]


def test_a_disk_that_fills_while_the_bytes_are_written_loses_nothing(tmp_path):
    """A real full disk: /dev/full takes no byte, so the write itself fails."""
    file = tmp_path / "x.json"
    file.write_text("old")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.symlink_to("/dev/full")
    with pytest.raises(HapError, match=r"x\.json: cannot be written \(No space left on device\)"):
        atomic_write(file, b"new")
    assert file.read_text() == "old"
    assert left_in(tmp_path) == ["x.json"]


def test_a_folder_that_cannot_be_made_is_one_line(case, tmp_path, runs):
    (tmp_path / "table").write_text("a file where a folder should be")
    with pytest.raises(HapError, match=r"cannot be written \("):
        ensure(Job(case, 0, tmp_path))
    assert runs == []


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", b"new")
    assert left_in(tmp_path) == []


def test_a_saved_record_is_json_a_person_can_read(case, tmp_path):
    text = store.save(fake_run(case, 0), tmp_path).read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == asdict(replace(fake_run(case, 0)))
    assert oct(store.path(tmp_path, case, 0).stat().st_mode & 0o444) == oct(0o444 & ~umask())


def umask():
    value = os.umask(0)
    os.umask(value)
    return value
