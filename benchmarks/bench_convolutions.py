"""Which convolutions torch computes wrongly on this CPU: a sweep, each shape in a process of its own, which may die.

Compared with double precision: the output, the gradient of the input and that of the weight. glibc checks memory where
its checks are installed, so that what is written past an end is noticed at once. Where the CPU has AVX512, the sweep is
made for it and for AVX2. What is wrong, and how it is avoided, is in hap/structure/kernels.py.

    python benchmarks/bench_convolutions.py --json convolutions.json      # 2 to 4 minutes on two cores
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command
import torch

from hap.harness.cli.probe import Shape, verdict

CHECKS = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
CHECKED = {"LD_PRELOAD": str(CHECKS), "GLIBC_TUNABLES": "glibc.malloc.check=3"} if CHECKS.exists() else {}
BASE = Shape(7, 13, 112)
SHAPES = {
    **{f"{c} channels, {n}x{n}": Shape(c, 16, n) for c in (1, 7, 8, 15, 16) for n in (8, 32, 112)},
    "kernel 3": BASE._replace(kernel=3),
    "kernel 3, 32x32": BASE._replace(kernel=3, size=32),
    "stride 1": BASE._replace(stride=1),
    "stride 3": BASE._replace(stride=3, size=111),
    "stride 2 that leaves a pixel": BASE._replace(size=111),
    "channels first": BASE._replace(last=False),
    "bfloat16": BASE._replace(dtype="bfloat16"),
    "forward only": BASE._replace(backward=False),
}


def swept(isa, threads, seconds, workers=2):
    """Each shape, and what is wrong with it."""

    def one(shape):
        return verdict(shape, threads, seconds, CHECKED | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {}))

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(SHAPES, pool.map(one, SHAPES.values()), strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60, help="after which a process counts as hanging")
    parser.add_argument("--json", type=Path, help="write the table there")
    args = parser.parse_args()
    here = torch.backends.cpu.get_cpu_capability()
    rows = []
    for isa in [None, "AVX2"] if here == "AVX512" else [None]:
        for threads in args.threads:
            for name, wrong in swept(isa, threads, args.seconds):
                rows.append({"isa": isa or here, "threads": threads, "shape": name, "wrong": wrong})
                print(f"{isa or here:8}{threads} threads  {name:32}{wrong or 'right'}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(command.machine() | {"convolutions": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
