"""Images a second of the training loop, beside the plain loop of the published code on the same device in one run.

The plain loop is that of the published code: torchvision's DataLoader with worker processes, crops and flips of PIL
images, ToTensor, float32, SGD, and the loss read after every step. Ours takes the same steps on the same images from
bytes that lie on the device. All take turns, block by block; images a second are medians over the rounds, and the
ratios medians of those to the plain loop of the same round. Random images and weights; CUDA where there is any, else
two threads.

The bars: the fastest of ours at least 1.5 times the plain loop on two CPU cores, 8 times on a GPU. `python
benchmarks/bench_training.py --json FILE` does without pytest; `--smoke`, and BENCH_SMOKE=1 with pytest, take two steps
of few images and hold no bar. `--compile` adds the compiled loop on a CPU too, where it takes minutes to compile.
"""

import os
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from statistics import median

import command
import numpy as np
import pytest
import torch
from bench_tracing import two_threads  # noqa: F401  # the fixture is for all tests here
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hap.harness.task import Data, Task
from hap.harness.tasks.data import Images, Normalise, epoch
from hap.harness.tasks.nets import preresnet, resnet
from hap.harness.train.loop import exactly, generator
from hap.harness.train.recipe import Recipe
from hap.harness.train.step import Stepper
from hap.hessian.losses import CrossEntropy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NETS = {"resnet20": partial(resnet, 20), "resnet56": partial(resnet, 56), "preresnet29": preresnet}
BATCH, BAR = 128, 8.0 if CUDA else 1.5
PLAIN = "the published loop"
RECIPE = Recipe(epochs=1, lr=0.01, weight_decay=2e-4, batch_size=BATCH)
OURS = {
    "ours, float32": RECIPE,
    "ours, bf16": Recipe(**{**vars(RECIPE), "autocast": "bf16"}),
    "ours, bf16, compiled": Recipe(**{**vars(RECIPE), "autocast": "bf16", "compile": True}),
}


class Pictures(Dataset):
    """As torchvision.datasets.CIFAR10 hands them out."""

    def __init__(self, pixels, labels, transform):
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain(build, pixels, labels, workers):
    """Steps for ever, as main_prune.py takes them."""
    augment = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pictures = Pictures(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()), labels.tolist(), augment)
    loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    model = build().to(DEVICE).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)
    while True:
        for inputs, targets in loader:
            optimiser.zero_grad()
            loss = F.cross_entropy(model(inputs.to(DEVICE)), targets.to(DEVICE))
            loss.backward()
            optimiser.step()
            loss.item()
            yield len(targets)


def ours(build, pixels, labels, recipe):
    """Steps for ever, as `hap.harness.train.loop` takes them."""
    images = Images(pixels.to(DEVICE), labels.to(DEVICE))
    model = build().to(DEVICE).to(memory_format=torch.channels_last).train()
    rng, loss = generator(0), CrossEntropy()
    draw = partial(epoch, images, normalise=Normalise(MEAN, STD), pad=4, flip=True)
    data = Data("random", "0" * 64, True, "")
    task = Task("bench", model, loss, [], draw, len(labels), lambda *_: {}, images.pixels[:1], data)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4, fused=True)
    step = Stepper(model, task, recipe, BATCH)
    while True:
        for inputs, targets in draw(BATCH, rng):
            step(inputs, targets)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            for note in step.notes:
                raise RuntimeError(note)
            yield len(targets)


def measure(name, smoke, compiled=CUDA):
    images, steps, rounds = (256, 1, 1) if smoke else (BATCH * 40, 100, 5) if CUDA else (BATCH * 10, 3, 5)
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    labels = torch.randint(10, (images,), generator=generator(1))
    workers = 0 if smoke else os.cpu_count() or 1
    loops = {PLAIN: plain(NETS[name], pixels, labels, workers)}
    chosen = {who: recipe for who, recipe in OURS.items() if compiled or not recipe.compile}
    loops |= {who: ours(NETS[name], pixels, labels, recipe) for who, recipe in chosen.items()}
    speeds = defaultdict(list)
    for who, loop in loops.items():  # warm up: workers, caches, compilers
        block(who, loop, 1)
    for _ in range(rounds):
        for who, loop in loops.items():
            speeds[who].append(block(who, loop, steps))
    ratios = {who: median(a / b for a, b in zip(each, speeds[PLAIN], strict=True)) for who, each in speeds.items()}
    found = {who: median(each) for who, each in speeds.items()}
    return {"network": name, "smoke": smoke, "workers": workers, "images per second": found, "ratio": ratios}


def block(who, loop, steps):
    """Images a second over so many steps, with the device waited for at the end; ours under the rules of a run."""
    with nullcontext() if who == PLAIN else exactly():
        start = time.perf_counter()
        seen = sum(next(loop) for _ in range(steps))
        if CUDA:
            torch.cuda.synchronize()
        return seen / (time.perf_counter() - start)


def broken(found):
    """The bars that do not hold."""
    best = max(ratio for who, ratio in found["ratio"].items() if who != PLAIN)
    return [] if found["smoke"] or best >= BAR else [f"{found['network']}: {best:.2f} times the plain loop < {BAR}"]


def table(found):
    lines = [f"\n{found['network']:34}{'images/s':>10}{'ratio':>8}"]
    return "\n".join(
        lines
        + [f"  {who:32}{speed:10.0f}{found['ratio'][who]:8.2f}" for who, speed in found["images per second"].items()]
    )


@pytest.mark.parametrize("name", NETS)
def test_training_beside_the_published_loop(benchmark, name, capsys):
    found = benchmark.pedantic(measure, (name, "BENCH_SMOKE" in os.environ), rounds=1, iterations=1)
    benchmark.extra_info |= found
    with capsys.disabled():  # the comparison is the point
        print(table(found))
    assert not broken(found)


def main():
    parser = command.options(__doc__, NETS)
    parser.add_argument("--compile", action="store_true", help="the compiled loop on a CPU too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    command.run(args, NETS, partial(measure, compiled=CUDA or args.compile), table, broken)


if __name__ == "__main__":
    main()
