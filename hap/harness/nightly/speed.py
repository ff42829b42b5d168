"""How long the works of benchmarks/watched.py take, as multiples of a fixed product of matrices timed beside them.

The product is timed before and after each work, in the same round, so that what else the machine does, and how fast it
is, falls out to first order; a ratio is not free of the machine, so a history keeps those of each machine apart. Does
not know what the works do.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

from hap.harness.task import MissingData

Work = Callable[[], float]  # does it once and returns its seconds
ROUNDS = 5
THREADS = 2
SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices: 2 side^3 FLOPs
PRODUCTS = 3


def works(root: Path) -> Mapping[str, Work]:
    """The works of a checkout; MissingData where it has none."""
    folder = root / "benchmarks"
    if not (folder / "watched.py").is_file():
        raise MissingData(f"speed: {folder / 'watched.py'} expected, which a checkout has, found none")
    sys.path.insert(0, str(folder))
    try:
        found: Mapping[str, Work] = import_module("watched").works()
    finally:
        sys.path.remove(str(folder))
    return found


def ratios(works: Mapping[str, Work], reference: Work, rounds: int = ROUNDS) -> dict[str, float]:
    """Of each work the median, over rounds in which all take turns, of its seconds over those of the reference.

    A first round is not counted.
    """
    found = defaultdict[str, list[float]](list)
    for _ in range(1 + rounds):
        before = reference()
        for name, work in works.items():
            took, after = work(), reference()
            found[name].append(2 * took / (before + after))
            before = after
    return {name: median(each[1:]) for name, each in found.items()}


def product() -> Work:
    """The reference: the median seconds of PRODUCTS products of two square matrices in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.ones(SIDES[device], SIDES[device], device=device) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        torch.mm(one, other)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda: median(once() for _ in range(PRODUCTS))
