"""CIFAR-10 around a network: its splits, the workload, and the pretrained ones of akamaster/pytorch_resnet_cifar10."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from hap import HapError
from hap.harness.task import Data, Seen, Task
from hap.harness.tasks.data import (
    Images,
    Normalise,
    calibration,
    checkpoint,
    cifar10,
    device,
    epoch,
    load_weights,
    measure,
    positive,
)
from hap.harness.tasks.nets import resnet
from hap.harness.train.loop import generator
from hap.hessian.losses import CrossEntropy

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # that of the checkpoint, not of CIFAR-10
HELD_OUT = 5000  # the last training images: for selection, never trained on by us
# images, where a run only has to go through every stage
SMOKE = {"train": 128, "validation": 64, "test": 64, "calibration": 16}


def pretrained(
    depth: int,
    file: str,
    seed: int,
    *,
    images: int = 512,
    batch: int = 128,
    last: int | None = None,
    train_images: int | None = None,
    smoke: bool = False,
) -> Task:
    """The option-A network of this depth, with `images` calibration images drawn by the seed.

    `last` instead: that many images at the end of the training set, as upstream. `train_images` limits an epoch of
    fine-tuning to that many images, drawn anew each epoch; `smoke` limits all to SMOKE. The pretrained model
    has seen the images held out for validation, so its own validation accuracy says little; its test accuracy is
    honest.
    """
    splits, data = split(smoke=smoke)
    state, found, sha = checkpoint(file)
    return workload(
        f"cifar10_resnet{depth}",
        load_weights(resnet(depth), state, found),
        splits,
        replace(data, note=f"{data.note}; checkpoint {file} sha256 {sha}"),
        NORMALISE,
        seed,
        images=few(images, smoke),
        batch=batch,
        last=last and few(last, smoke),
        train_images=train_images,
    )


def few(images: int, smoke: bool) -> int:
    """So many calibration images, or where it smokes as many of them as SMOKE has."""
    return min(images, SMOKE["calibration"]) if smoke else images


def split(held_out: int = HELD_OUT, smoke: bool = False) -> tuple[dict[str, Images], Data]:
    """Train, validation (the last `held_out` training images), test and all training images, on the device.

    With `held_out` 0 nothing is held out: the last 5,000 are trained on and validated on, so validation says little.
    """
    whole, test, data = cifar10()
    if not 0 <= held_out < len(whole.labels):
        raise HapError(f"task: held_out must be at least 0 and below {len(whole.labels)}, found {held_out}")
    shown = held_out or HELD_OUT
    if smoke:
        shown = min(shown, SMOKE["validation"])
        whole, test = whole.part(slice(SMOKE["train"] + shown * bool(held_out))), test.part(slice(SMOKE["test"]))
    whole, test = (Images(*(part.to(device()) for part in images)) for images in (whole, test))
    train = whole.part(slice(-shown)) if held_out else whole
    return {"train": train, "validation": whole.part(slice(-shown, None)), "test": test, "whole": whole}, data


def workload(
    name: str,
    model: nn.Module,
    splits: dict[str, Images],
    data: Data,
    normalise: Normalise,
    seed: int,
    *,
    images: int,
    batch: int,
    last: int | None,
    train_images: int | None,
) -> Task:
    """The task of a network and these splits."""
    positive(last=1 if last is None else last, train_images=1 if train_images is None else train_images)
    loss, train = CrossEntropy(), splits["train"]
    if last is None:
        batches = calibration(train, normalise, images, batch, generator(seed, "calibration"))
    else:
        # upstream: the loop over batches of 512 has no break, so the Hessian is that of the last one: 336 images
        shown = splits["whole"].part(slice(-last, None))
        batches = [(normalise(shown.pixels), shown.labels)]

    def evaluate(model: nn.Module, which: str, seen: Seen | None = None) -> dict[str, float]:
        return measure(model, loss.call, splits[which], normalise, seen=seen)

    return Task(
        name=name,
        model=model.to(device()).to(memory_format=torch.channels_last).eval(),
        loss=loss,
        batches=batches,
        train=partial(epoch, train, normalise=normalise, pad=4, flip=True, limit=train_images),
        train_size=min(train_images or len(train.labels), len(train.labels)),
        evaluate=evaluate,
        example=normalise(train.pixels[:1]),
        data=data,
        test_samples=len(splits["test"].labels),
    )
