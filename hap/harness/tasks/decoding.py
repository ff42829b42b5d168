"""From an image file to bytes of one size on the device, by worker processes that run ahead; knows nothing of classes.

Seeds of crops come in with the images, so that workers decide nothing: however many they are, the bytes are the same.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as images_as

from hap import HapError
from hap.harness.tasks.data import device
from hap.harness.tasks.imagefolder import Listing, undecoded
from hap.harness.tasks.pickles import first_line

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: its share of the image, and its width by its height
AHEAD = 3  # batches that each worker has ready
Key = tuple[int, int | None]  # an image, and the seed of its crop; None for the middle


class View(NamedTuple):
    """How an image becomes a square of `size`: the middle of one whose shorter side is `resize`; or a random crop."""

    size: int = 224
    resize: int = 256
    squash: bool = False  # the middle of one both of whose sides are `resize`, as for Caffe's networks


def decoded(file: Path, view: View, seed: int | None) -> Tensor:
    """The bytes [height, width, 3] of an image, in RGB whatever it is stored in; HapError names what is none."""
    try:
        image = pil_loader(file)
    except Exception as error:  # whatever a damaged file makes PIL raise
        raise undecoded(file, first_line(error)) from None
    if seed is not None:
        crop = random_crop(image, seed)
        return _bytes(images_as.resized_crop(image, *crop, [view.size, view.size]))
    if view.squash:
        at = (view.resize - view.size + 1) // 2
        image = images_as.resize(image, [view.resize, view.resize], InterpolationMode.LANCZOS)
        return _bytes(images_as.crop(image, at, at, view.size, view.size))
    return _bytes(images_as.center_crop(images_as.resize(image, [view.resize]), [view.size, view.size]))


def random_crop(image: Any, seed: int) -> list[int]:
    """Top, left, height and width of torchvision's random crop for this seed."""
    with drawing(seed):
        return list(v2.RandomResizedCrop.get_params(image, SCALE, RATIO))


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Inside, torch's global stream is that of the seed, for functions that know no other; outside it is as it was."""
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(state)


@dataclass(frozen=True)
class Pictures(Dataset[Tensor]):
    """What a worker is given: it turns keys into decoded images."""

    images: Listing
    view: View

    def __getitem__(self, key: Key) -> Tensor:
        """One image, [height, width, 3]."""
        return decoded(self.images.file(key[0]), self.view, key[1])

    def __getitems__(self, keys: Sequence[Key]) -> Tensor | str:
        """A batch of them; or what is wrong with one, for an error loses its class and line on the way."""
        pixels = torch.empty(len(keys), self.view.size, self.view.size, 3, dtype=torch.uint8)
        try:
            for row, key in zip(pixels, keys, strict=True):
                row.copy_(self[key])
        except HapError as error:
            return str(error)
        return pixels


def stream(pictures: Pictures, batches: Sequence[Sequence[Key]], count: int | None = None) -> Iterator[Tensor]:
    """The images of each batch on the device, as bytes [batch, 3, height, width], decoded ahead by the workers.

    `count` of them; None for those of `workers`, and none where there is but one batch to decode.
    """
    count = workers() if count is None else count
    count = min(count, len(batches)) if len(batches) > 1 else 0
    where = device()
    loader: DataLoader[Tensor] = DataLoader(
        pictures,
        batch_sampler=batches,  # type: ignore[arg-type]  # any list of batches
        collate_fn=_as_it_is,
        num_workers=count,
        pin_memory=where.type == "cuda",
        prefetch_factor=AHEAD if count else None,
        generator=torch.Generator(),  # or it would draw from the global stream
    )
    try:
        for found in loader:
            if isinstance(found, str):
                raise HapError(found)
            yield found.to(where, non_blocking=True).permute(0, 3, 1, 2)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise HapError(
            f"a process that decodes images ended ({first_line(error)}); give it memory (/dev/shm) or set HAP_WORKERS "
            f"below {count}"
        ) from None


def workers() -> int:
    """$HAP_WORKERS; else, beside a GPU, this process's share of the cores; on a CPU none, for training needs them."""
    given = os.environ.get("HAP_WORKERS")
    if given is not None:
        if not given.isdecimal():
            raise HapError(f"HAP_WORKERS: a whole number of processes that decode images expected, found {given!r}")
        return int(given)
    if device().type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _bytes(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image))


def _as_it_is(found: Any) -> Any:
    return found
