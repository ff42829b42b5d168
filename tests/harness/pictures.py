"""JPEGs made up for the tests, in folders as ImageNet has them."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02", "n03")


@cache
def jpeg(seed: int, mode: str = "RGB", size: tuple[int, int] | None = None, kind: str = "JPEG") -> bytes:
    """A smooth picture of no two equal sides, in the given mode."""
    rng = np.random.default_rng(seed)
    width, height = size or (40 + 3 * (seed % 7), 36 + 5 * (seed % 3))
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (5, 6, bands), dtype=np.uint8).squeeze()
    image = Image.fromarray(coarse, mode=None if bands in (1, 3) else mode).resize((width, height), Image.BICUBIC)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write(file: Path, content: bytes) -> Path:
    """The file, in a folder that is made for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def folder(root: Path, classes=CLASSES, each: int = 2, first: int = 0) -> Path:
    """So many pictures of each class, among them ones in grey and in CMYK."""
    for number, name in enumerate(classes):
        for i in range(each):
            seed = (first + number * each + i) % 24
            mode = {5: "L", 11: "CMYK"}.get(seed, "RGB")
            write(root / name / f"{name}_{i}.JPEG", jpeg(seed, mode))
    return root
