"""What the nightly job times: curvature, tracing, training and latency, a few goes of what the benchmarks beside it do.

`works()` gives the seconds of one go of each by its name. A work that changes takes another name, for its times from
before then mean nothing. They are small: minutes for all on two threads.
"""

from functools import partial

import bench_curvature
import bench_inference
import bench_tracing
import bench_training
import torch

STEPS = 2  # of training in one go


def works():
    """Name -> a function that does the work once and returns its seconds; what it needs is made here."""
    model, batch = bench_curvature.prepare("resnet20", smoke=True)
    images = f"{len(batch[0])} images"
    closed = partial(bench_curvature.closed, model, batch, columns=2)
    found = {
        f"curvature of ResNet-20, {images}, 2 columns per {per}": partial(closed, per=per) for per in ("row", "weight")
    }
    found[f"a probe of ResNet-20, {images}"] = partial(bench_curvature.probing, model, batch)
    build, example, _ = bench_tracing.NETS["resnet50"]
    traced = partial(bench_tracing.grouped, build().eval(), example())
    found["tracing of ResNet-50"] = partial(bench_curvature.seconds, traced)
    found[f"training of ResNet-20, {STEPS} steps of {bench_training.BATCH}"] = training()
    return found | latencies()


def training():
    pixels = torch.randint(256, (bench_training.BATCH * STEPS, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (len(pixels),))
    loop = bench_training.ours(bench_training.NETS["resnet20"], pixels, labels, bench_training.RECIPE)
    return lambda: STEPS * bench_training.BATCH / bench_training.block("ours", loop, STEPS)


def latencies():
    models, _ = bench_inference.prepare("resnet56")
    images = torch.randn(bench_inference.BAR, 3, 32, 32).to(bench_inference.DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    chosen = {"dense": models["dense"], "half of the MACs gone": models["union"]}
    named = {f"latency of ResNet-56, {len(images)} images, {what}": model for what, model in chosen.items()}
    return {what: partial(once, model.to(bench_inference.DEVICE), images) for what, model in named.items()}


@torch.inference_mode()
def once(model, images):
    return bench_inference.seconds(model, images)
