"""Folders of images against torchvision's own reading of them, and every way in which one can be wrong."""

import os
import subprocess
from hashlib import sha256

import pytest
import torch
from pictures import CLASSES, folder, jpeg, write
from torchvision.datasets import ImageFolder

from hap import HapError
from hap.harness.tasks.imagefolder import digest, drawn_by_name, listed


@pytest.fixture
def root(tmp_path):
    return folder(tmp_path / "train", each=3)


def test_a_listing_is_that_of_torchvision(root):
    write(root / "n02" / "deeper" / "below.png", jpeg(1, kind="PNG"))
    write(root / "n01" / "notes.txt", b"not an image, and passed over")
    write(root / "n03" / "Lower.jpeg", jpeg(2))
    write(root / "loose.JPEG", jpeg(2))
    images, theirs = listed(root, CLASSES), ImageFolder(root)
    assert [(str(images.file(i)), int(label)) for i, label in enumerate(images.labels)] == theirs.samples
    assert images.sizes.tolist() == [os.path.getsize(file) for file, _ in theirs.samples]
    part = images.part(torch.tensor([4, 1]))
    assert [str(part.file(i)) for i in range(2)] == [theirs.samples[i][0] for i in (4, 1)]
    assert part.labels.tolist() == [theirs.samples[i][1] for i in (4, 1)]
    assert images.part(slice(2, 5)).labels.tolist() == theirs.targets[2:5]


def test_a_name_in_any_bytes_is_found_again(root):
    name = os.fsdecode(b"caf\xe9 \xff.jpg")
    write(root / "n02" / name, jpeg(3))
    images = listed(root, CLASSES)
    assert sorted(images.file(i).name for i in range(len(images.labels)) if images.labels[i] == 1)[0] == name


def nothing(root):
    for name in CLASSES:
        subprocess.run(["rm", "-r", root / name], check=True)
        write(root / f"{name}.JPEG", jpeg(0))


WRONG = {
    "missing": (
        lambda root: (root / "n02").rename(root.parent / "n02"),
        r"train: must have .* 3 .*\(n02 is missing; 2",
    ),
    "extra": (
        lambda root: write(root / "n9" / "a.jpg", jpeg(0)),
        r"train: must have .* and no other \(found n9; 4 fold",
    ),
    "hidden": (lambda root: (root / ".cache").mkdir(), r"no other \(found \.cache; 4 folders\)$"),
    "flat": (
        nothing,
        r"train: must have a folder for each of the 3 classes \(found none; 3 files lie directly in it\)$",
    ),
    "empty": (
        lambda root: [file.unlink() for file in (root / "n03").iterdir()],
        r"n03: must have an image \(\.jpg, .*\); found none$",
    ),
    "no image": (
        lambda root: [file.rename(file.with_suffix(".txt")) for file in (root / "n01").iterdir()],
        r"n01: must have an image \(\.jpg, .*\); found none$",
    ),
    "no bytes": (
        lambda root: (root / "n02" / "n02_1.JPEG").write_bytes(b""),
        r"n02_1\.JPEG: must be an image that can be decoded \(found 0 bytes\); get the file again, or remove it$",
    ),
    "link": (
        lambda root: (root / "n02" / "a.jpg").symlink_to("nowhere"),
        r"a\.jpg: must be an image that can be decoded \(found No such file or directory\); get",
    ),
    "file": (
        lambda root: (root.rename(root.parent / "away"), root.write_bytes(b"")),
        r"train: must be a readable folder \(found Not a directory\)$",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_folder_is_one_line(root, name):
    spoil, rule = WRONG[name]
    spoil(root)
    with pytest.raises(HapError, match=rule) as caught:
        listed(root, CLASSES)
    assert "\n" not in str(caught.value)


def test_the_digest_is_of_names_and_sizes(root):
    images = {"train": listed(root, CLASSES)}
    files = sorted(f"{f.parent.name}/{f.name}" for f in root.rglob("*.JPEG"))
    text = "".join(f"train/{name}\0{os.path.getsize(root / name)}\n" for name in files)
    assert digest(images) == sha256(text.encode()).hexdigest()
    assert digest({"val": images["train"]}) != digest(images)
    os.utime(root / files[0], (1, 1))
    turned = images["train"].part(torch.arange(len(files)).flip(0))
    assert digest({"train": turned}) == digest({"train": listed(root, CLASSES)}) == digest(images)
    (root / files[0]).write_bytes((root / files[0]).read_bytes() + b"\0")
    longer = digest({"train": listed(root, CLASSES)})
    (root / files[1]).rename(root / "n01" / "other.JPEG")
    assert len({longer, digest(images), digest({"train": listed(root, CLASSES)})}) == 3


def test_what_is_held_out_is_drawn_by_the_names_alone(root):
    """The oracle sorts each class by the hash of the names; where the images lie is nothing to it."""
    images = listed(root, CLASSES)
    for each in (0, 1, 2, 5):
        chosen = {images.file(i).name for i in drawn_by_name(images, each).nonzero().flatten().tolist()}
        expected = set()
        for name in CLASSES:
            files = sorted((root / name).iterdir(), key=lambda file: sha256(file.name.encode()).digest())
            expected |= {file.name for file in files[:each]}
        assert chosen == expected
    moved = folder(root.parent / "elsewhere" / "val", each=3)
    assert torch.equal(drawn_by_name(listed(moved, CLASSES), 1), drawn_by_name(images, 1))
