"""Data sets and checkpoints as they lie on disk, and batches of images; knows nothing of networks."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import md5, sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hap import HapError
from hap.harness.processes import ranks
from hap.harness.task import Data, MissingData, Seen
from hap.harness.tasks.pickles import batch, damaged, first_line

CIFAR10_MD5 = {  # the six files of the official copy, as torchvision.datasets.CIFAR10 lists them
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_SOURCE = "torchvision.datasets.CIFAR10(root, download=True) or www.cs.toronto.edu/~kriz/cifar.html"
CHECKPOINT_SOURCE = "pretrained_models/ of github.com/akamaster/pytorch_resnet_cifar10"


class Images(NamedTuple):
    """Images as bytes [N, channels, height, width] with their labels."""

    pixels: Tensor
    labels: Tensor

    def part(self, index: Tensor | slice) -> "Images":
        """Some of them."""
        return Images(self.pixels[index], self.labels[index])


def roots(root: str | Path | None = None) -> list[Path]:
    """Where data is looked for: `root` alone, else $HAP_DATA, ./data and ~/data."""
    if root is not None:
        return [Path(root)]
    given = os.environ.get("HAP_DATA")
    return [*([Path(given)] if given else []), Path("data"), Path.home() / "data"]


def cifar10(root: str | Path | None = None) -> tuple[Images, Images, Data]:
    """The 50,000 training and 10,000 test images, and which copy they are."""
    folders = [base / part for base in roots(root) for part in ("cifar-10-batches-py", "cifar10/cifar-10-batches-py")]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise _missing("CIFAR-10", "cifar-10-batches-py", root, CIFAR10_SOURCE)
    return _cifar10(folder.resolve())


@lru_cache(maxsize=1)  # 0.5 s and 180 MB: every case and seed of a run reads the same bytes
def _cifar10(folder: Path) -> tuple[Images, Images, Data]:
    contents = {name: _bytes(folder / name) for name in CIFAR10_MD5}
    pixels, labels = zip(*(batch(folder / name, content) for name, content in contents.items()), strict=True)
    differing = [name for name, content in contents.items() if md5(content).hexdigest() != CIFAR10_MD5[name]]
    note = f"unofficial copy: md5 of {', '.join(differing)} not the official one" if differing else "official copy"
    data = Data("cifar10", digest([*pixels, *labels]), not differing, note)
    train = Images(torch.cat(pixels[:5]), torch.cat(labels[:5]))
    return train, Images(pixels[5], labels[5]), data


def checkpoint(name: str, root: str | Path | None = None) -> tuple[dict[str, Tensor], Path, str]:
    """The state dict of checkpoints/cifar10/`name` without the prefix of DataParallel, its file and its sha256."""
    files = [base / "checkpoints" / "cifar10" / name for base in roots(root)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise _missing(f"checkpoint {name}", f"checkpoints/cifar10/{name}", root, CHECKPOINT_SOURCE)
    content = _bytes(file)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)["state_dict"]  # noqa: TID251
        state = {key.removeprefix("module."): value for key, value in state.items()}
    except Exception as error:  # whatever a damaged zip or pickle makes torch raise
        raise damaged(file, "a checkpoint with a state_dict of tensors", first_line(error)) from None
    return state, file, sha256(content).hexdigest()


def load_weights(model: nn.Module, state: dict[str, Tensor], file: Path) -> nn.Module:
    """The model with these weights; HapError names the file if they are another model's."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise damaged(file, "the weights of this network", f"{' '.join(str(error).split()):.160}") from None
    return model


