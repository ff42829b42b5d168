"""The one table of models that the tests run over: small ones of every shape, and the real architectures."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import Conv2dNormActivation

from hap.harness.tasks import nets


class Residual(nn.Module):
    """A stem, a residual block with a grouped convolution, pooling, a 1x1 convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.grouped, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.point, self.fc = nn.Conv2d(4, 6, 1, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu_(x + self.bn1(self.grouped(x)))
        return self.fc(F.relu(self.point(F.max_pool2d(x, 2))).mean((2, 3)))


class Attention(nn.Module):
    """Two heads over tokens, a residual stream from a position table, and a mean over tokens."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.positions = nn.Linear(4, width), nn.Parameter(torch.randn(1, 5, width))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        q, k, v = (f(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.fc((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


class Gated(nn.Module):
    """A squeeze-and-excitation gate: a sigmoid of pooled channels multiplies the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3), nn.Linear(3, 6)
        self.last, self.fc = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return self.fc(F.relu(self.last(x * gate[:, :, None, None])).amax((2, 3)))


class Dense(nn.Module):
    """Concatenation: each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norm, self.fc = nn.BatchNorm2d(15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.a, self.b, self.c):
            x = torch.cat([x, F.relu(conv(x))], 1)
        return self.fc(F.avg_pool2d(self.norm(x), 8).flatten(1))


def conv1d() -> nn.Module:
    """Dilated and strided convolutions over a sequence."""
    layers = [
        nn.Conv1d(3, 4, 3, padding=2, dilation=2),
        nn.ReLU6(),
        nn.Conv1d(4, 5, 3, stride=2),
        nn.AdaptiveAvgPool1d(1),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, 5))


def mlp() -> nn.Module:
    """Linear layers and leaky rectifiers."""
    return nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 7, bias=False), nn.Hardtanh(), nn.Linear(7, 5))


def plain() -> nn.Module:
    """Convolutions with biases, flattened into a classifier: one channel feeds many inputs."""
    conv = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 5))


def depthwise() -> nn.Module:
    """An inverted residual: expand, depthwise with a multiplier of one, project, with BatchNorm."""
    block = [Conv2dNormActivation(3, 6, 1), Conv2dNormActivation(6, 6, 3, groups=6, stride=2), nn.Conv2d(6, 4, 1)]
    return nn.Sequential(*block, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))


def multiplied() -> nn.Module:
    """A grouped convolution that gives two channels for each it reads."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )


