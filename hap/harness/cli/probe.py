"""Whether a convolution of this torch is right on this machine: computed in a process of its own, which may die of it.

    python -m hap.harness.cli.probe '{"inputs": 3, "outputs": 16, "size": 224}'

prints the largest relative errors of the output and of the gradients of input and weight against double precision.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 10
LATE = "does not end in"  # as a process does that hangs, and one on a machine that is busy
RIGHT = 1e-4, 0.1  # the largest relative error of what is right, in float32 and in bfloat16
WHAT = ("output", "gradient of the input", "gradient of the weight")


class Shape(NamedTuple):
    """A convolution and the images that it reads."""

    inputs: int  # channels
    outputs: int
    size: int  # pixels of a side
    kernel: int = 1
    stride: int = 2
    samples: int = 2
    dtype: str = "float32"
    last: bool = True  # whether the channels come last in memory
    backward: bool = True


# one that corrupts memory with AVX2 and AVX512 alike, see hap/structure/kernels.py
KNOWN = Shape(3, 16, 224)


def verdict(
    shape: Shape, threads: int = 1, seconds: float = 60, environ: Mapping[str, str] | None = None
) -> str | None:
    """What is wrong, in words; None where all is right. The process gets `seconds` and what `environ` adds."""
    # threads that wait by spinning can take minutes on a machine that is busy
    own = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "hap.harness.cli.probe", json.dumps(shape._asdict())]
    try:
        done = subprocess.run(
            command, env={**os.environ, **own, **(environ or {})}, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"{LATE} {seconds:.0f} s"
    if done.returncode < 0:
        return f"dies of {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return f"fails: {(done.stderr.strip().splitlines() or ['without a word'])[-1]:.100}"
    errors = dict(zip(WHAT, json.loads(done.stdout), strict=True))
    right = RIGHT[shape.dtype != "float32"]
    wrong = [f"gives a wrong {what} (by {error:.1g})" for what, error in errors.items() if not error <= right]
    return ", ".join(wrong) or None


def line() -> str:
    """What `hap doctor` says of the one convolution that is known to be wrong somewhere."""
    found = verdict(KNOWN, seconds=20)
    if found is not None and found.startswith(LATE):
        return f"convolutions: not known, for the probe {found}: it hangs, or the machine is busy"
    if found is None:
        return "convolutions: right, also the one that is known to be wrong on some machines"
    return (
        f"convolutions: torch {torch.__version__} {found} here in a 1x1 convolution with a stride and few channels, "
        "channels last; hap goes around it, a training loop of your own does not: see hap/structure/kernels.py"
    )


def errors(shape: Shape) -> list[float]:
    """The largest relative errors over some rounds: of the output, and of the gradients of input and weight."""
    worst, rng = [0.0] * len(WHAT), torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        x = torch.randn(shape.samples, shape.inputs, shape.size, shape.size, generator=rng)
        w = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel, generator=rng)
        exact = _convolved(shape, x.double(), w.double(), torch.contiguous_format)
        format = torch.channels_last if shape.last else torch.contiguous_format
        found = _convolved(shape, x.to(getattr(torch, shape.dtype)), w.to(getattr(torch, shape.dtype)), format)
        each = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=False)]
        worst = [max(pair) for pair in zip(worst, [*each, 0.0, 0.0], strict=False)]
        junk = [torch.randn(n) for n in (7, 33, 129, 513, 1000)]  # neighbours, which die of what is written past an end
        del junk
    return worst


def _convolved(shape: Shape, x: Tensor, w: Tensor, format: torch.memory_format) -> list[Tensor]:
    x, w = (t.to(memory_format=format, copy=True).requires_grad_(shape.backward) for t in (x, w))
    y = F.conv2d(x, w, None, shape.stride, shape.kernel // 2)
    if not shape.backward:
        return [y]
    slope = torch.linspace(-1, 1, y.numel(), dtype=torch.double).view(y.shape).sin()
    gradients: Any = torch.autograd.grad(y, (x, w), slope.to(y.dtype).contiguous(memory_format=format))
    return [y.detach(), *gradients]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may die, and its memory is of no use to anyone
    print(json.dumps(errors(Shape(**json.loads(sys.argv[1])))))
