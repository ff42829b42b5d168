"""CIFAR-10 and the pretrained ResNet-20 of akamaster/pytorch_resnet_cifar10 (91.73 % on the test set)."""

from functools import partial

from hap.harness.tasks.cifar10 import pretrained

task = partial(pretrained, 20, "resnet20-12fca82f.th")
