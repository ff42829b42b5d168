"""Seconds of a forward pass of pruned models beside the dense one, and beside the MACs that were removed.

Half of the MACs go, for they are what time is expected to follow; the same fraction of every layer, its smallest
weights first (`uniform`), for a global order by magnitude would empty some layers of random weights and leave others.
All take turns in each round, so that what else the machine does hits all alike: milliseconds are medians over the
rounds, `faster` is the median of the dense model's time over that of the same round, and `of MACs` is its share of the
MAC reduction. Eval mode, float32, channels last as in the tasks; CUDA where there is any, else one thread. `of 8`, `of
16`: with `Budget.multiple`. The implants are centre taps, a fifth of what is pruned.

The bar, on a CPU: at batch 64 the tied model has at least 0.7 of the speed-up that its MACs promise. `python
benchmarks/bench_inference.py --json FILE` does without pytest; `--smoke`, and BENCH_SMOKE=1 with pytest, run few images
for one round and hold no bar.
"""

import os
import time
from collections import defaultdict
from functools import partial
from operator import truediv
from statistics import median

import command
import pytest
import torch

from hap import Budget, CrossEntropy, apply, couple, trace
from hap.cost import macs, params
from hap.harness.tasks.nets import preresnet, resnet
from hap.implants import centre_tap
from hap.methods import uniform
from hap.plan import plan

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHARE, BAR, TIED = 0.7, 64, "tied"
NETS = {"preresnet29": partial(preresnet, 29), "resnet56": partial(resnet, 56, shortcut="B")}
VARIANTS = {
    TIED: ("tied", {}),
    "tied, of 8": ("tied", {"multiple": 8}),
    "tied, of 16": ("tied", {"multiple": 16}),
    "union": ("union", {}),
    "union, of 8": ("union", {"multiple": 8}),
    "tied, implants": ("tied", {"implant": 0.2}),
    "union, implants": ("union", {"implant": 0.2}),
}
ROUNDS = {1: 15, 64: 7, 256: 2}  # by batch


def prepare(name):
    """Every variant of a network by its name, the dense one first."""
    model = NETS[name](rng=torch.Generator().manual_seed(0)).eval().to(memory_format=torch.channels_last)
    one, models = torch.zeros(1, 3, 32, 32), {"dense": model}
    groups = {how: couple(model, trace(model, one), how) for how in ("tied", "union")}
    scores = {how: uniform(model, CrossEntropy(), [], g, rng=torch.Generator()) for how, g in groups.items()}
    for variant, (how, options) in VARIANTS.items():
        chosen = plan(groups[how], scores[how], Budget(macs=0.5, **options))
        models[variant] = apply(model, groups[how], chosen, centre_tap)
    return models, one


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(model, images):
    start = now()
    model(images)
    return now() - start


@torch.inference_mode()
def timed(models, batch, rounds):
    """Seconds of each model in each round."""
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    images, took = images.contiguous(memory_format=torch.channels_last), defaultdict(list)
    for model in models.values():  # what is set up at a first call
        seconds(model, images[:64])
    for _ in range(rounds):
        for variant, model in models.items():
            took[variant].append(seconds(model, images))
    return took


def measure(name, smoke):
    """All that is measured of a network; one entry of the JSON."""
    models, one = prepare(name)
    found = {"network": name, "device": DEVICE.type, "smoke": smoke, "batches": {}}
    found["params"] = {variant: params(model) for variant, model in models.items()}
    found["macs"] = {variant: macs(model, one) for variant, model in models.items()}
    found["reduction"] = {variant: found["macs"]["dense"] / n for variant, n in found["macs"].items()}
    models = {variant: model.to(DEVICE) for variant, model in models.items()}
    for batch, rounds in ({1: 1, 2: 1} if smoke else ROUNDS).items():
        took = timed(models, batch, rounds)
        found["batches"][batch] = {
            "seconds": {variant: median(each) for variant, each in took.items()},
            "speed-up": {variant: median(map(truediv, took["dense"], each)) for variant, each in took.items()},
        }
    return found


def broken(found):
    """The bars that do not hold."""
    if found["smoke"] or found["device"] != "cpu":
        return []
    share = found["batches"][BAR]["speed-up"][TIED] / found["reduction"][TIED]
    return [f"{found['network']}, {TIED}: {share:.2f} of the MAC reduction < {SHARE}"] if share < SHARE else []


def table(found):
    head = "".join(f"{f'batch {batch}, ms':>16}{'faster':>8}{'of MACs':>9}{'':11}" for batch in found["batches"])
    lines = [f"\n{found['network']:18}{'MACs':>7}{head}".rstrip()]
    for variant, reduction in found["reduction"].items():
        line = f"  {variant:16}{reduction:7.2f}"
        for each in found["batches"].values():
            faster, took = each["speed-up"][variant], each["seconds"][variant]
            says = "" if faster > 1 or variant == "dense" else "not faster"
            line += f"{1e3 * took:16.1f}{faster:8.2f}{faster / reduction:9.2f} {says:10}"
        lines.append(line.rstrip())
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NETS)
def test_inference_beside_macs(benchmark, name, capsys):
    found = benchmark.pedantic(measure, (name, "BENCH_SMOKE" in os.environ), rounds=1, iterations=1)
    benchmark.extra_info |= found
    with capsys.disabled():  # the comparison is the point
        print(table(found))
    assert not broken(found)


def main():
    args = command.options(__doc__, NETS).parse_args()
    torch.set_num_threads(1)
    command.run(args, NETS, measure, table, broken)


if __name__ == "__main__":
    main()