class Branches(nn.Module):
    """Kernels of several sizes and a pooled branch side by side, as in an inception block, with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.wide = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, (3, 5), padding=(2, 4), dilation=2)
        self.pooled, self.strided = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(9, 4, 3, stride=2)
        self.norm, self.fc = nn.BatchNorm2d(9), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.point(x), self.wide(x), self.pooled(F.max_pool2d(x, 3, 1, 1))], 1)
        return self.fc(F.adaptive_avg_pool2d(self.strided(F.relu6(self.norm(x))), 1).flatten(1))


def tokens_mixed() -> nn.Module:
    """Linear layers over tokens, then a layer over their mean."""
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7, bias=False), nn.Threshold(0.1, 0.0), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(35, 6), nn.PReLU(6), nn.Linear(6, 5))


def sequence_depthwise() -> nn.Module:
    """A depthwise convolution over a sequence, then a pointwise one."""
    layers = [nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.LeakyReLU(0.2), nn.Conv1d(6, 6, 3, groups=6), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.Conv1d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 5))


def _image(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _sequence(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


class Blurred(nn.Module):
    """Attention over the positions of an image by a module that must be left whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        return self.mix(y, y, y, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


class Joined(nn.Module):
    """An embedding that ends in a sum of two normalised branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(*size, 3, padding=1) for size in ((3, 6), (6, 8), (6, 8)))
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return (self.norms[0](self.left(x)) + self.norms[1](self.right(x))).mean((2, 3))


def normed(*tail: nn.Module) -> nn.Module:
    """Two convolutions, BatchNorm and what comes after it."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, *tail)


def tokens_normed() -> nn.Module:
    """Linear layers, BatchNorm over features, then LayerNorm."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 5)
    )


# what follows a BatchNorm freezes its rows, so that the rows that feed it are frozen too
FROZEN_NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "last": (normed, _image),
    "pooled": (lambda: normed(nn.AdaptiveAvgPool2d(1), nn.Flatten()), _image),
    "prelu": (lambda: normed(nn.PReLU(8), nn.Conv2d(8, 4, 1)), _image),
    "groupnorm": (lambda: normed(nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), _image),
    "response": (lambda: normed(nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 1)), _image),
    "layernorm": (tokens_normed, lambda: _sequence(6)),
    "twice": (lambda: normed(nn.ReLU(), nn.BatchNorm2d(8)), _image),
    "instance": (lambda: normed(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), _image),
    "depthwise": (lambda: normed(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), _image),
    "joined": (Joined, _image),
    "opaque": (lambda: normed(Blurred(8), nn.Conv2d(8, 4, 1)), _image),
}
OPAQUE = {"opaque": ["4"]}


SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (mlp, lambda: _sequence(6)),
    "plain": (plain, _image),
    "conv1d": (conv1d, lambda: _sequence(3, 12)),
    "residual": (Residual, _image),
    "depthwise": (depthwise, _image),
    "multiplied": (multiplied, _image),
    "dense": (Dense, _image),
    "branches": (Branches, _image),
    "tokens": (tokens_mixed, lambda: _sequence(5, 4)),
    "sequence": (sequence_depthwise, lambda: _sequence(3, 12)),
    "gated": (Gated, _image),
    "attention": (Attention, lambda: _sequence(5, 4)),
    "preresnet": (lambda: nets.preresnet(depth=11, widths=(4, 6, 8)), _image),
    "option-a": (lambda: nets.resnet(depth=8, widths=(4, 8, 16), shortcut="A"), _image),
    "option-b": (lambda: nets.resnet(depth=8, widths=(4, 8, 16), shortcut="B"), _image),
}


def bert(layers: int = 2, width: int = 32, heads: int = 4) -> nn.Module:
    """A Hugging Face BERT classifier of small width."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tokens() -> dict[str, Tensor]:
    """Two sentences of eight tokens, the second padded."""
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    keep = torch.ones_like(ids)
    keep[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": keep}


def sentences() -> dict[str, Tensor]:
    """Three sentences of seven tokens and less; of special tokens RoBERTa's padding, 1, is nowhere."""
    ids = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()}


HEADED = {  # with the names that query, key, value and output have in a layer; of fused ones one for all three
    "bert": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    "roberta": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    "electra": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    "vit": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    "timm": ("attn.qkv", "attn.qkv", "attn.qkv", "attn.proj"),
}


def headed(
    kind: str, attention: str = "eager", *, width: int = 16, heads: int = 4, labels: int = 3
) -> tuple[nn.Module, Any]:
    """A transformer of two layers in eval mode, its weights and biases far from their defaults, and an example.

    `attention`: "eager" or "sdpa", plain products or the fused kernel.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = (width, heads, labels)
        model = _timm(attention, *sizes) if kind == "timm" else _hub(kind, attention, *sizes)
        for name, p in model.named_parameters():
            is_scale = p.dim() == 1 and name.endswith("weight")
            nn.init.uniform_(p, 0.5, 1.5) if is_scale else nn.init.normal_(p, std=0.3)
    image = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.eval(), image if kind == "timm" else {"pixel_values": image} if kind == "vit" else sentences()


def _timm(attention: str, width: int, heads: int, labels: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": width, "num_heads": heads, "num_classes": labels, "depth": 2, "mlp_ratio": 1.5}
    model = VisionTransformer(img_size=8, patch_size=4, **sizes)
    for block in model.blocks:
        block.attn.fused_attn = attention == "sdpa"
    return model


def _hub(kind: str, attention: str, width: int, heads: int, labels: int) -> nn.Module:
    import transformers

    stem = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra", "distilbert": "DistilBert", "vit": "ViT"}[kind]
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    names = ("dim", "n_heads", "n_layers", "hidden_dim") if kind == "distilbert" else names
    own: dict[str, Any] = {"vocab_size": 30, "max_position_embeddings": 12}
    own |= {"embedding_size": 6} if kind == "electra" else {"pad_token_id": 1} if kind == "roberta" else {}
    own = {"image_size": 8, "patch_size": 4} if kind == "vit" else own
    config = getattr(transformers, f"{stem}Config")(
        **dict(zip(names, (width, heads, 2, width + 8), strict=True)), **own,
        num_labels=labels, attn_implementation=attention,
    )  # fmt: skip
    task = "ImageClassification" if kind == "vit" else "SequenceClassification"
    return getattr(transformers, f"{stem}For{task}")(config)


REAL: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet18": (models.resnet18, lambda: _image(32)),
    "resnet50": (models.resnet50, lambda: _image(32)),
    "resnet56": (lambda: nets.resnet(depth=56), lambda: _image(16)),
    "preresnet29": (lambda: nets.preresnet(depth=29), lambda: _image(16)),
    "vgg16": (lambda: nets.vgg16(batch_norm=False), lambda: _image(32)),
    "vgg16_bn": (lambda: nets.vgg16(batch_norm=True), lambda: _image(32)),
    "densenet121": (models.densenet121, lambda: _image(32)),
    "mobilenet_v2": (models.mobilenet_v2, lambda: _image(32)),
    "bert": (bert, tokens),
}


def build(table: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]], name: str) -> tuple[nn.Module, Any]:
    """The named model in eval mode, its BatchNorm statistics far from their defaults, and an example of two samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = table[name][0](), table[name][1]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval(), example