def device() -> torch.device:
    """Where a task puts its model and its data: $HAP_DEVICE, else a GPU, that of this rank, else the CPU."""
    given = os.environ.get("HAP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=ranks.placed(given)).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; a device that is not there
        found = f"{given!r} ({first_line(error)})"
        raise HapError(f"HAP_DEVICE: a device of this machine expected, found {found}") from None


class Normalise(NamedTuple):
    """Bytes to floats of about zero mean and unit variance, per channel."""

    mean: tuple[float, ...]  # of pixels in [0, 1]
    std: tuple[float, ...]
    white: float = 255.0  # the byte that counts as 1

    def __call__(self, pixels: Tensor) -> Tensor:
        """Floats of the same shape, the channels last in memory: the layout that convolutions are fastest in."""
        mean, std = _constants(self.mean, pixels.device), _constants(self.std, pixels.device)
        return ((pixels.float() / self.white - mean) / std).contiguous(memory_format=torch.channels_last)


@lru_cache  # to copy them for each batch would make a GPU wait
@torch.inference_mode(False)
def _constants(values: tuple[float, ...], where: torch.device) -> Tensor:
    return torch.tensor(values, device=where).view(-1, 1, 1)


def epoch(
    images: Images,
    batch_size: int,
    rng: torch.Generator,
    *,
    normalise: Normalise,
    pad: int,
    flip: bool,
    limit: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: each image shifted by up to `pad` pixels, and mirrored half of the time."""
    n, where = len(images.labels), images.pixels.device
    order = torch.randperm(n, generator=rng)[:limit]
    shifts = torch.randint(2 * pad + 1, (2, len(order)), generator=rng)
    mirrored = (torch.rand(len(order), generator=rng) < 0.5) & flip
    draws = [torch.split(drawn.to(where), batch_size, -1) for drawn in (order, shifts, mirrored)]
    for chosen, shift, mirror in zip(*draws, strict=True):
        pixels = _crop(images.pixels[chosen], shift, pad)
        pixels = torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels) if flip else pixels
        yield normalise(pixels), images.labels[chosen]


def calibration(
    images: Images, normalise: Normalise, count: int, batch_size: int, rng: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Batches of `count` images drawn at random, as they are."""
    positive(images=count, batch=batch_size)
    order = torch.randperm(len(images.labels), generator=rng)[:count].to(images.pixels.device)
    return [(normalise(images.pixels[part]), images.labels[part]) for part in torch.split(order, batch_size)]


def positive(**options: int) -> None:
    """Raises HapError for an option of a task that is below 1."""
    for name, value in options.items():
        if value < 1:
            raise HapError(f"task: {name} must be at least 1, found {value}")


def _crop(pixels: Tensor, shift: Tensor, pad: int) -> Tensor:
    height, width = pixels.shape[-2:]
    windows = F.pad(pixels, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    each = torch.arange(len(pixels), device=pixels.device)
    return windows[each, :, shift[0], shift[1]]


@torch.inference_mode()
def measure(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    images: Images,
    normalise: Normalise,
    batch_size: int | None = None,
    seen: Seen | None = None,
) -> dict[str, float]:
    """Accuracy in percent and mean cross-entropy in nats, the work shared by ranks; leaves the model in eval mode.

    `seen` takes the class that was said of each image, and the true ones.
    """
    model.eval()
    n, where, wanted = len(images.labels), images.pixels.device, images.labels
    images = images.part(ranks.slices(n)) if ranks.world() > 1 else images
    # on a CPU, activations of small batches stay in the cache: 2 to 3 times as fast
    batch_size = batch_size or (1000 if where.type == "cuda" else 100)
    hits, loss = torch.zeros((), dtype=torch.long, device=where), torch.zeros((), dtype=torch.double, device=where)
    said = list[Tensor]()
    for pixels, labels in zip(
        torch.split(images.pixels, batch_size), torch.split(images.labels, batch_size), strict=True
    ):
        logits = call(model, normalise(pixels))
        said.append(logits.argmax(1))
        hits += (said[-1] == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum")
    if seen is not None:
        seen(in_order(torch.cat(said), n), wanted)
    return {"accuracy": 100 * int(ranks.summed(hits)) / n, "loss": float(ranks.summed(loss)) / n}


def in_order(mine: Tensor, count: int) -> Tensor:
    """A number a sample, on the CPU in the order of the samples, where each rank has those of every world-th."""
    parts = ranks.gathered(mine.cpu())
    found = mine.new_empty(count, device="cpu")
    for number, part in enumerate(parts):
        found[number :: len(parts)] = part
    return found


def digest(arrays: Sequence[Tensor]) -> str:
    """The sha256 over the bytes of the tensors, one after the other."""
    total = sha256()
    for array in arrays:
        total.update(array.contiguous().numpy().data)
    return total.hexdigest()


def _missing(what: str, name: str, root: str | Path | None, source: str) -> MissingData:
    places = ", ".join(str(place.absolute()) for place in roots(root))
    return MissingData(f"{what} not found: looked for {name} in {places}; get it from {source}, and set HAP_DATA")


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise damaged(file, "readable", str(error.strerror)) from None
