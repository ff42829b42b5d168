"""CIFAR-10 and the ResNet56 of the paper, which projects in its shortcuts (option B), trained from scratch."""

from functools import partial

from hap.harness.tasks.cifar10_scratch import ready, trained
from hap.harness.tasks.nets import resnet

__all__ = ["ready", "task"]

task = partial(trained, "cifar10_resnet56b", partial(resnet, 56, shortcut="B"))
