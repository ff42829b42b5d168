"""ResNet50 at 224x224: what its curvature costs by images, classes and processes; images decoded; training on a GPU.

Curvature is `exact` with three columns and one drawn, summed over each row, as `hessian_trace` takes it, on random
weights and images in batches of 8: seconds are medians over the rounds, memory is what a fresh process takes above
model and data. The pipeline decodes JPEGs of ImageNet's usual size, random crops as in training; made-up ones, or those
of HAP_IMAGENET. On a GPU also the throughput of training in bf16, channels last and compiled, with the share of the
rate that products of large matrices reach on the device, and the seconds of 1,024 images; no bars are on that yet.

The bars: twice the images take at most 2.4 times as long, 1,000 classes at most 1.5 times as long as 10, four batches
at most 1.25 times the memory of one, two processes on twice the images, of a thread or a GPU each, at most 1.1 times as
long as one (the least of the rounds), and two workers decode at least 1.5 times what one does. `python
benchmarks/bench_imagenet.py --json FILE` does without pytest; `--smoke`, and BENCH_SMOKE=1 with pytest, take few small
images and hold no bar.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import command
import pytest
import torch
from bench_tracing import resident, two_threads  # noqa: F401  # the fixture is for all tests here
from photographs import photographs
from torchvision.models import resnet50

from hap.cost import macs
from hap.harness.processes import ranks
from hap.harness.task import Data, Task
from hap.harness.tasks import imagenet
from hap.harness.tasks.decoding import AHEAD, Pictures, View, stream
from hap.harness.train.exact import exactly
from hap.harness.train.recipe import Recipe
from hap.harness.train.step import Stepper, optimiser
from hap.hessian.accumulate import merge
from hap.hessian.exact import exact
from hap.hessian.losses import CrossEntropy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PARTS = ("curvature", "pipeline") + ("training",) * CUDA
COUNTS, CLASSES, BATCH = (8, 16, 32), (10, 100, 1000), 8
PROCESSES = [n for n in (1, 2) if not CUDA or n <= torch.cuda.device_count()]  # a thread or a GPU each
MATRIX = 8192  # the side of the matrices whose product gives the rate of the device


def made(images, classes, side):
    """A network and batches of 8 random images."""
    torch.manual_seed(0)
    model = resnet50(num_classes=classes).to(DEVICE).to(memory_format=torch.channels_last)
    model.apply(lambda module: setattr(module, "momentum", 1.0))  # read by BatchNorm alone: take the batch's statistics
    inputs, targets = torch.randn(images, 3, side, side), torch.randint(classes, (images,))
    with torch.no_grad():
        model.train()(inputs[:BATCH].to(DEVICE))
    parts = zip(inputs.to(DEVICE).split(BATCH), targets.to(DEVICE).split(BATCH), strict=True)
    return model.eval(), list(parts)


def curvature(model, batches):
    rng = torch.Generator(DEVICE).manual_seed(0)
    return exact(model, CrossEntropy(), batches, columns=3, rng=rng, per="row")


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work):
    start = now()
    work()
    return now() - start


def timed(work, rounds):
    return median(seconds(work) for _ in range(rounds))


def by_images(smoke):
    """Everything about the curvature."""
    side, rounds = (32, 1) if smoke else (224, 3)
    counts = COUNTS[:1] if smoke else (1024, *COUNTS) if CUDA else COUNTS
    classes = CLASSES[:1] if smoke else CLASSES
    curvature(*made(2, 1000, side))  # the first takes fresh memory
    found = {"part": "curvature", "smoke": smoke, "side": side}
    found["seconds by images"] = {n: timed(partial(curvature, *made(n, 1000, side)), rounds) for n in counts}
    found["seconds an image"] = {n: took / n for n, took in found["seconds by images"].items()}
    found["seconds by classes"] = {c: timed(partial(curvature, *made(BATCH, c, side)), rounds) for c in classes}
    found["seconds by processes"] = {n: together(n, n * counts[-1] // 2, smoke) for n in PROCESSES}
    peaks = {}
    for n in (BATCH, 4 * BATCH):
        args = [sys.executable, __file__, "curvature", "--peak", str(n), *["--smoke"] * smoke]
        peaks[n] = int(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    return found | {"bytes by images": peaks}


def together(processes, images, smoke):
    """The seconds of so many images shared out over the ranks of torchrun, the merging included."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    args = [sys.executable, *launch, __file__, "curvature", "--shared", str(images), *["--smoke"] * smoke]
    return float(subprocess.run(args, capture_output=True, text=True, check=True).stdout)


def shared(images, smoke):
    """What each of those ranks does; rank 0 prints the least."""
    with ranks.joined():
        torch.set_num_threads(1)
        model, batches = made(images, 1000, 32 if smoke else 224)
        mine, took = ranks.share(batches), []

        def work():
            merge(ranks.gathered(curvature(model, mine)))

        for _ in range(2 if smoke else 4):  # of which the first takes fresh memory
            ranks.gathered(0)  # all begin at once
            took.append(seconds(work))
        if ranks.rank() == 0:
            print(min(took[1:]))  # what else the machine does only adds to one of two jobs


