"""Pruning without training on two threads: seconds, memory above model and data, and accuracy on CIFAR-10.

The pretrained ResNets of akamaster/pytorch_resnet_cifar10, the inner channels of their blocks pruned by greedy removal
(`hap.methods:obs`), the rest updated by least squares from 1,000 images without their labels. Needs the data of the
CIFAR-10 tasks and their checkpoints; without them it is skipped.

The bars: ResNet-56 at 50 % of the parameters at least 90.5 %, at 70 % at least 84 %, ResNet-20 at 50 % at least 83 %,
each the mean over three draws of the images, and each under 60 s; four times the images take at most 1.3 times the
memory where what is held is bounded (`memory=`). `python benchmarks/bench_update.py --json FILE` does without pytest;
`--smoke` and BENCH_SMOKE=1 take few images and hold no bar.
"""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import command
import pytest
import torch
from bench_tracing import resident, two_threads  # noqa: F401  # the fixture is for all tests here

from hap import Budget, apply, couple, trace
from hap.harness.task import MissingData
from hap.methods import obs
from hap.plan import plan
from hap.updates import least_squares

BARS = {"resnet56@50": (0.5, 90.5), "resnet56@70": (0.7, 84.0), "resnet20@50": (0.5, 83.0)}
SECONDS, GROWTH, IMAGES = 60.0, 1.3, 1000
BOUND = 2**26  # bytes of passes that stand still, where memory is measured by images


def task(name, seed, images):
    module = importlib.import_module(f"hap.harness.tasks.cifar10_{name.partition('@')[0]}")
    return module.task(seed, images=images, batch=125)


def pruned(made, share, memory=2**30):
    groups = couple(made.model, trace(made.model, made.example))
    scores = obs(made.model, made.loss, made.batches, groups, rng=torch.Generator().manual_seed(0))
    chosen = plan(groups, scores, Budget(params=share, only=["layer*.conv1"]))
    inputs = [x for x, _ in made.batches]
    return apply(made.model, groups, chosen, None, least_squares, batches=inputs, call=made.loss.call, memory=memory)


def measure(name, smoke):
    share, _ = BARS[name]
    found = {"name": name, "smoke": smoke, "seconds": [], "accuracy": []}
    for seed in range(1 if smoke else 3):
        made = task(name, seed, 50 if smoke else IMAGES)
        start = time.perf_counter()
        small = pruned(made, share)
        found["seconds"].append(time.perf_counter() - start)
        found["accuracy"].append(made.evaluate(small, "validation" if smoke else "test")["accuracy"])
    for images in (125, 500) if smoke else (500, 2000):
        args = [sys.executable, __file__, name, "--peak", str(images)]
        ran = subprocess.run(args, capture_output=True, text=True, check=True)
        found[f"bytes of {images} images"] = int(ran.stdout)
    return found


def peak(name, images):
    """Bytes above model and data at most, in this process (Linux); not by getrusage (see `bench_tracing.peak`)."""
    made = task(name, 0, images)
    made.loss.call(made.model, made.batches[0][0])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    pruned(made, BARS[name][0], BOUND)
    return resident("VmHWM") - before


def table(found):
    memory = ", ".join(f"{v / 2**20:.0f} MiB with {k.split()[2]}" for k, v in found.items() if k.startswith("bytes"))
    accuracy = ", ".join(f"{each:.2f}" for each in found["accuracy"])
    return f"{found['name']}: {accuracy} %, {max(found['seconds']):.1f} s at most, {memory} images"


def broken(found):
    _, least = BARS[found["name"]]
    few, many = (value for key, value in found.items() if key.startswith("bytes"))
    if found["smoke"]:
        return
    if fmean(found["accuracy"]) < least:
        yield f"{found['name']}: {fmean(found['accuracy']):.2f} % where {least:g} are asked"
    if max(found["seconds"]) > SECONDS:
        yield f"{found['name']}: {max(found['seconds']):.1f} s where {SECONDS:g} are asked at most"
    if many > GROWTH * few:
        yield f"{found['name']}: {many / few:.2f} times the memory for four times the images, {GROWTH} at most"


@pytest.mark.parametrize("name", BARS)
def test_pruning_without_training(name, capsys):
    try:
        found = measure(name, bool(os.environ.get("BENCH_SMOKE")))
    except MissingData as error:
        pytest.skip(str(error))
    with capsys.disabled():
        print(f"\n{table(found)}")
    assert not [*broken(found)]


if __name__ == "__main__":
    torch.set_num_threads(2)
    if "--peak" in sys.argv:
        print(peak(sys.argv[1], int(sys.argv[3])))
    else:
        command.run(command.options(__doc__, BARS).parse_args(), list(BARS), measure, table, broken)
