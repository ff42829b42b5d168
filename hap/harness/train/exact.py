"""The same numbers each time: what torch, cuDNN and cuBLAS are asked for, and what is said where they cannot."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch.utils import deterministic

# of cuBLAS; for torch it must be there before the first product on a GPU, so it stays set
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
UNKNOWN = re.compile(r"^(\S+(?: \S+)?) does not have a deterministic implementation")
Made = TypeVar("Made")


@contextmanager
def exactly() -> Iterator[None]:
    """The same numbers each time on one machine, float32 where they say so.

    No algorithm is chosen by timing, and none of those whose sums come in another order each time; no TF32 or bfloat16
    within convolutions and products of float32. An op that has no deterministic algorithm raises a RuntimeError, which
    `determined` makes a note of; hap/structure/kernels.py lists them, and how each is avoided. Memory that nothing was
    written to is not filled, as torch would then do by default.
    """
    for name, value in WORKSPACE.items():
        os.environ.setdefault(name, value)
    cudnn = torch.backends.cudnn
    memory: Any = deterministic  # its attribute is not seen by mypy
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    torch.use_deterministic_algorithms(True, warn_only=all(modes))  # what was made a note of once, stays so
    try:
        with _float32():
            yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before


def undetermined(error: RuntimeError | str) -> str | None:
    """What a record says of an op without a deterministic algorithm, where an error or a warning is of its call."""
    found = UNKNOWN.match(str(error))
    return f"{found[1]} has no deterministic algorithm: made again, the numbers may differ" if found else None


def determined(do: Callable[[], Made], note: Callable[[str], Any], again: Callable[[], Any]) -> Made:
    """What `do` gives; where it calls an op without a deterministic algorithm, `again` is called and it is tried anew.

    From then on until `exactly` ends such ops are called all the same, and `note` takes the line that says so.
    """
    try:
        return do()
    except RuntimeError as error:
        if (line := undetermined(error)) is None:
            raise
    note(line)
    torch.use_deterministic_algorithms(True, warn_only=True)
    again()
    return do()


@contextmanager
def _float32() -> Iterator[None]:
    """Products of float32 as they are, on GPUs and CPUs.

    torch has two names for it, and refuses to read by the older one what was set by the newer one.
    """
    backends: Any = torch.backends
    parts = [
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,
        backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn,
    ]  # fmt: skip
    newer, older = [part.fp32_precision for part in parts], None
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
    for part in parts:
        if part.fp32_precision not in ("none", "ieee"):  # taken over from what is set for all
            part.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            backends.cudnn.allow_tf32 = older[1]
        else:
            for part, precision in zip(parts, newer, strict=True):
                part.fp32_precision = precision
