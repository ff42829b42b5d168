"""A training that is killed, and what lies on the disk after it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import fake_run, write_spec
from small import RECIPE, epoch, net, small
from test_stepping import starved

from hap import HapError
from hap.harness.make import Job, ensure
from hap.harness.processes import files
from hap.harness.spec.spec import load_spec
from hap.harness.train import checkpoints
from hap.harness.train.loop import fit, generator

LONG = replace(RECIPE, epochs=6)


class Killed(BaseException):
    """What no handler of ours catches."""


def killed_in(number):
    """An epoch that dies in the middle of the one of this number."""

    def train(batch_size, rng):
        train.epochs += 1
        for step, batch in enumerate(epoch(batch_size, rng)):
            if train.epochs == number and step == 2:
                raise Killed
            yield batch

    train.epochs = 0
    return train


def go(folder, model=None, recipe=LONG, seed=0, **options):
    model = net() if model is None else model
    told = []
    curve = fit(model, small(**options), recipe, rng=generator(seed), keep=folder, say=told.append)
    return model, curve, [str(line) for line in told]


def start(folder, number, recipe=LONG):
    with pytest.raises(Killed):
        go(folder, recipe=recipe, train=killed_in(number))


def numbers(curve):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve.epochs]


def equal(first, second):
    (one, curve), (other, oracle) = first[:2], second[:2]
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert numbers(curve) == numbers(oracle)
    for state, expected in zip(curve.states(), oracle.states(), strict=True):
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_a_training_that_was_killed_ends_bit_for_bit_as_one_that_was_not(tmp_path, number):
    start(tmp_path / "a", number)
    found = go(tmp_path / "a")
    assert len(found[1].epochs) == 6
    assert (f"goes on after epoch {number - 1} of 6" in found[2]) == (number > 1)
    equal(found, go(None))


def test_one_that_ended_is_not_trained_again(tmp_path):
    first = go(tmp_path)
    second = go(tmp_path, train=killed_in(1))
    equal(first, second)


def test_momentum_and_the_last_pass_go_on_too(tmp_path):
    recipe = replace(LONG, momentum=0.99, nesterov=True, stabilise=True)
    start(tmp_path, 5, recipe)
    equal(go(tmp_path, recipe=recipe), go(None, recipe=recipe))


@pytest.mark.parametrize("number", [2, 5])
def test_adamw_and_dropout_go_on_too(tmp_path, number):
    from test_training import dropping

    recipe = replace(LONG, optimiser="adamw", lr=1e-2, clip=0.5)
    with pytest.raises(Killed):
        go(tmp_path, dropping(), recipe, train=killed_in(number))
    found = go(tmp_path, dropping(), recipe)
    assert f"goes on after epoch {number - 1} of 6" in found[2]
    equal(found, go(None, dropping(), recipe))


def test_micro_batches_that_memory_halved_go_on_and_are_told_once(tmp_path):
    with pytest.raises(Killed):
        go(tmp_path, starved(5, net()), train=killed_in(5))  # two epochs were begun anew
    found = go(tmp_path, net())  # on a machine with memory, so that nothing would halve them again
    oracle = go(None, starved(5, net()))
    equal(found, oracle)
    assert found[1].notes == oracle[1].notes
    assert len(found[1].notes) == 2


def test_channels_last_weights_go_on_in_their_memory_format(tmp_path):
    """Sums over other strides would round otherwise."""
    from test_run import task

    def fresh():
        model = task(0).model
        return model.to(memory_format=torch.channels_last)

    made = task(0)
    calls = []

    def train(batch_size, rng):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        yield from made.train(batch_size, rng)

    recipe = replace(RECIPE, epochs=2, batch_size=64)
    with pytest.raises(Killed):
        fit(fresh(), replace(made, train=train), recipe, rng=generator(0), keep=tmp_path)
    model, oracle = fresh(), fresh()
    fit(model, made, recipe, rng=generator(0), keep=tmp_path)
    fit(oracle, made, recipe, rng=generator(0))
    for name, value in oracle.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_the_last_two_epochs_are_kept_whole_and_of_earlier_ones_the_model(tmp_path):
    start(tmp_path, 6)
    assert sorted(file.name for file in tmp_path.glob("*trainer*")) == [
        "epoch-0004.trainer.safetensors",
        "epoch-0005.trainer.safetensors",
    ]
    assert len(list(tmp_path.glob("*.model.safetensors"))) == 5


def test_without_snapshots_only_two_epochs_are_kept(tmp_path):
    model = net()
    curve = fit(model, small(), LONG, rng=generator(0), keep=tmp_path, snapshots=False)
    assert list(curve.states()) == []
    assert len(curve.epochs) == 6
    assert sorted({file.name[:10] for file in tmp_path.iterdir()}) == ["epoch-0005", "epoch-0006"]
    again = net()
    fit(again, small(train=killed_in(1)), LONG, rng=generator(0), keep=tmp_path, snapshots=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


DAMAGES = {
    "a bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "nothing": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["json", "model.safetensors", "trainer.safetensors"])
def test_a_damaged_epoch_is_passed_over_told_and_made_again(tmp_path, part, damage):
    start(tmp_path, 4)
    if (part, damage) == ("json", "a bit"):
        pytest.skip("the bit is in the newline")
    DAMAGES[damage](tmp_path / f"epoch-0003.{part}")
    found = go(tmp_path)
    assert "goes on after epoch 2 of 6" in found[2]
    told = [line for line in found[2] if "passed over" in line]
    assert len(told) == (0 if (part, damage) == ("json", "gone") else 1)
    equal(found, go(None))


def test_where_an_earlier_model_is_damaged_all_begins_anew(tmp_path):
    start(tmp_path, 5)
    DAMAGES["a bit"](tmp_path / "epoch-0001.model.safetensors")
    found = go(tmp_path)
    assert not any(line.startswith("goes on") for line in found[2])
    assert any("the sha256 of model in epoch 1 is not the one noted" in line for line in found[2])
    equal(found, go(None))


@pytest.mark.parametrize("other", ["recipe", "seed", "weights", "code", "data"])
def test_another_training_is_not_gone_on_from(tmp_path, other, monkeypatch):
    start(tmp_path, 4)
    changes = {
        "recipe": {"recipe": replace(LONG, lr=0.2)},
        "seed": {"seed": 1},
        "weights": {"model": net(1)},
        "data": {"data": replace(small().data, sha256="1" * 64)},
        "code": {},
    }[other]
    if other == "code":
        monkeypatch.setattr("hap.harness.train.loop.code", lambda: {"sha256": "another"})
    found = go(tmp_path, **changes)
    assert not any(line.startswith("goes on") for line in found[2])
    assert sum("passed over, Foreign: of another training" in line for line in found[2]) == 1
    changes.pop("model", None)
    equal(found, go(None, net(1) if other == "weights" else None, **changes))


def test_a_full_disk_ends_in_one_line_and_the_last_epoch_is_there(tmp_path, monkeypatch):
    replaced = os.replace

    def full(source, target):
        if "0003.trainer" in str(target):
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(HapError, match=r"epoch-0003\.trainer\.safetensors: cannot be written \(No space left"):
        go(tmp_path)
    monkeypatch.setattr(files.os, "replace", replaced)
    found = go(tmp_path)
    assert "goes on after epoch 2 of 6" in found[2]
    equal(found, go(None))


def test_rows_that_do_not_fit_the_number_are_refused(tmp_path):
    start(tmp_path, 4)
    file = tmp_path / "epoch-0003.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "rows": table["rows"][:1]}))
    assert any("3 epochs expected, found 1" in line for line in go(tmp_path)[2])
    assert table["schema"] == checkpoints.SCHEMA


@pytest.mark.slow
def test_sigkill_in_the_middle_of_an_epoch_loses_that_epoch_alone(tmp_path):
    """A process of its own is killed by the kernel, as a machine that is preempted does."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""\
        import os, signal, sys, time
        from test_checkpoints import LONG, net, small, epoch
        from hap.harness.train.loop import fit, generator
        from pathlib import Path
        def slow(batch_size, rng):
            for step, batch in enumerate(epoch(batch_size, rng)):
                yield batch
                if step == 1 and Path(sys.argv[1], "epoch-0003.json").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
        fit(net(), small(train=slow), LONG, rng=generator(0), keep=Path(sys.argv[1]))
    """)
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    # the number of threads decides how sums round, so a training names it: the other process must have as many
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, script, tmp_path / "kept"], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    found = go(tmp_path / "kept")
    assert "goes on after epoch 3 of 6" in found[2]
    equal(found, go(None))


def test_what_a_fine_tuning_keeps_goes_when_its_record_is_there_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(tmp_path / "cache"))
    case, seen = load_spec(write_spec(tmp_path)).cases["hap"], []

    def run(case, seed, *, known, say, keep):
        seen.append((keep, keep.exists()))
        keep.mkdir(parents=True, exist_ok=True)
        if len(seen) == 1:
            raise Killed
        return fake_run(case, seed)

    monkeypatch.setattr("hap.harness.run.run", run)
    with pytest.raises(Killed):
        ensure(Job(case, 0, tmp_path))
    ensure(Job(case, 0, tmp_path))
    ensure(Job(case, 1, tmp_path))
    assert [there for _, there in seen] == [False, True, False]
    assert seen[0] == (seen[1][0], False)
    assert seen[2][0] != seen[0][0]
    assert all(keep.is_relative_to(tmp_path / "cache") and not keep.exists() for keep, _ in seen)
