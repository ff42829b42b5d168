"""A sample of ImageNet, an image a class, and SqueezeNet with weights trained there: the whole path on a CPU.

The images are probably among those that the network was trained on, and there are a thousand: what comes of them shows
that everything works on real images and real weights, and is no evidence for any claim of [Yu22].
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torchvision.models import squeezenet1_0

from hap import HapError
from hap.harness.task import Data, MissingData, Task
from hap.harness.tasks.data import Normalise, load_weights, roots
from hap.harness.tasks.decoding import Pictures, View, drawing
from hap.harness.tasks.imagefolder import Listing, digest, drawn_by_name, listed
from hap.harness.tasks.imagenet import SMOKE, Source, few, noted, weights, wnids, workload

FILE = "squeezenet1_0_deepcompression_decoded_bgr255.pt"
SOURCE = "songhan/SqueezeNet-Deep-Compression, decoded to torchvision's names"
VIEW = View(227, 256, squash=True)
NORMALISE = Normalise((123 / 255, 117 / 255, 104 / 255), (1 / 255,) * 3)  # Caffe's: less the mean, from 0 to 255
SPLITS = {"train": 128, "validation": 64, "test": 256}
SAME = "calibration, training, validation and test are the same images"


def task(
    seed: int,
    *,
    images: int = 64,
    batch: int = 16,
    whole: bool = False,
    train_images: int | None = None,
    smoke: bool = False,
) -> Task:
    """SqueezeNet 1.0 as it was released, and `images` calibration images that the seed draws.

    SPLITS are drawn by the names of the images, and share no class: with an image a class, labels of the training
    images say nothing of the others, so train by distillation alone. `whole`: all images are each of the splits.
    """
    sample, data = _sample(_folder())
    state, file, sha = weights(FILE, [base / "checkpoints" / "imagenet" for base in roots()], "", _absent)
    splits = dict.fromkeys(SPLITS, sample) if whole else split(sample)
    view = VIEW._replace(size=SMOKE["size"], resize=SMOKE["resize"]) if smoke else VIEW
    if smoke:
        splits = {name: few(part, SMOKE[name]) for name, part in splits.items()}
    model = load_weights(network(), state, file)
    with torch.no_grad():  # the weights are for blue, green, red
        first = model.get_parameter("features.0.weight")
        first.copy_(first.flip(1))
    return workload(
        "imagenet_squeezenet",
        model,
        Source(splits, noted(data, f"weights {FILE} sha256 {sha}"), view, NORMALISE),
        seed,
        images=min(images, SMOKE["calibration"]) if smoke else images,
        batch=batch,
        train_images=train_images,
        notes=(SAME,) * whole,
    )


def ready(**options: object) -> Data:
    """The data of the task, without its network."""
    return _sample(_folder())[1]


def pictures(**options: object) -> Pictures:
    """What the workers of the task decode."""
    return Pictures(_sample(_folder())[0], VIEW)


def network() -> nn.Module:
    """SqueezeNet 1.0 as torchvision has it, but for the last convolution, which pads as Caffe's does."""
    with drawing(0):  # what is drawn is written over
        model = squeezenet1_0()
    last = model.classifier[1]
    last.padding, last._reversed_padding_repeated_twice = (1, 1), [1, 1, 1, 1]
    return model  # type: ignore[no-any-return]


def split(sample: Listing) -> dict[str, Listing]:
    """The SPLITS of the sample, in an order that the names alone decide."""
    if len(sample.labels) < sum(SPLITS.values()):
        raise HapError(f"{sample.root}: must have {sum(SPLITS.values())} images, found {len(sample.labels)}")
    parts, one, before = {}, sample._replace(labels=torch.zeros_like(sample.labels)), 0
    for name, size in SPLITS.items():
        parts[name] = sample.part(drawn_by_name(one, before + size) & ~drawn_by_name(one, before))
        before += size
    return parts


def _folder() -> Path:
    folders = [base / "imagenet-sample" / "val" for base in roots()]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        looked = ", ".join(str(folder.absolute()) for folder in folders)
        raise MissingData(f"sample of ImageNet not found: looked for {looked}; an image of each class in its folder")
    return folder.resolve()


@lru_cache(maxsize=1)
def _sample(folder: Path) -> tuple[Listing, Data]:
    sample = listed(folder, wnids())
    note = f"{len(sample.labels):,} images, probably trained on; sha256 of names and sizes, the bytes were not read"
    return sample, Data("imagenet-sample", digest({"val": sample}), False, note)


def _absent(folder: Path) -> None:
    raise HapError(f"it is {SOURCE}")
