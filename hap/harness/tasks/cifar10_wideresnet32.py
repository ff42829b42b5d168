"""CIFAR-10 and the "WideResNet32" of the paper, a ResNet32 of four times the width, trained from scratch."""

from functools import partial

from hap.harness.tasks.cifar10_scratch import ready, trained
from hap.harness.tasks.nets import resnet

__all__ = ["ready", "task"]

task = partial(trained, "cifar10_wideresnet32", partial(resnet, 32, (64, 128, 256), "B"))
