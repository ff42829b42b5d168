"""ImageNet in folders around a network: which copy it is, its splits, its weights, the workload."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hap import HapError
from hap.harness.processes import ranks
from hap.harness.task import Data, MissingData, Seen, Task
from hap.harness.tasks.data import Normalise, device, in_order, positive, roots
from hap.harness.tasks.decoding import View, decoded
from hap.harness.tasks.imagefolder import Listing, digest, drawn_by_name, listed
from hap.harness.tasks.imagestream import Count, Shard, calibration, count, epoch
from hap.harness.tasks.pickles import damaged, first_line
from hap.harness.train.loop import generator
from hap.hessian.losses import CrossEntropy

SIZES = {"train": 1_281_167, "val": 50_000}
SOURCE = "image-net.org: ILSVRC 2012, tasks 1 and 2, train/ and val/ with a folder for each class (n01440764, ...)"
HELD_OUT = 10  # training images of each class: for selection, never trained on by us
NORMALISE = {
    "imagenet": Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # upstream: normalises ImageNet by the statistics of Tiny-ImageNet, which the pretrained weights were not made for
    "tiny-imagenet": Normalise(
        (0.48024578664982126, 0.44807218089384643, 0.3975477478649648),
        (0.2769864069088257, 0.26906448510256, 0.282081906210584),
    ),
}
Statistics = Literal["imagenet", "tiny-imagenet"]
# images, where a run only has to go through every stage, and what becomes of them
SMOKE = {"train": 32, "validation": 16, "test": 16, "calibration": 8, "size": 32, "resize": 36}


class Source(NamedTuple):
    """What a network is shown."""

    splits: dict[str, Listing]  # train, validation, test
    data: Data
    view: View
    normalise: Normalise


def wnids() -> list[str]:
    """The names of the 1,000 classes, in the order of the outputs of the networks: as they are sorted."""
    return files("hap.harness.tasks").joinpath("imagenet_wnids.txt").read_text().split()


def imagenet() -> tuple[dict[str, Listing], Data]:
    """The images of train and val, and which copy they are: $HAP_IMAGENET, else imagenet/ where data is looked for."""
    given = os.environ.get("HAP_IMAGENET")
    folders = [Path(given)] if given else [base / "imagenet" for base in roots()]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        looked = ", ".join(str(folder.absolute()) for folder in folders)
        raise MissingData(f"ImageNet not found: looked for {looked}; HAP_IMAGENET names its folder; {SOURCE}")
    return _imagenet(folder.resolve())


@lru_cache(maxsize=1)  # a minute where files are far away: every case and seed of a run has the same
def _imagenet(folder: Path) -> tuple[dict[str, Listing], Data]:
    parts = {name: listed(folder / name, wnids()) for name in SIZES}
    counts = {name: len(images.labels) for name, images in parts.items()}
    whole = counts == SIZES
    told = ", ".join(f"{n:,} images in {name}" for name, n in counts.items())
    note = f"{told}{'' if whole else ', not those of ILSVRC 2012'}; sha256 of names and sizes, the bytes were not read"
    return parts, Data("imagenet", digest(parts), whole, note)


def split(held_out: int = HELD_OUT, smoke: bool = False) -> tuple[dict[str, Listing], Data]:
    """Train, validation (`held_out` images of each class of train, drawn by their names) and test, which is val.

    With `held_out` 0 nothing is held out: the same images are trained on and validated on, so validation says little.
    """
    parts, data = imagenet()
    whole, shown = parts["train"], 1 if smoke and held_out else held_out or HELD_OUT
    least = int(torch.bincount(whole.labels).min())
    if held_out < 0 or (held_out and least <= shown):
        raise HapError(f"task: held_out must be at least 0 and below {least}, the images of a class, found {held_out}")
    chosen = drawn_by_name(whole, shown)
    train = whole.part(~chosen) if held_out else whole
    splits = {"train": train, "validation": whole.part(chosen), "test": parts["val"]}
    return {name: few(images, SMOKE[name]) if smoke else images for name, images in splits.items()}, data


def few(images: Listing, most: int) -> Listing:
    """At most so many of them, from all classes alike."""
    return images.part(torch.linspace(0, len(images.labels) - 1, min(most, len(images.labels))).long())


def weights(
    name: str, folders: Sequence[Path], sha: str, get: Callable[[Path], None]
) -> tuple[dict[str, Tensor], Path, str]:
    """The weights in a file whose sha256 begins as it must, the file, and its sha256.

    Where it is in none of the folders, `get` puts it into the last, or says why it cannot: MissingData tells.
    """
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        try:
            get(folders[-1])
        except Exception as error:  # whatever a network that is away, or a full disk, makes it raise
            looked = ", ".join(str((folder / name).absolute()) for folder in folders)
            raise MissingData(f"weights {name} not found: looked for {looked}; {first_line(error)}") from None
    file = found or folders[-1] / name
    try:
        content = file.read_bytes()
    except OSError as error:
        raise damaged(file, "readable", str(error.strerror)) from None
    if not (has := sha256(content).hexdigest()).startswith(sha):
        raise damaged(file, f"the file whose sha256 begins with {sha}", has[:16])
    try:
        state: dict[str, Tensor] = torch.load(  # noqa: TID251
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
    except Exception as error:  # whatever a damaged zip or pickle makes torch raise
        raise damaged(file, "weights by name", first_line(error)) from None
    return state, file, has


def workload(
    name: str,
    model: nn.Module,
    source: Source,
    seed: int,
    *,
    images: int,
    batch: int,
    augmented: bool = False,
    train_images: int | None = None,
    notes: tuple[str, ...] = (),
    shard: Shard | None = None,
) -> Task:
    """The task of a network and what it is shown.

    Each rank decodes its own images, `shard` or by default those of this process; what is counted is added up over all.
    """
    shard = shard or (ranks.rank(), ranks.world())
    positive(train_images=1 if train_images is None else train_images)
    splits, data, view, normalise = source
    loss, train = CrossEntropy(), splits["train"]
    model = model.to(device()).to(memory_format=torch.channels_last).eval()
    example = decoded(train.file(0), view, None)[None].to(device()).permute(0, 3, 1, 2)

    def evaluate(model: nn.Module, which: str, seen: Seen | None = None) -> dict[str, float]:
        said = list[Tensor]()
        found = count(model, loss.call, splits[which], view, normalise, shard=shard, said=said)
        if seen is not None:
            seen(in_order(torch.cat(said), len(splits[which].labels)), splits[which].labels)
        sums = ranks.summed(torch.tensor(found, dtype=torch.float64)).tolist()
        return Count(int(sums[0]), sums[1], int(sums[2])).rates

    rng = generator(seed, "calibration")
    return Task(
        name=name,
        model=model,
        loss=loss,
        batches=calibration(train, view, normalise, images, batch, rng, augmented),
        train=partial(epoch, train, view=view, normalise=normalise, limit=train_images, shard=shard),
        train_size=min(train_images or len(train.labels), len(train.labels)),
        evaluate=evaluate,
        example=normalise(example),
        data=data,
        test_samples=len(splits["test"].labels),
        sharded=shard[1] > 1,
        notes=notes,
    )


def noted(data: Data, note: str) -> Data:
    """The data with a further note."""
    return replace(data, note=f"{data.note}; {note}")
