"""Images in folders, one a class: listed and checked as torchvision's ImageFolder has them; decodes none."""

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from hap import HapError


class Listing(NamedTuple):
    """The images of a split; arrays, for a million strings would be copied into each worker."""

    root: Path
    names: NDArray[np.bytes_]  # bytes: the path of each below the root
    sizes: NDArray[np.int64]  # bytes that each file has
    labels: Tensor

    def part(self, index: Tensor | slice) -> "Listing":
        """Some of them."""
        chosen = index if isinstance(index, slice) else index.numpy()
        return Listing(self.root, self.names[chosen], self.sizes[chosen], self.labels[index])

    def file(self, index: int) -> Path:
        """The path of one."""
        return self.root / os.fsdecode(self.names[index])


def listed(root: Path, classes: Sequence[str]) -> Listing:
    """The images of a folder that has one folder for each class, in the order of torchvision's ImageFolder.

    HapError names a class that is missing or one too many, a folder without an image, and a file of no bytes.
    """
    folders = _folders(root)
    rule = f"must have a folder for each of the {len(classes)} classes"
    if not folders:
        raise HapError(f"{root}: {rule} (found none; {_there(root)})")
    for wrong, found in ((set(classes) - set(folders), "{} is missing"), (set(folders) - set(classes), "found {}")):
        if wrong:
            raise HapError(f"{root}: {rule} and no other ({found.format(min(wrong))}; {len(folders)} folders)")
    samples = make_dataset(root, {name: i for i, name in enumerate(sorted(classes))}, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.long)
    empty = (torch.bincount(labels, minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise HapError(
            f"{root / sorted(classes)[empty[0]]}: must have an image ({', '.join(IMG_EXTENSIONS)}); found none"
        )
    sizes = np.array([_size(file) for file, _ in samples], dtype=np.int64)
    names = np.array([os.fsencode(file[len(str(root)) + 1 :]) for file, _ in samples])
    return Listing(root, names, sizes, labels)


def digest(parts: dict[str, Listing]) -> str:
    """The sha256 of all names and sizes: of which files there are, not of the bytes in them."""
    total = sha256()
    for name, images in sorted(parts.items()):
        for file, size in sorted(zip(images.names.tolist(), images.sizes.tolist(), strict=True)):
            total.update(b"%s/%s\0%d\n" % (name.encode(), file, size))
    return total.hexdigest()


def drawn_by_name(images: Listing, each: int) -> Tensor:
    """Which images are the first `each` of their class in an order that their names alone decide, by sha256."""
    ranks = np.array([int.from_bytes(sha256(os.path.basename(name)).digest()[:8], "big") for name in images.names])
    order = np.lexsort((ranks, images.labels.numpy()))
    counts = np.bincount(images.labels.numpy())
    place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)  # within the class
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[place < each]] = True
    return torch.from_numpy(chosen)


def undecoded(file: Path, found: str) -> HapError:
    """The one line of a file that is not what it must be."""
    return HapError(f"{file}: must be an image that can be decoded (found {found}); get the file again, or remove it")


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise HapError(f"{root}: must be a readable folder (found {error.strerror})") from None


def _size(file: str) -> int:
    try:
        size = os.stat(file).st_size
    except OSError as error:  # a link to nothing
        raise undecoded(Path(file), str(error.strerror)) from None
    if not size:
        raise undecoded(Path(file), "0 bytes")
    return size


def _there(root: Path) -> str:
    return f"{sum(1 for _ in root.iterdir())} files lie directly in it"
