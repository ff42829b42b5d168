"""The handwritten digits inside scikit-learn as sequences of pixels, and a tiny BERT that is trained on them."""

import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hap.harness.task import Data, MissingData, Task
from hap.harness.tasks import digits_preresnet, encoder, text
from hap.harness.tasks.cache import Trained, cached
from hap.harness.tasks.data import device
from hap.harness.train import loop as training
from hap.harness.train import recipe as recipes
from hap.harness.train import step as stepping
from hap.hessian import losses

RECIPE = training.Recipe(
    epochs=15,
    lr=4e-3,
    weight_decay=0.01,
    batch_size=32,
    schedule="cosine",
    warmup_epochs=1,
    optimiser="adamw",
    clip=1.0,
)
# pixels have 17 values, and the first token, which is pooled, is one of its own
FIRST, LENGTH = 17, 65
# weights of 0.15 and not of 0.02: so narrow a network learns nothing from less
CONFIG: dict[str, Any] = {
    "vocab_size": FIRST + 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 1,
    "num_labels": 10,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def task(
    seed: int, *, samples: int = 128, batch: int = 64, smoke: bool = False, fit: training.Fit | None = None
) -> Task:
    """A BERT of 2 layers with 8 heads each, trained with this seed from scratch; `samples` for calibration.

    `smoke`: as many digits as encoder.SMOKE has, and one epoch.
    """
    parts, data = _sequences()
    recipe = RECIPE
    if smoke:
        parts = {name: tokens.part(torch.arange(encoder.SMOKE[name])) for name, tokens in parts.items()}
        samples, recipe = min(samples, encoder.SMOKE["calibration"]), replace(RECIPE, epochs=1)
    parts = {name: tokens.to(device()) for name, tokens in parts.items()}
    made = encoder.workload(
        "digits_bert", _network(seed).to(device()), parts, data, seed,
        pad=0, samples=samples, batch=batch, train_samples=None, metric="accuracy", shown=LENGTH,
    )  # fmt: skip
    made = replace(made, threads=1)  # so small a network gains nothing from a second
    decides = [CONFIG, recipe, encoder.SMOKE if smoke else None, data.sha256, encoder.version()]
    sources = [text, encoder, training, stepping, recipes, losses, sys.modules[__name__]]
    found = cached(made.name, seed, decides, sources, partial(_trained, made, recipe, seed, fit))
    made.model.load_state_dict(found.weights)
    made.model.eval()
    return replace(made, notes=tuple(found.notes))


def ready(**options: object) -> Data:
    """The data of the task, without training its model."""
    return digits_preresnet.ready()


def _trained(task: Task, recipe: training.Recipe, seed: int, fit: training.Fit | None, keep: Path) -> Trained:
    rng = training.generator(seed, "train")
    curve = (fit or training.fit)(task.model, task, recipe, rng=rng, keep=keep, snapshots=False)
    return Trained(training.snapshot(task.model), curve.notes)


def _network(seed: int) -> nn.Module:
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        raise MissingData("transformers is not installed: python -m pip install 'hap[heads]'") from None
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(training.generator(seed, "init").initial_seed())
        return BertForSequenceClassification(BertConfig(**CONFIG))


@cache
def _sequences() -> tuple[dict[str, text.Tokens], Data]:
    splits, data = digits_preresnet.digits()
    return {name: _tokens(images.pixels, images.labels) for name, images in splits.items()}, data


def _tokens(pixels: torch.Tensor, labels: torch.Tensor) -> text.Tokens:
    ids = torch.cat([torch.full((len(labels), 1), FIRST), pixels.flatten(1).long()], 1).flatten()
    return text.Tokens(ids, torch.zeros_like(ids), torch.full((len(labels),), LENGTH), labels, ("input_ids",))
