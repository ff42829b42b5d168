import errno
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from hap import HapError
from hap.harness.nightly import history
from hap.harness.nightly.history import Accepted, Row
from hap.harness.processes import files

ROW = Row(
    night="n1",
    spec="digits",
    claim="it works",
    case="hap",
    key="0123456789",
    metric="accuracy",
    stage="selected",
    seed=3,
    value=97.5,
    commit="a" * 40,
    dirty=False,
    code="c" * 64,
    machine={"device": "cpu", "cpu": "a fast one", "threads": 2, "torch": "2.15.0"},
    data="d" * 64,
)


def test_what_is_appended_is_read_in_its_order(tmp_path):
    file = tmp_path / "deep" / "history.jsonl"
    assert history.load(file) == []
    history.append(file, [ROW, replace(ROW, seed=None)])
    history.append(file, [Accepted(accepted="digits/hap", why="by design")])
    history.append(file, [])
    assert history.load(file) == [ROW, replace(ROW, seed=None), Accepted(accepted="digits/hap", why="by design")]
    assert len(file.read_text().splitlines()) == 3
    assert json.loads(file.read_text().splitlines()[0])["schema"] == 1
    assert [each.name for each in file.parent.iterdir()] == ["history.jsonl"]


def test_a_last_line_without_its_end_is_not_glued_to_the_next(tmp_path):
    file = tmp_path / "history.jsonl"
    file.write_text(json.dumps(asdict(ROW)))
    history.append(file, [ROW])
    assert history.load(file) == [ROW, ROW]


def changed(**fields):
    return json.dumps({**asdict(ROW), **fields})


def without(name):
    return json.dumps({key: value for key, value in asdict(ROW).items() if key != name})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (changed()[:40], r"damaged: must be JSON \(found 'Unterminated"),
        ("", r"damaged: must be JSON"),
        ("[1]", r"schema: must be 1 \(found \[1\]\)"),
        (changed(schema=2), r"schema: must be 1 \(found 2\)"),
        (without("seed"), r"fields: must be exactly those of Row \(found \['seed'\]\)"),
        (changed(more=1), r"fields: must be exactly those of Row \(found \['more'\]\)"),
        (changed(seed="3"), r"seed: Input should be a valid integer \(found '3'\)"),
        (changed(metric="beauty"), r"metric: Input should be .* \(found 'beauty'\)"),
        (changed(value=None), r"value: Input should be a valid number"),
        (changed(value=float("nan")), r"value: must be a finite number \(found nan\)"),
        ('{"schema": 1, "accepted": "x"}', r"fields: must be exactly those of Accepted \(found \['why'\]\)"),
        ("[" * 100_000, r"damaged: must be JSON"),
        ("\udcff", r"damaged: must be JSON"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line, says):
    file = tmp_path / "history.jsonl"
    content = f"{json.dumps(asdict(ROW))}\n{line}\n{json.dumps(asdict(ROW))}\n".encode(errors="surrogateescape")
    file.write_bytes(content)
    with pytest.raises(HapError, match=rf"history.jsonl: line 2: {says}.*nothing was changed: mend the line") as found:
        history.load(file)
    assert "\n" not in str(found.value)
    with pytest.raises(HapError, match="line 2"):
        history.append(file, [ROW])
    assert file.read_bytes() == content


def test_a_folder_in_its_place_is_told(tmp_path):
    with pytest.raises(HapError, match=r"a history must be readable \(found Is a directory\)"):
        history.load(tmp_path)


def test_a_full_disk_leaves_the_history_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "history.jsonl"
    history.append(file, [ROW])
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(HapError, match=r"cannot be written \(No space left on device\)"):
        history.append(file, [ROW])
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["history.jsonl"]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from dataclasses import replace
from test_history import ROW
from hap.harness.nightly import history
for i in range(8):
    history.append(Path(sys.argv[1]), [replace(ROW, night=f"{sys.argv[2]}-{i}", seed=s) for s in range(3)])
"""


@pytest.mark.slow
def test_two_processes_append_and_no_line_is_lost(tmp_path):
    file, here = tmp_path / "history.jsonl", str(__file__).rpartition("/")[0]
    command = [sys.executable, "-c", PROGRAM, str(file)]
    both = [subprocess.Popen([*command, name, here]) for name in ("one", "two")]
    assert [each.wait(timeout=120) for each in both] == [0, 0]
    rows = history.load(file)
    assert len(rows) == 48
    for name in ("one", "two"):
        own = [row for row in rows if row.night.startswith(name)]
        assert [(row.night, row.seed) for row in own] == [(f"{name}-{i}", s) for i in range(8) for s in range(3)]
    for i in range(0, 48, 3):
        assert len({row.night for row in rows[i : i + 3]}) == 1


def test_a_series_has_a_number_a_seed_whatever_claims_it_bears_on():
    rows = [replace(ROW, claim=claim, seed=seed, value=90.0 + seed) for claim in ("a", "b") for seed in (0, 1)]
    rows += [replace(ROW, night="n2", dirty=True), replace(ROW, night="n2", case="random")]
    found = history.series(rows)
    assert [(each.case, len(nights)) for each, nights in found.items()] == [("hap", 2), ("random", 1)]
    assert next(iter(found.values())) == [
        ("n1", "aaaaaaaaaa", "2.15.0", [90, 91]),
        ("n2", "aaaaaaaaaa with changes", "2.15.0", [97.5]),
    ]
    assert next(iter(found)).name == "digits/hap/accuracy/selected"
    assert history.nights(rows) == ["n1", "n2"]


@pytest.mark.parametrize("other", [{"key": "9"}, {"data": "e"}, {"stage": "one_shot"}, {"machine": {"device": "H100"}}])
def test_what_cannot_be_compared_is_another_series(other):
    assert len(history.series([ROW, replace(ROW, **other)])) == 2


def test_timings_are_of_one_machine_and_one_number_a_night():
    slower = {**ROW.machine, "cpu": "a slow one"}
    rows = [replace(ROW, metric="ratio", seed=s, value=v) for s, v in enumerate([3.0, 1.0, 2.0])]
    found = history.series([*rows, replace(rows[0], machine=slower)])
    assert [nights[0].values for nights in found.values()] == [[2.0], [3.0]]
    other = replace(ROW, machine={**slower, "torch": "2.16", "threads": 9})
    assert len(history.series([ROW, other])) == 1


def test_what_was_before_an_accepted_change_is_left_out():
    accepted = Accepted(accepted="digits/hap/accuracy/selected", why="fewer epochs")
    rows = [ROW, replace(ROW, case="random"), accepted, replace(ROW, night="n2")]
    found = history.series(rows)
    assert {each.case: [night.name for night in nights] for each, nights in found.items()} == {
        "random": ["n1"],
        "hap": ["n2"],
    }
