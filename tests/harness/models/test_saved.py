"""A pruned model in a folder: whole or not at all, and refused where it is damaged or another's."""

import errno
import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from cases import SMALL, build
from fakes import without
from safetensors.torch import save as pack

from hap import HapError, apply, couple, trace
from hap.harness.models import saved
from hap.implants import zero
from hap.testing import random_plan


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def fresh():
    return SMALL["option-b"][0]()


@pytest.fixture
def small(tmp_path):
    """A pruned model, saved in the folder."""
    model, example = build(SMALL, "option-b")
    groups = couple(model, trace(model, example), "union")
    made = apply(model, groups, random_plan(groups, torch.Generator().manual_seed(0)), zero)
    assert saved.save_model(made, fresh(), tmp_path) == tmp_path
    return made


def refused(folder, file, says, make=fresh):
    with pytest.raises(HapError) as caught:
        saved.load_model(folder, make)
    text = str(caught.value)
    assert text.startswith(f"{folder / file}: ")
    assert says in text
    assert "\n" not in text


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
def test_a_file_of_a_model_that_is_missing_is_named(small, tmp_path, file):
    (tmp_path / file).unlink()
    refused(tmp_path, file, "a saved model must be readable (found No such file or directory)")


def test_weights_that_are_cut_short_are_refused(small, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, file.name, "damaged, or of another model: sha256: must be that in model.json")


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_single_wrong_bit_is_refused(small, tmp_path, place):
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    refused(tmp_path, file.name, "sha256: must be that in model.json")


def test_weights_that_are_no_safetensors_are_refused_though_their_hash_is_right(small, tmp_path):
    content = b"cos\nsystem\n(S'true'\ntR."  # a pickle
    (tmp_path / "model.safetensors").write_bytes(content)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | {"sha256": sha256(content).hexdigest()}))
    refused(tmp_path, "model.safetensors", "file: must be safetensors")


def test_weights_of_another_model_are_refused_though_their_hash_is_right(small, tmp_path):
    content = pack({"linear.bias": torch.zeros(10)})
    (tmp_path / "model.safetensors").write_bytes(content)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | {"sha256": sha256(content).hexdigest()}))
    refused(tmp_path, "model.safetensors", "bn1.parts.0.bias: must be there")


RECORDS = {
    "empty": (lambda table: "", "file: must be JSON"),
    "cut short": (lambda table: json.dumps(table)[:-40], "file: must be JSON"),
    "no text": (lambda table: b"\xff\xfe\x00", "file: must be JSON"),
    "too deep": (lambda table: "[" * 100_000, "file: must be JSON"),
    "a list": (lambda table: "[]", "schema: must be 1 (found [])"),
    "another schema": (lambda table: table | {"schema": 2}, "schema: must be 1 (found 2)"),
    "a field less": (lambda table: without(table, "sha256"), "fields: must be architecture, class, schema, sha256"),
    "a field more": (lambda table: table | {"colour": 1}, "fields: must be architecture, class, schema, sha256"),
    "an architecture that is none": (
        lambda table: table | {"architecture": 3},
        "architecture: must be a table (found 3)",
    ),
    "a part of it less": (lambda table: without(table, "architecture", "types"), "types: is required"),
    "a module less": (
        lambda table: without(table, "architecture", "modules", "linear"),
        "linear.weight: must be of shape",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_of_a_model_is_refused_in_one_line(small, tmp_path, name):
    damage, says = RECORDS[name]
    file = tmp_path / "model.json"
    damaged = damage(json.loads(file.read_text()))
    if isinstance(damaged, bytes):
        file.write_bytes(damaged)
    else:
        file.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    refused(tmp_path, "model.safetensors" if "shape" in says else "model.json", says)


def test_a_hash_that_is_no_text_is_refused(small, tmp_path):
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | {"sha256": None}))
    refused(tmp_path, "model.safetensors", "sha256: must be that in model.json")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (SMALL["plain"][0], "the model: must be ResNet, as when it was saved (found 'Sequential')"),
        (lambda: SMALL["option-a"][0](), "layer2.0.shortcut: must be Sequential, as when it was saved (found 'Pad')"),
    ],
)
def test_a_function_that_builds_another_class_is_refused(small, tmp_path, make, says):
    refused(tmp_path, "model.json", says, make)


def test_a_function_that_builds_another_width_is_refused(small, tmp_path):
    from hap.harness.tasks import nets

    refused(tmp_path, "model.json", "must", lambda: nets.resnet(8, (2, 4, 8), "B"))


def test_a_function_that_builds_no_module_is_refused(small, tmp_path):
    with pytest.raises(HapError, match=r": build must return a module \(found dict\)"):
        saved.load_model(tmp_path, dict)


def test_a_full_disk_leaves_the_saved_model_as_it_was(small, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(HapError, match=r"model\.safetensors: cannot be written \(No space left on device\)"):
        saved.save_model(small, fresh(), tmp_path)
    monkeypatch.undo()
    assert torch.equal(saved.load_model(tmp_path, fresh).linear.weight, small.linear.weight)
    assert left_in(tmp_path) == ["model.json", "model.safetensors"]


def test_a_process_that_dies_between_the_two_files_is_seen_when_they_are_read(small, tmp_path, monkeypatch):
    """The weights are the new ones, the record is the old one: it must not pass for either."""
    real = os.replace

    def dies(source, target):
        if Path(target).name == "model.json":
            raise KeyboardInterrupt
        real(source, target)

    with torch.no_grad():
        small.linear.bias += 1
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        saved.save_model(small, fresh(), tmp_path)
    monkeypatch.undo()
    refused(tmp_path, "model.safetensors", "sha256: must be that in model.json")


def test_saving_again_replaces_and_writes_the_same_bytes(small, tmp_path):
    before = [(tmp_path / name).read_bytes() for name in ("model.json", "model.safetensors")]
    saved.save_model(small, fresh(), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("model.json", "model.safetensors")] == before
