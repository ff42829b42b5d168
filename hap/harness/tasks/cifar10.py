"""CIFAR-10 with a pretrained network of akamaster/pytorch_resnet_cifar10; the workloads beside this name which."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from hap.harness.tasks import Task
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
from hap.harness.training import generator
from hap.losses import CrossEntropy

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # that of the checkpoint, not of CIFAR-10
HELD_OUT = 5000  # the last training images: for selection, never trained on by us


def pretrained(
    depth: int, file: str, seed: int, *, images: int, batch: int, last: int | None, train_images: int | None
) -> Task:
    """The option-A network of this depth, and the workload of `cifar10_resnet20.task`."""
    positive(last=1 if last is None else last, train_images=1 if train_images is None else train_images)
    train, test, data = cifar10()
    state, found, sha = checkpoint(file)
    model = load_weights(resnet(depth), state, found).to(device()).to(memory_format=torch.channels_last).eval()
    train, test = (Images(*(part.to(device()) for part in images)) for images in (train, test))
    splits = {"validation": train.part(slice(-HELD_OUT, None)), "test": test}
    fitted = train.part(slice(-HELD_OUT))
    loss = CrossEntropy()
    rng = generator(seed, "calibration")
    batches = _last(train, last) if last else calibration(fitted, NORMALISE, images, batch, rng)

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        return measure(model, loss.call, splits[split], NORMALISE)

    return Task(
        name=f"cifar10_resnet{depth}",
        model=model,
        loss=loss,
        batches=batches,
        train=partial(epoch, fitted, normalise=NORMALISE, pad=4, flip=True, limit=train_images),
        train_size=min(train_images or len(fitted.labels), len(fitted.labels)),
        evaluate=evaluate,
        example=NORMALISE(train.pixels[:1]),
        data=replace(data, note=f"{data.note}; checkpoint {file} sha256 {sha}"),
    )


def _last(train: Images, last: int) -> list[tuple[Tensor, Tensor]]:
    # upstream: the loop over batches of 512 has no break, so the Hessian is that of the last one: 336 images
    return [(NORMALISE(train.pixels[-last:]), train.labels[-last:])]
