import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import together
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hap import HapError
from hap.harness.cli import app as cli
from hap.harness.cli import bill, estimate, pricing
from hap.harness.cli.bill import Estimate, Price
from hap.harness.cli.pricing import steps_of
from hap.harness.spec.cases import few
from hap.harness.spec.spec import load_spec
from hap.harness.train.loop import Recipe, generator, snapshot

ROOT = Path(__file__).parents[3]


def test_prices_add_up_and_multiply():
    one = Price(3, 10.0, 0.5)
    assert one.times(4) == Price(12, 40.0, 2.0)
    assert one.plus(Price(1, 1.0, 1.0)) == Price(4, 11.0, 1.5)
    assert Price.sum([one, one, Price()]) == one.times(2)
    assert Price.sum([]) == Price()


def made(total, chain):
    return Estimate("x", {"train": total}, {"train": 1}, chain, None, 0, "cpu")


@pytest.mark.parametrize(("devices", "hours"), [(1, 100), (8, 12.5), (64, 5)])
def test_hours_are_shared_out_until_one_chain_is_all(devices, hours):
    found = made(Price(1, 3.6e18, 360_000.0), Price(1, 1.8e17, 18_000.0))
    assert found.hours(devices) == pytest.approx(hours)
    # 3.6e18 FLOP at 10 TFLOP/s are 100 hours too
    assert found.hours(devices, tflops=10) == pytest.approx(hours)


def test_the_flops_of_a_training_are_those_of_its_steps():
    """The oracle counts a whole epoch; here one step is counted, and the others taken for their share of samples."""
    task, recipe = together.task(), Recipe(epochs=2, lr=0.1, batch_size=16)
    found = steps_of(together.net(seed=1), task, recipe, generator(0))
    model = together.net(seed=1).train()
    with FlopCounterMode(display=False) as counter:
        for inputs, targets in task.train(16, generator(0)):
            task.loss(model, (inputs, targets)).backward()
    assert found.steps == 2 * -(-together.IMAGES // 16)
    assert found.flops == pytest.approx(2 * counter.get_total_flops(), rel=1e-6)
    assert 0 < found.seconds < 60


@pytest.mark.parametrize("small", [1.0, 1e12])
def test_batches_of_a_calibration_count_by_what_is_in_them(small, monkeypatch):
    """The first has 3 samples and the others 16, as short sentences may come before long ones."""
    monkeypatch.setattr(pricing, "SMALL", small)
    task = together.task()
    task = replace(task, batches=list(task.batches)[::-1])
    spec = load_spec(ROOT / "reproductions" / "digits.toml")
    case = next(case for case in spec.cases.values() if "taylor" in str(case.score))
    found, forward = pricing.score_of(case.score, task, case, 0), pricing.forward_of(task)
    with FlopCounterMode(display=False) as counter:
        for inputs, targets in task.batches:
            task.loss(task.model, (inputs, targets)).backward()
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=1e-6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for inputs, _ in task.batches:
            task.model(inputs)
    samples = sum(len(targets) for _, targets in task.batches)
    assert forward.flops * samples == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_pricing_leaves_the_model_as_it_was():
    model = together.net(seed=1)
    before = snapshot(model)
    steps_of(model, together.task(), together.RECIPE, generator(0))
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert not model.training


def test_a_heavy_batch_is_cut_on_a_cpu_and_a_light_one_is_not(monkeypatch):
    inputs, targets = together.task().batches[0]
    assert pricing._cut(together.task(), inputs, targets)[2] == 1.0
    monkeypatch.setattr(pricing, "SMALL", 1.0)
    few_inputs, few_targets, share = pricing._cut(together.task(), inputs, targets)
    assert (len(few_inputs), len(few_targets), share) == (2, 2, 2 / len(targets))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The estimate of the digits, from an empty cache."""
    before = os.environ.get("HAP_CACHE")
    os.environ["HAP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    spec = load_spec(ROOT / "reproductions" / "digits.toml")
    small = spec.model_copy(update={"cases": dict(list(spec.cases.items())[:2])})
    yield small, told(small)
    assert not list(Path(os.environ["HAP_CACHE"]).rglob("*.safetensors"))  # nothing was trained, nothing kept
    os.environ.pop("HAP_CACHE")
    os.environ.update({} if before is None else {"HAP_CACHE": before})


def told(spec):
    lines = []
    found = estimate.estimate(spec, lines.append)
    assert lines
    return found


def test_all_stages_of_a_spec_have_a_price(digits):
    spec, found = digits
    assert found.counts["train"] == len(spec.seeds)  # one model a seed, which the cases share
    assert found.counts["score"] == len(spec.seeds) * len(spec.cases)
    assert all(found.stages[stage].seconds > 0 for stage in bill.STAGES)
    assert found.total == Price.sum(found.stages.values())
    assert 0 < found.chain.seconds < found.total.seconds
    assert found.memory is None
    assert found.disk > 0


def test_the_dense_training_is_that_of_the_task(digits):
    from hap.harness.tasks.digits_preresnet import RECIPE, SPLITS

    steps = RECIPE.epochs * -(-SPLITS["train"] // RECIPE.batch_size)
    spec, found = digits
    assert found.stages["train"].steps == steps * len(spec.seeds)


def test_few_probes_are_multiplied():
    spec = load_spec(ROOT / "reproductions" / "digits.toml")
    refs = [case.score for case in spec.cases.values() if case.score]
    # an exact trace draws none, whatever the default
    assert [few(ref) for ref in refs] == [(1.0, ref) for ref in refs]
    ref = refs[0].model_copy(update={"options": {"curvature": "hutchinson", "probes": 300}})
    factor, cheap = few(ref)
    assert factor == 150
    assert cheap.options["probes"] == 2


def test_the_table_and_the_lines(digits):
    _, found = digits
    lines = list(bill.lines(found, [1, 8], None))
    assert lines[0].startswith("GPU memory: not measured, there is no GPU; disk: ")
    assert lines[1].startswith("hours on devices like this one: 1: ")
    assert "that sustain 100 TFLOP/s" in list(bill.lines(replace(found, memory=2**31), [1], 100.0))[1]
    assert "GPU memory: 2.0 GiB" in next(bill.lines(replace(found, memory=2**31), [1], None))
    assert bill.table(found).row_count == len(bill.STAGES) + 1


@pytest.mark.parametrize("given", ["", "0", "1,-2", "many"])
def test_devices_that_are_no_numbers_are_one_line(given):
    with pytest.raises(HapError, match=r"--devices: numbers from 1 on expected"):
        bill.counts(given)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "hap: name a spec: "),
        (["digits", "--tflops", "0"], "hap: --tflops: a number above 0 expected, found 0"),
        (["digits", "--devices", "x"], "hap: --devices: numbers from 1 on expected"),
        (["nothing"], "hap: spec nothing: must be a file or a name in "),
    ],
)
def test_bad_questions_are_one_line(arguments, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = CliRunner().invoke(cli.app, ["cost", *arguments])
    assert told.exit_code == 2
    assert told.stderr.startswith(line)
    assert len(told.stderr.strip().splitlines()) == 1


def test_a_spec_whose_data_is_not_here_is_one_line(tmp_path):
    env = {**os.environ, "HAP_DATA": str(tmp_path), "HOME": str(tmp_path), "HAP_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "hap", "cost", str(ROOT / "reproductions" / "resnet20-cifar10.toml")]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("hap: CIFAR-10 not found: ")
