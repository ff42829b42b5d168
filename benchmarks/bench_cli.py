"""What a person waits for before anything happens: `hap --help`, and `import hap` beside `import torch`.

The bars: help under 1 s; a list, a typo and the verdicts on one spec under 2 s of CPU; importing hap and all its core
at most 0.1 s above torch. Each a fresh process, medians.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
CORE = "import hap; [getattr(hap, name) for name in hap.__all__]"


def seconds(*command):
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def test_help(benchmark):
    benchmark.pedantic(seconds, args=("-m", "hap", "--help"), rounds=7, warmup_rounds=1)
    assert benchmark.stats.stats.median < 1.0


def cpu_seconds(*command):
    """User and system time of a process and those that it starts, which other processes do not lengthen by waiting."""
    before = os.times()
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True)  # a typo ends with code 2
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("command", ["list", "judge digits", "judge digts"])
def test_an_answer_without_torch(benchmark, command):
    found = []
    benchmark.pedantic(lambda: found.append(cpu_seconds("-m", "hap", *command.split())), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"cpu_seconds": median(found)}
    assert median(found) < 2.0


def test_import_beside_torch(benchmark):
    seconds("-c", CORE)
    pairs = [(seconds("-c", "import torch"), seconds("-c", CORE)) for _ in range(7)]
    above = median(ours - torchs for torchs, ours in pairs)
    benchmark.extra_info |= {"torch_seconds": median(torchs for torchs, _ in pairs), "above_seconds": above}
    benchmark.pedantic(seconds, args=("-c", CORE), rounds=3)
    assert above < 0.1
