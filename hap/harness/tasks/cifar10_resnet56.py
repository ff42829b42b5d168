"""CIFAR-10 and the pretrained ResNet-56 of akamaster/pytorch_resnet_cifar10 (93.39 % on the test set)."""

from hap.harness.tasks import Task
from hap.harness.tasks.cifar10 import pretrained

FILE = "resnet56-4bfd9763.th"


def task(
    seed: int, *, images: int = 512, batch: int = 128, last: int | None = None, train_images: int | None = None
) -> Task:
    """As in `cifar10_resnet20`."""
    return pretrained(56, FILE, seed, images=images, batch=batch, last=last, train_images=train_images)
