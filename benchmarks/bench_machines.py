"""How far the digits move from machine to machine: threads, memory format and instruction set, the seeds the same.

Each configuration runs in a process of its own, and prunes the cases of `digits` without fine-tuning. Twice: with dense
networks that it trained itself, and with those that the first configuration trained. What only the former moves is the
training, in which rounding grows; what the latter moves is scoring. No dense network of `digits` has a convolution
that oneDNN computes wrongly: see hap/structure/kernels.py.

    python benchmarks/bench_machines.py --json machines.json      # about 5 minutes on two cores
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

FIRST = "AVX512, 1 thread, channels last"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
MACHINES = {  # threads, channels last, environment
    FIRST: (1, True, {}),
    "AVX512, 2 threads, channels last": (2, True, {}),
    "AVX512, 1 thread, contiguous": (1, False, {}),
    "AVX2, 1 thread, channels last": (1, True, AVX2),
    "AVX2, 2 threads, channels last": (2, True, AVX2),
    "AVX2, 1 thread, contiguous": (1, False, AVX2),
}
SPEC = Path(__file__).parents[1] / "reproductions" / "digits.toml"


def prune(threads, last, seeds):
    """Prints the accuracies of each case and seed, dense and one-shot, under this configuration."""
    if not last:
        torch.channels_last = torch.contiguous_format  # the one name by which all of it asks for a format
    from hap.harness import run
    from hap.harness.spec.spec import load_spec
    from hap.harness.train import loop

    @contextmanager
    def fixed(_):
        torch.set_num_threads(threads)  # the task asks for one
        yield

    run.threads = loop.threads = fixed
    for name, case in load_spec(SPEC).cases.items():
        case = case.model_copy(update={"finetune": None})
        for seed in seeds:
            metrics = run.run(case, seed).metrics
            print(json.dumps([name, seed, metrics["dense"]["accuracy"], metrics["one_shot"]["accuracy"]]), flush=True)


def measure(seeds):
    """For each configuration, with its own networks and with the first one's: [case, seed, dense, one-shot]."""
    found = {"own": {}, "first": {}}
    with TemporaryDirectory() as folder:
        for machine, (threads, last, environ) in MACHINES.items():
            for whose in ("own", "first"):
                cache = Path(folder) / (machine if whose == "own" else FIRST)
                if whose == "first" and machine == FIRST:
                    continue
                command = [sys.executable, __file__, "--threads", str(threads), "--seeds", *map(str, seeds)]
                own = {"HAP_CACHE": str(cache), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
                done = subprocess.run(
                    [*command, *([] if last else ["--contiguous"])],
                    env=os.environ | environ | own,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found[whose][machine] = [json.loads(line) for line in done.stdout.splitlines()]
    return found


def table(found):
    """Differences from the first configuration in points: the largest and the mean over cases and seeds."""
    base = {(case, seed): (dense, one) for case, seed, dense, one in found["own"][FIRST]}
    yield f"{'points from ' + FIRST:50}{'dense':>16}{'one-shot':>16}    (largest, mean)"
    for whose, machines in found.items():
        for machine, rows in machines.items():
            if machine == FIRST:
                continue
            moves = [[abs(v - w) for v, w in zip(row[2:], base[row[0], row[1]], strict=True)] for row in rows]
            dense, one = zip(*moves, strict=True)
            trained = "trained there" if whose == "own" else "same networks"
            cells = "".join(f"{max(each):10.2f}{sum(each) / len(each):6.2f}" for each in (dense, one))
            yield f"{machine:34}{trained:16}{cells}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--contiguous", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        prune(args.threads, not args.contiguous, args.seeds)
    else:
        found = measure(args.seeds)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(table(found)))


if __name__ == "__main__":
    main()
