"""CIFAR-10 and the PreResNet29 of the paper, trained from scratch."""

from functools import partial

from hap.harness.tasks.cifar10_scratch import ready, trained
from hap.harness.tasks.nets import preresnet

__all__ = ["ready", "task"]

task = partial(trained, "cifar10_preresnet29", preresnet)
