"""The pickles of CIFAR-10, read by an unpickler that can build arrays and nothing else."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hap import HapError


class _ArraysOnly(pickle.Unpickler):
    """Builds what the official files hold, whether written by Python 2 or 3, and refuses every other global."""

    allowed = {  # noqa: RUF012  (an annotation would hide that it is a constant)
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how Python 3 spells bytes in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise HapError(f"{module}.{name}")
        return self.allowed[module, name]


def batch(file: Path, content: bytes) -> tuple[Tensor, Tensor]:
    """The pixels [10000, 3, 32, 32] and the labels of a file of CIFAR-10; HapError names the file if it has others."""
    rule = "a pickled dict of data, 10000 x 3072 bytes, and labels, 10000 numbers from 0 to 9"
    try:
        record = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = np.asarray(record[b"data"]), np.asarray(record[b"labels"])
    except HapError as error:
        raise damaged(file, "a pickle of nothing but arrays", f"the global {error}") from None
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise damaged(file, rule, first_line(error)) from None
    if pixels.dtype != np.uint8 or pixels.shape != (10000, 3072):
        raise damaged(file, rule, f"data of type {pixels.dtype} and shape {pixels.shape}")
    strange = [label for label in labels.ravel().tolist() if label not in range(10)]
    if labels.shape != (10000,) or strange:
        raise damaged(file, rule, f"{labels.shape} labels, not from 0 to 9: {strange[:3]}")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels.astype(np.int64))


def damaged(file: Path, rule: str, found: str) -> HapError:
    """The one line of a file that is not what it must be."""
    return HapError(f"{file}: must be {rule} (found {found}); delete it and get it again")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.120}"
