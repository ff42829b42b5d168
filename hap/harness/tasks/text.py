"""Tokens of sentences and batches of them: buckets, dynamic padding, GLUE's metrics; knows nothing of networks."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from hap.harness.processes import ranks
from hap.harness.processes.files import atomic_write, cache
from hap.harness.task import Seen
from hap.harness.tasks.data import digest
from hap.harness.tasks.glue import Sentences

BUCKET = 50  # batches that are sorted by length together
Encode = Callable[
    [list[tuple[str, ...]], int], list[tuple[list[int], list[int]]]
]  # texts, length -> ids, types of each


class Tokens(NamedTuple):
    """Samples of any length, one after the other, with their labels."""

    ids: Tensor  # of all samples
    types: Tensor  # which sentence a token is of
    lengths: Tensor  # on the CPU: padding is decided there
    labels: Tensor
    names: tuple[str, ...]  # of what the network takes

    def to(self, where: torch.device) -> "Tokens":
        """The same on a device, the lengths where they are."""
        return self._replace(ids=self.ids.to(where), types=self.types.to(where), labels=self.labels.to(where))

    def part(self, index: Tensor) -> "Tokens":
        """Some of the samples."""
        starts = self.lengths.cumsum(0) - self.lengths
        at = torch.cat(
            [
                torch.arange(n) + first
                for first, n in zip(starts[index].tolist(), self.lengths[index].tolist(), strict=True)
            ]
        )
        at = at.to(self.ids.device)
        labels = self.labels[index.to(self.labels.device)]
        return Tokens(self.ids[at], self.types[at], self.lengths[index], labels, self.names)

    def batch(self, index: Tensor, pad: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and labels of some samples, padded to the longest of them."""
        lengths = self.lengths[index]
        where, starts = self.ids.device, (self.lengths.cumsum(0) - self.lengths)[index]
        place = torch.arange(int(lengths.max()))
        there = (place < lengths[:, None]).to(where)
        at = (starts[:, None] + place).clamp_max(len(self.ids) - 1).to(where)
        inputs = {
            "input_ids": torch.where(there, self.ids[at], pad),
            "attention_mask": there.long(),
            "token_type_ids": torch.where(there, self.types[at], 0),
        }
        return {name: inputs[name] for name in self.names}, self.labels[index.to(where)]


def tokens(sentences: Sentences, encode: Encode, vocabulary: bytes, length: int, names: Sequence[str]) -> Tokens:
    """The tokens of sentences, cut at `length`; made once and kept under the sha256 of texts and vocabulary."""
    text = json.dumps([sentences.texts, length]).encode()
    file = cache() / f"tokens-{sha256(text + vocabulary).hexdigest()[:16]}.safetensors"
    kept = _undamaged(file)
    if kept is None:
        pairs = encode(sentences.texts, length)
        ids, types = (torch.tensor([token for pair in pairs for token in pair[i]]) for i in range(2))
        kept = {"ids": ids, "types": types, "lengths": torch.tensor([len(pair[0]) for pair in pairs])}
        atomic_write(file, save({**kept, "sha256": _sum(kept)}))
    return Tokens(kept["ids"], kept["types"], kept["lengths"], torch.tensor(sentences.labels), tuple(names))


def epoch(
    tokens: Tokens, batch_size: int, rng: torch.Generator, *, pad: int, limit: int | None = None
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """One epoch in random order, in which the samples of a batch are of about one length."""
    order = torch.randperm(len(tokens.labels), generator=rng)[:limit]
    buckets = [
        bucket[tokens.lengths[bucket].argsort(stable=True)] for bucket in torch.split(order, BUCKET * batch_size)
    ]
    batches = [batch for bucket in buckets for batch in torch.split(bucket, batch_size)]
    for i in torch.randperm(len(batches), generator=rng).tolist():
        yield tokens.batch(batches[i], pad)


def calibration(
    tokens: Tokens, count: int, batch_size: int, rng: torch.Generator, pad: int
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of `count` samples drawn at random, of about one length each."""
    order = torch.randperm(len(tokens.labels), generator=rng)[:count]
    order = order[tokens.lengths[order].argsort(stable=True)]
    return [tokens.batch(part, pad) for part in torch.split(order, batch_size)]


@torch.inference_mode()
def measure(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Tensor],
    tokens: Tokens,
    pad: int,
    batch_size: int = 64,
    seen: Seen | None = None,
) -> dict[str, float]:
    """Accuracy in percent and mean cross-entropy in nats; of two classes F1 and Matthews' correlation too.

    Ranks share the work. `seen` takes the class that was said of each sample, and the true ones.
    """
    model.eval()
    by_length = tokens.lengths.argsort(stable=True)
    order = by_length[ranks.slices(len(by_length))]
    logits, labels = list[Tensor](), list[Tensor]()
    for part in torch.split(order, batch_size):
        inputs, targets = tokens.batch(part, pad)
        logits.append(call(model, inputs).float())
        labels.append(targets)
    parts = ranks.gathered([(one.cpu(), other.cpu()) for one, other in zip(logits, labels, strict=True)])
    found, wanted = (torch.cat(each) for each in zip(*(pair for part in parts for pair in part), strict=True))
    if seen is not None:
        places = torch.cat([by_length[rank :: ranks.world()] for rank in range(ranks.world())])
        seen(found.argmax(1)[places.argsort()], wanted[places.argsort()])
    loss = float(F.cross_entropy(found.double(), wanted))
    return {**scores(found.argmax(1), wanted, found.shape[1]), "loss": loss}


def scores(found: Tensor, wanted: Tensor, classes: int) -> dict[str, float]:
    """Accuracy; F1 of class 1 and Matthews' correlation coefficient where there are two classes; all in percent."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    pair = wanted.cpu().numpy(), found.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all samples are of one class, and are said to be
        more = {"f1": f1_score(*pair, zero_division=0), "matthews": matthews_corrcoef(*pair)} if classes == 2 else {}
    return {name: 100 * float(value) for name, value in {"accuracy": accuracy_score(*pair), **more}.items()}


def _undamaged(file: Path) -> dict[str, Tensor] | None:
    try:
        kept = load(file.read_bytes())
        return kept if torch.equal(kept["sha256"], _sum(kept)) else None
    except (OSError, KeyError, SafetensorError):
        return None


def _sum(kept: dict[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest([kept[name] for name in ("ids", "types", "lengths")]))))
