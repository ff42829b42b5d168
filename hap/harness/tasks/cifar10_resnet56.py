"""CIFAR-10 and the pretrained ResNet-56 of akamaster/pytorch_resnet_cifar10 (93.39 % on the test set)."""

from functools import partial

from hap.harness.tasks.cifar10 import pretrained

task = partial(pretrained, 56, "resnet56-4bfd9763.th")
