"""Decoding against torchvision's transforms, and workers that change nothing but who does it."""

import os
import signal

import numpy as np
import pytest
import torch
from pictures import CLASSES, folder, jpeg, write
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop, Resize

from hap import HapError
from hap.harness.tasks import decoding
from hap.harness.tasks.decoding import Pictures, View, decoded, random_crop, stream, workers
from hap.harness.tasks.imagefolder import listed

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
VIEW = View(24, 32)
MODES = {"RGB": "JPEG", "L": "JPEG", "CMYK": "JPEG", "P": "PNG", "RGBA": "PNG", "1": "PNG"}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DEVICE", "cpu")
    monkeypatch.delenv("HAP_WORKERS", raising=False)
    return Pictures(listed(folder(tmp_path / "train", each=4), CLASSES), VIEW)


def saved(path, mode, kind):
    """A picture in this mode; as .JPEG whatever it is, as some of ImageNet are."""
    if mode in ("RGB", "L", "CMYK"):
        return write(path / "a.JPEG", jpeg(7, mode))
    Image.open(write(path / "rgb.jpg", jpeg(7))).convert(mode).save(path / "a.JPEG", kind)
    return path / "a.JPEG"


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_what_torchvision_makes_of_it(tmp_path, mode):
    file = saved(tmp_path, mode, MODES[mode])
    image = Image.open(file)
    assert image.mode == mode
    expected = Compose([Resize(32), CenterCrop(24)])(image.convert("RGB"))
    assert np.array_equal(decoded(file, VIEW, None), np.asarray(expected))
    assert decoded(file, VIEW, None).shape == decoded(file, VIEW, 3).shape == (24, 24, 3)
    if mode == "L":
        grey = decoded(file, VIEW, 5)
        assert (grey == grey[:, :, :1]).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 12345678901234567])
def test_a_random_crop_is_that_of_torchvision_for_the_seed(tmp_path, seed):
    file = write(tmp_path / "a.jpg", jpeg(4, size=(61, 45)))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    found = decoded(file, VIEW, seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(seed)
    expected = RandomResizedCrop(24)(Image.open(file))
    assert np.array_equal(found, np.asarray(expected))


def test_crops_differ_by_seed_and_cover_the_range_of_shares():
    image = Image.new("RGB", (500, 375))
    shares = [height * width / (500 * 375) for _, _, height, width in (random_crop(image, seed) for seed in range(400))]
    assert min(shares) < 0.12
    assert max(shares) > 0.9
    assert len(set(shares)) > 350


def test_a_squashed_image_has_another_shape_as_pillow_resizes_it(tmp_path):
    file = write(tmp_path / "a.jpg", jpeg(4, size=(61, 45)))
    expected = Image.open(file).resize((32, 32), Image.LANCZOS)
    for size, at in ((24, 4), (23, 5)):
        shown = expected.crop((at, at, at + size, at + size))
        assert np.array_equal(decoded(file, View(size, 32, squash=True), None), np.asarray(shown))


DAMAGED = {
    "truncated": (jpeg(1)[:-200], r"OSError: image file is truncated \(\d+ bytes not processed\)"),
    "header alone": (jpeg(1)[:30], "OSError: "),
    "text": (b"<html>404</html>", "UnidentifiedImageError: cannot identify image file"),
    "broken PNG": (jpeg(1, kind="PNG")[:90], "OSError|SyntaxError"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("count", [0, 2])
def test_a_damaged_file_is_named_in_one_line_whoever_decodes_it(pictures, name, count):
    content, found = DAMAGED[name]
    pictures.images.file(5).write_bytes(content)
    rule = (
        rf"^\S*n02_1\.JPEG: must be an image that can be decoded \(found ({found}).*\); get the file again, or remove"
    )
    with pytest.raises(HapError, match=rule) as caught:
        list(stream(pictures, [[(0, None)], [(4, None), (5, None)], [(1, 7)]], count))
    assert "\n" not in str(caught.value)


def test_a_file_that_went_away_is_named(pictures):
    pictures.images.file(2).unlink()
    with pytest.raises(HapError, match=r"n01_2\.JPEG: must be an image .*found FileNotFoundError"):
        list(stream(pictures, [[(2, None)]]))


def test_workers_change_nothing_but_who_decodes(pictures):
    keys = [[(0, None), (3, 5), (11, 6)], [(2, 1)], [(7, None), (8, 2)]]
    alone, two = (list(stream(pictures, keys, count)) for count in (0, 2))
    assert [part.shape for part in alone] == [(3, 3, 24, 24), (1, 3, 24, 24), (2, 3, 24, 24)]
    assert all(torch.equal(one, other) for one, other in zip(alone, two, strict=True))
    for part, wanted in zip(alone, keys, strict=True):
        for pixels, (index, seed) in zip(part, wanted, strict=True):
            expected = decoded(pictures.images.file(index), VIEW, seed)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
            assert torch.equal(pictures[index, seed], expected)


def test_a_stream_leaves_the_global_stream_alone(pictures):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for count in (0, 1):
        list(stream(pictures, [[(0, 4)], [(1, 5)]], count))
    assert torch.equal(torch.get_rng_state(), before)


def killed(keys):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line(pictures, monkeypatch):
    monkeypatch.setattr(Pictures, "__getitems__", lambda self, keys: killed(keys))
    rule = (
        r"a process that decodes images ended \(RuntimeError: DataLoader worker .*give it memory .*HAP_WORKERS below 2"
    )
    with pytest.raises(HapError, match=rule) as caught:
        list(stream(pictures, [[(0, None)], [(1, None)], [(2, None)]], 2))
    assert "\n" not in str(caught.value)


def test_other_errors_pass(pictures, monkeypatch):
    def broken(self, keys):
        raise RuntimeError("something else")

    monkeypatch.setattr(Pictures, "__getitems__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(stream(pictures, [[(0, None)]], 0))


def test_the_workers_are_the_cores_of_a_process_beside_a_gpu_and_none_on_a_cpu(monkeypatch):
    monkeypatch.delenv("HAP_WORKERS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("HAP_DEVICE", "cpu")
    assert workers() == 0
    monkeypatch.setattr(decoding, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert workers() == 16
    for world, expected in (("8", 2), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", world)
        assert workers() == expected
    monkeypatch.setenv("HAP_WORKERS", "5")
    assert workers() == 5


@pytest.mark.parametrize("given", ["-1", "many", "", "1.5"])
def test_a_wrong_number_of_workers_is_refused(monkeypatch, given):
    monkeypatch.setenv("HAP_WORKERS", given)
    with pytest.raises(HapError, match=rf"^HAP_WORKERS: a whole number of processes .* expected, found '{given}'$"):
        workers()
