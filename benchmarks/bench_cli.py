"""What a person waits for before anything happens: `hap --help`, and `import hap` beside `import torch`.

The bars: help under 1 s; importing hap and all its core at most 0.1 s above torch. Each a fresh process, medians.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
CORE = "import hap; [getattr(hap, name) for name in hap.__all__]"


def seconds(*command):
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def test_help(benchmark):
    benchmark.pedantic(seconds, args=("-m", "hap", "--help"), rounds=7, warmup_rounds=1)
    assert benchmark.stats.stats.median < 1.0


def test_import_beside_torch(benchmark):
    seconds("-c", CORE)
    pairs = [(seconds("-c", "import torch"), seconds("-c", CORE)) for _ in range(7)]
    above = median(ours - torchs for torchs, ours in pairs)
    benchmark.extra_info |= {"torch_seconds": median(torchs for torchs, _ in pairs), "above_seconds": above}
    benchmark.pedantic(seconds, args=("-c", CORE), rounds=3)
    assert above < 0.1
