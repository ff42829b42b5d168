"""CIFAR-10 and the pretrained ResNet-20 of akamaster/pytorch_resnet_cifar10 (91.73 % on the test set)."""

from hap.harness.tasks import Task
from hap.harness.tasks.cifar10 import pretrained

FILE = "resnet20-12fca82f.th"


def task(
    seed: int, *, images: int = 512, batch: int = 128, last: int | None = None, train_images: int | None = None
) -> Task:
    """The pretrained model with `images` calibration images drawn by the seed, or the `last` ones as upstream takes.

    `train_images` limits an epoch of fine-tuning to that many images, drawn anew each epoch. The pretrained model has
    seen the images held out for validation, so its own validation accuracy says little; its test accuracy is honest.
    """
    return pretrained(20, FILE, seed, images=images, batch=batch, last=last, train_images=train_images)
