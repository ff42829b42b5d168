"""CIFAR-10 and the pretrained ResNet-32 of akamaster/pytorch_resnet_cifar10 (92.63 % on the test set)."""

from functools import partial

from hap.harness.tasks.cifar10 import pretrained

task = partial(pretrained, 32, "resnet32-d509ac18.th")
