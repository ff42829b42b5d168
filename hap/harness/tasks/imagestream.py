"""Batches of images from folders: an epoch, calibration, counts of hits; of several ranks each decodes its own part.

What is random is drawn here from the generator handed in, a seed for each image, alike on every rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as images_as

from hap.harness.tasks.data import Normalise, device, positive
from hap.harness.tasks.decoding import Key, Pictures, View, stream
from hap.harness.tasks.imagefolder import Listing

Shard = tuple[int, int]  # which rank this is, of how many
Batch = tuple[Tensor, Tensor]


def share(count: int, shard: Shard) -> slice:
    """Of `count` samples those of a rank; the shares of all are as equal as can be, and each sample is in one."""
    rank, world = shard
    return slice(rank * count // world, (rank + 1) * count // world)


def epoch(
    images: Listing,
    batch_size: int,
    rng: torch.Generator,
    *,
    view: View,
    normalise: Normalise,
    limit: int | None = None,
    shard: Shard = (0, 1),
) -> Iterator[Batch]:
    """One epoch in random order: of each image a random crop, and half of them mirrored.

    `shard`: of each batch the part that is this rank's, which may be empty; all ranks draw the same.
    """
    order = torch.randperm(len(images.labels), generator=rng)[:limit]
    seeds = torch.randint(2**62, (len(order),), generator=rng)
    mirrored = torch.rand(len(order), generator=rng) < 0.5
    parts = [part[share(len(part), shard)] for part in torch.split(torch.arange(len(order)), batch_size)]
    keys = [list(zip(order[part].tolist(), seeds[part].tolist(), strict=True)) for part in parts]
    for part, pixels in zip(parts, stream(Pictures(images, view), keys), strict=True):
        yield normalise(_mirrored(pixels, mirrored[part])), images.labels[order[part]].to(pixels.device)


@dataclass(frozen=True)
class Lazy(Sequence[Batch]):
    """Batches that are decoded when they are read, the same each time; a slice of them, such as [rank::world], too."""

    pictures: Pictures
    normalise: Normalise
    keys: tuple[tuple[Key, ...], ...]  # of each batch
    mirrored: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        """How many batches."""
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "Lazy": ...
    def __getitem__(self, index: int | slice) -> "Batch | Lazy":
        """A batch, or a slice of the batches."""
        if isinstance(index, int):
            at = range(len(self))[index]
            return next(iter(self[at : at + 1]))
        mirrored = None if self.mirrored is None else self.mirrored[index]
        return Lazy(self.pictures, self.normalise, self.keys[index], mirrored)

    def __iter__(self) -> Iterator[Batch]:
        """All of them, decoded ahead."""
        for i, pixels in enumerate(stream(self.pictures, self.keys)):
            shown = pixels if self.mirrored is None else _mirrored(pixels, self.mirrored[i])
            labels = self.pictures.images.labels[[index for index, _ in self.keys[i]]]
            yield self.normalise(shown), labels.to(pixels.device)


def calibration(
    images: Listing,
    view: View,
    normalise: Normalise,
    count: int,
    batch_size: int,
    rng: torch.Generator,
    augmented: bool = False,
) -> Lazy:
    """Batches of `count` images drawn at random, their middles; or `augmented` as for training, once and for all."""
    positive(images=count, batch=batch_size)
    order = torch.randperm(len(images.labels), generator=rng)[:count]
    seeds = torch.randint(2**62, (len(order),), generator=rng).tolist() if augmented else [None] * len(order)
    mirrored = torch.split(torch.rand(len(order), generator=rng) < 0.5, batch_size) if augmented else None
    keys = list(zip(order.tolist(), seeds, strict=True))
    parts = tuple(tuple(keys[i : i + batch_size]) for i in range(0, len(keys), batch_size))
    return Lazy(Pictures(images, view), normalise, parts, mirrored)


class Count(NamedTuple):
    """What was counted over images: sums, which those of several ranks add up to."""

    hits: int
    loss: float
    images: int

    @property
    def rates(self) -> dict[str, float]:
        """Accuracy in percent and mean cross-entropy in nats."""
        return {"accuracy": 100 * self.hits / self.images, "loss": self.loss / self.images}


@torch.inference_mode()
def count(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    images: Listing,
    view: View,
    normalise: Normalise,
    batch_size: int | None = None,
    shard: Shard = (0, 1),
    said: list[Tensor] | None = None,
) -> Count:
    """Hits and summed cross-entropy over each image of [rank::world] once; leaves the model in eval mode.

    `said` takes the classes that were said of them, a tensor a batch.
    """
    model.eval()
    where = device()
    # a batch on a CPU should stay near the cache
    batch_size = batch_size or (256 if where.type == "cuda" else 16)
    mine = range(len(images.labels))[shard[0] :: shard[1]]
    keys = [[(i, None) for i in mine[first : first + batch_size]] for first in range(0, len(mine), batch_size)]
    hits, loss = torch.zeros((), dtype=torch.long, device=where), torch.zeros((), dtype=torch.double, device=where)
    for part, pixels in zip(keys, stream(Pictures(images, view), keys), strict=True):
        logits, labels = call(model, normalise(pixels)), images.labels[[i for i, _ in part]].to(where)
        classes = logits.argmax(1)
        hits += (classes == labels).sum()
        if said is not None:
            said.append(classes)
        loss += F.cross_entropy(logits, labels, reduction="sum")
    return Count(int(hits), float(loss), len(mine))


def _mirrored(pixels: Tensor, which: Tensor) -> Tensor:
    return torch.where(which.to(pixels.device)[:, None, None, None], images_as.horizontal_flip(pixels), pixels)
