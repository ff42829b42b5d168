"""CIFAR-10 and the pretrained ResNet-20 of akamaster/pytorch_resnet_cifar10 (91.73 % on the test set)."""

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

FILE = "resnet20-12fca82f.th"
NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # that of the checkpoint, not of CIFAR-10
HELD_OUT = 5000  # the last training images: for selection, never trained on by us


def task(
    seed: int, *, images: int = 512, batch: int = 128, last: int | None = None, train_images: int | None = None
) -> Task:
    """The pretrained model with `images` calibration images drawn by the seed, or the `last` ones as upstream takes.

    `train_images` limits an epoch of fine-tuning to that many images, drawn anew each epoch. The pretrained model has
    seen the images held out for validation, so its own validation accuracy says little; its test accuracy is honest.
    """
    positive(last=1 if last is None else last, train_images=1 if train_images is None else train_images)
    train, test, data = cifar10()
    state, file, sha = checkpoint(FILE)
    model = load_weights(resnet(20), state, file).to(device()).to(memory_format=torch.channels_last).eval()
    train, test = (Images(*(part.to(device()) for part in images)) for images in (train, test))
    splits = {"validation": train.part(slice(-HELD_OUT, None)), "test": test}
    fitted = train.part(slice(-HELD_OUT))
    loss = CrossEntropy()
    rng = generator(seed, "calibration")
    batches = _last(train, last) if last else calibration(fitted, NORMALISE, images, batch, rng)

    def evaluate(model: nn.Module, split: str) -> dict[str, float]:
        return measure(model, loss.call, splits[split], NORMALISE)

    return Task(
        name="cifar10_resnet20",
        model=model,
        loss=loss,
        batches=batches,
        train=partial(epoch, fitted, normalise=NORMALISE, pad=4, flip=True, limit=train_images),
        train_size=min(train_images or len(fitted.labels), len(fitted.labels)),
        evaluate=evaluate,
        example=NORMALISE(train.pixels[:1]),
        data=replace(data, note=f"{data.note}; checkpoint {FILE} sha256 {sha}"),
    )


def _last(train: Images, last: int) -> list[tuple[Tensor, Tensor]]:
    # upstream: the loop over batches of 512 has no break, so the Hessian is that of the last one: 336 images
    return [(NORMALISE(train.pixels[-last:]), train.labels[-last:])]
