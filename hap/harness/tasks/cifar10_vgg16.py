"""CIFAR-10 and the VGG16 of the published code, without BatchNorm, trained from scratch."""

from functools import partial

from hap.harness.tasks.cifar10_scratch import ready, trained
from hap.harness.tasks.nets import vgg16

__all__ = ["ready", "task"]

task = partial(trained, "cifar10_vgg16", vgg16)