def peak(images, smoke):
    """Bytes above model and data at most, in this process (Linux); not by getrusage (see `bench_tracing.peak`)."""
    model, batches = made(images, 1000, 32 if smoke else 224)
    curvature(model, [(x[:2], y[:2]) for x, y in batches[:1]])
    ctypes.CDLL(None).malloc_trim(0)  # else the call would live on what the warm-up left
    torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if CUDA else resident("VmRSS")
    curvature(model, batches)
    return (torch.cuda.max_memory_allocated() if CUDA else resident("VmHWM")) - before


def decoding(smoke):
    """Images a second by one process and by more."""
    with tempfile.TemporaryDirectory() as folder:
        real = "HAP_IMAGENET" in os.environ
        images = imagenet.split()[0]["train"] if real else photographs(Path(folder), 16 if smoke else 64)
        counts = {0, 1, 2} if smoke else {0, 1, 2, *(n for n in (4, 8, 16) if n <= (os.cpu_count() or 1))}
        speeds = {n: rate(Pictures(images, View()), n, 0.2 if smoke else 5.0) for n in sorted(counts)}
        average = float(images.sizes.mean())
    found = {"part": "pipeline", "smoke": smoke, "images": "of ImageNet" if real else "made up"}
    return found | {"bytes": average, "images per second by workers": speeds}


def rate(pictures, workers, least):
    """Once all workers run."""
    n = len(pictures.images.labels)
    keys = [[(i % n, i) for i in range(first, first + BATCH)] for first in range(0, 200_000, BATCH)]
    source, total = stream(pictures, keys, workers), 0
    for _ in range(AHEAD * workers + 1):
        next(source)
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < least:
        total += len(next(source))
    source.close()
    return total / passed


def training(smoke):
    """Steps of training in bf16 on a GPU, and what share of the device's rate they reach."""
    batch, steps = (8, 2) if smoke else (256, 30)
    model, ((inputs, targets), *_) = made(BATCH, 1000, 224)
    inputs, targets = inputs.repeat(batch // BATCH, 1, 1, 1), targets.repeat(batch // BATCH)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    recipe = Recipe(epochs=1, lr=0.01, batch_size=batch, autocast="bf16", compile=not smoke)
    data = Data("random", "0" * 64, True, "")
    task = Task("bench", model, CrossEntropy(), [], None, batch, lambda *_: {}, inputs[:1], data)
    step, sgd = Stepper(model.train(), task, recipe, batch), optimiser(model, recipe)

    def some():
        for _ in range(steps):
            step(inputs, targets)
            sgd.step()
            sgd.zero_grad(set_to_none=True)

    with exactly():
        some()  # compiles
        speed = batch * steps / timed(some, 1 if smoke else 3)
    one, other = (torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    products = 5 if smoke else 50
    torch.mm(one, other)
    flops = products * 2 * MATRIX**3 / timed(lambda: [torch.mm(one, other) for _ in range(products)], 3)
    work = 3 * 2 * macs(model.eval(), inputs[:1].contiguous())  # forwards, and twice as much backwards
    found = {"part": "training", "smoke": smoke, "batch": batch, "notes": step.notes}
    return found | {"images per second": speed, "matrix flops per second": flops, "share": speed * work / flops}


def measure(part, smoke):
    return {"curvature": by_images, "pipeline": decoding, "training": training}[part](smoke)


def broken(found):
    """The bars that do not hold."""
    if found["smoke"] or found["part"] == "training":
        return []
    if found["part"] == "pipeline":
        speeds = found["images per second by workers"]
        held = [("one worker by two", speeds[1] / speeds[2], 1 / 1.5)]
    else:
        images, classes, room = (found[f"{what} by {by}"] for what, by in KINDS)
        held = [("twice the images", images[32] / images[16], 2.4), ("1,000 classes", classes[1000] / classes[10], 1.5)]
        if (took := found["seconds by processes"]).keys() >= {1, 2}:
            held.append(("two processes", took[2] / took[1], 1.1))
        held.append(("memory of four batches", room[4 * BATCH] / room[BATCH], 1.25))
    return [f"{found['part']}, {what}: {value:.2f} > {bar:.2f}" for what, value, bar in held if value > bar]


KINDS = (("seconds", "images"), ("seconds", "classes"), ("bytes", "images"))


def table(found):
    lines = [f"\n{found['part']}"]
    for what, value in found.items():
        if isinstance(value, dict):
            unit, scale = ("MiB", 2**20) if what.startswith("bytes") else ("", 1)
            lines.append(f"  {what:32}" + "".join(f"{n:>8}: {each / scale:9.3f}{unit}" for n, each in value.items()))
        elif what not in ("part", "smoke"):
            lines.append(f"  {what:32}{value if isinstance(value, str | list) else f'{value:.4g}'}")
    return "\n".join(lines)


@pytest.mark.parametrize("part", PARTS)
def test_imagenet(benchmark, part, capsys):
    found = benchmark.pedantic(measure, (part, "BENCH_SMOKE" in os.environ), rounds=1, iterations=1)
    benchmark.extra_info |= found
    with capsys.disabled():  # the numbers are the point
        print(table(found))
    assert not broken(found)


def main():
    parser = command.options(__doc__, PARTS)
    parser.add_argument("--peak", type=int, help="print the bytes of so many images alone")
    parser.add_argument("--shared", type=int, help="print the seconds of so many images, as a rank of torchrun")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.shared:
        shared(args.shared, args.smoke)
    elif args.peak:
        print(peak(args.peak, args.smoke))
    else:
        command.run(args, PARTS, measure, table, broken)


if __name__ == "__main__":
    main()
