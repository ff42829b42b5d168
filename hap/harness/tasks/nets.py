"""The networks of the paper for small images, as ordinary modules; the counts of [HAP-code] are asserted in the tests.

Every module is called once a forward pass. Weights are drawn from a generator that is handed in, never the global one.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hap import HapError


def resnet(
    depth: int = 20,
    widths: Sequence[int] = (16, 32, 64),
    shortcut: str = "A",
    *,
    classes: int = 10,
    channels: int = 3,
    rng: torch.Generator | None = None,
) -> nn.Module:
    """A ResNet of 6n+2 layers; its keys are those of akamaster's checkpoints.

    `resnet(56, shortcut="B")` is the ResNet56 of [HAP-code], `resnet(32, (64, 128, 256), "B")` its "WideResNet32".
    """
    _whole(f"resnet of depth {depth}", "6n+2", depth, 6)
    if shortcut not in ("A", "B"):
        raise HapError(f"resnet: shortcut must be 'A' (zero-padded) or 'B' (1x1 convolution), found {shortcut!r}")
    return _kaiming(ResNet((depth - 2) // 6, widths, shortcut, classes, channels), rng)


def preresnet(
    depth: int = 29,
    widths: Sequence[int] = (64, 128, 256),
    *,
    classes: int = 10,
    channels: int = 3,
    rng: torch.Generator | None = None,
) -> nn.Module:
    """A pre-activation ResNet of 9n+2 layers; at its defaults the PreResNet29 of [HAP-code]."""
    _whole(f"preresnet of depth {depth}", "9n+2", depth, 9)
    model = _fan_out(PreResNet((depth - 2) // 9, widths, classes, channels), rng)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return model


def vgg16(*, batch_norm: bool = False, classes: int = 10, rng: torch.Generator | None = None) -> nn.Module:
    """VGG16 for small images with one linear layer; [HAP-code] builds it without BatchNorm, with biases."""
    return _kaiming(VGG(batch_norm, classes), rng)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        """`shortcut`: A or B, where the shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = Pad(outputs - inputs, stride) if shortcut == "A" else _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Pad(nn.Module):
    """The parameter-free shortcut: every `stride`-th pixel, with channels of zeros on both sides."""

    def __init__(self, more: int, stride: int) -> None:
        """`more`: channels to add."""
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        """The same channels in the middle of more of them."""
        small = x[:, :, :: self.stride, :: self.stride]
        return F.pad(small, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class ResNet(nn.Module):
    """Three stages of basic blocks; `widths` are their channels."""

    def __init__(self, blocks: int, widths: Sequence[int], shortcut: str, classes: int, channels: int) -> None:
        """`blocks`: of each stage."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(*layer, shortcut) for layer in layers)) for layers in _stages(blocks, widths)
        )
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1 beside a shortcut from the raw input; the middle as wide as the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """The image is halved where `stride` is 2."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, inputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(inputs)
        self.conv3 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        return y + self.downsample(x)  # type: ignore[no-any-return]


class PreResNet(nn.Module):
    """Three stages of pre-activation bottlenecks; `widths` are their channels."""

    def __init__(self, blocks: int, widths: Sequence[int], classes: int, channels: int) -> None:
        """`blocks`: of each stage."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Bottleneck(*layer) for layer in layers)) for layers in _stages(blocks, widths)
        )
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]


class VGG(nn.Module):
    """13 convolutions in five stages with a pooling between two."""

    def __init__(self, batch_norm: bool, classes: int) -> None:
        """`batch_norm`: one after each convolution."""
        super().__init__()
        self.features = nn.Sequential(*_vgg_layers(batch_norm))
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def _vgg_layers(batch_norm: bool) -> Iterator[nn.Module]:
    inputs = 3
    for stage, (outputs, layers) in enumerate(zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True)):
        if stage:
            yield nn.MaxPool2d(2)
        for _ in range(layers):
            yield nn.Conv2d(inputs, outputs, 3, padding=1)
            if batch_norm:
                yield nn.BatchNorm2d(outputs)
            yield nn.ReLU()
            inputs = outputs


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stages(blocks: int, widths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """(inputs, outputs, stride) of each block, a list a stage; all stages but the first halve the image."""
    for stage, (inputs, outputs) in enumerate(pairwise((widths[0], *widths))):
        yield [(inputs, outputs, 2 if stage else 1)] + [(outputs, outputs, 1)] * (blocks - 1)


def _whole(what: str, rule: str, depth: int, period: int) -> None:
    if depth <= 2 or (depth - 2) % period:
        raise HapError(f"{what}: the depth must be {rule} with n at least 1, found {depth}")


def _kaiming(model: nn.Module, rng: torch.Generator | None) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _fan_out(model: nn.Module, rng: torch.Generator | None) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)), rng)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, math.sqrt(5), generator=rng)
            nn.init.zeros_(module.bias)
    return model
