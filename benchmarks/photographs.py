"""A folder of made-up JPEGs, as large as those of ImageNet are, for a pipeline to decode."""

import io

import numpy as np
from PIL import Image

from hap.harness.tasks.imagefolder import listed


def photographs(root, count):
    """JPEGs of 500x375, with detail enough to be nearly as many bytes as those of ImageNet, 110 kB on average."""
    rng, names = np.random.default_rng(0), ("n01", "n02")
    for i in range(count):
        coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.BICUBIC)).astype(np.int16)
        noisy = np.clip(image + rng.normal(0, 14, image.shape), 0, 255).astype(np.uint8)
        file, stream_ = root / names[i % 2] / f"{i}.JPEG", io.BytesIO()
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(stream_, "JPEG", quality=90)
        file.write_bytes(stream_.getvalue())
    return listed(root, names)
