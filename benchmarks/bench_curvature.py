"""What the Hessian diagonal costs, in faithful Hutchinson probes; curvlinops' and PyHessian's probes beside it.

A faithful probe is the loop body of the published code: one product of the Hessian with random signs for all weights
of two or four axes, on the model as it is; the graph of the gradients is built before, and not timed. `exact` with k
columns draws one more. All take turns in each round: seconds are medians, and ratios medians of those to the faithful
probe of the same round. Random weights; on CUDA where there is any, with torch's own choice of tf32, else two threads.

The bars, in faithful probes: two columns per row at most 1.0 on the CIFAR networks and 2.0 on ResNet-50; all columns
per row at most 2.5 on the CIFAR networks. Two columns take at most twice the memory of a training step, above model
and data in a fresh process. `python benchmarks/bench_curvature.py --json FILE` does without pytest; `--smoke`, and
BENCH_SMOKE=1 with pytest, run few images for one round and hold no bar.
"""

import ctypes
import gc
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict, namedtuple
from functools import partial
from importlib.util import find_spec
from operator import truediv
from pathlib import Path
from statistics import median

import command
import pytest
import torch
from bench_tracing import resident, two_threads  # noqa: F401  # the fixture is for all tests here
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F
from torchvision import models

from hap.harness.tasks.nets import preresnet, resnet
from hap.hessian.exact import exact
from hap.hessian.hutchinson import hutchinson
from hap.hessian.losses import CrossEntropy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REFERENCE, FEW, ALL = "faithful probe", "exact, 2 columns per row", "exact, all columns per row"
MATVECS = 2  # products in a timed call of a peer: more cost memory or patience
Net = namedtuple("Net", "build images side classes rounds bars")  # bars: faithful probes
NETS = {
    "resnet20": Net(partial(resnet, 20), 256, 32, 10, 5, {FEW: 1.0, ALL: 2.5}),
    "preresnet29": Net(partial(preresnet, 29), 256, 32, 10, 3, {FEW: 1.0, ALL: 2.5}),
    "resnet56": Net(partial(resnet, 56), 256, 32, 10, 3, {FEW: 1.0, ALL: 2.5}),
    "resnet50": Net(partial(models.resnet50, weights=None), 16, 224, 1000, 3, {FEW: 2.0}),
}


def prepare(name, smoke):
    """The model, with only the scored weights differentiable, and a batch."""
    net = NETS[name]
    torch.manual_seed(0)
    model, images = net.build().to(DEVICE), max(2, net.images // 16) if smoke else net.images
    inputs, targets = torch.randn(images, 3, net.side, net.side), torch.randint(net.classes, (images,))
    model.apply(lambda module: setattr(module, "momentum", 1.0))  # read by BatchNorm alone: take the batch's statistics
    with torch.no_grad():  # with the default ones ResNet-56 is so sure of a class that H is 1e-30
        model.train()(inputs[:8].to(DEVICE))
    for p in model.parameters():
        p.requires_grad_(p.ndim in (2, 4))
    return model.eval(), (inputs.to(DEVICE), targets.to(DEVICE))


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, times=1):
    start = now()
    work()
    return (now() - start) / times


def faithful(model, batch):
    weights = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), weights, create_graph=True)

    def probe():
        signs = [torch.randint_like(w, 2).mul_(2).sub_(1) for w in weights]
        products = torch.autograd.grad(slopes, weights, signs, retain_graph=True)
        return [(v * hv).flatten(1).sum(1) for v, hv in zip(signs, products, strict=True)]

    probe()  # the first takes fresh memory
    return seconds(probe)


def closed(model, batch, columns, per):
    rng = torch.Generator(DEVICE).manual_seed(0)
    return seconds(partial(exact, model, CrossEntropy(), [batch], columns=columns, rng=rng, per=per))


class Ticks(list):
    """The time at each probe: `hutchinson` hands every one to `reduce`, where groups would sum it."""

    def reduce(self, _):
        self.append(now())
        return torch.zeros(1)


def probing(model, batch, block=False):
    ticks, rng = Ticks(), torch.Generator(DEVICE).manual_seed(0)
    hutchinson(model, CrossEntropy(), [batch], ticks, probes=2, rng=rng, block=block, together=1)
    return ticks[1] - ticks[0]  # without the graph, as of the faithful probe


def curvlinops_diagonal(model, batch):
    from curvlinops import HessianLinearOperator, hutchinson_diag

    weights = [p for p in model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), weights, [batch], check_deterministic=False)
    return seconds(partial(hutchinson_diag, operator, MATVECS), MATVECS)


def pyhessian_trace(model, batch):
    from pyhessian import hessian

    trace = partial(hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=CUDA).trace, tol=-float("inf"))
    trace(1)  # and not tol=0, with which a negative trace would stop it
    return seconds(partial(trace, MATVECS), MATVECS)


def contestants(name):
    columns = {2: "2", 3: "3"} | ({None: "all"} if NETS[name].classes <= 10 else {})
    chosen = {REFERENCE: faithful, "hutchinson, a probe": probing}
    for per in ("row", "weight"):
        chosen |= {f"exact, {k} columns per {per}": partial(closed, columns=c, per=per) for c, k in columns.items()}
    if name == "resnet20":
        chosen["hutchinson, a sweep of block probes"] = partial(probing, block=True)
    peers = {"curvlinops": curvlinops_diagonal, "pyhessian": pyhessian_trace}
    return chosen | {f"{run.__name__}, a probe": run for peer, run in peers.items() if find_spec(peer)}


def measure(name, smoke):
    """All that is measured of a network; one entry of the JSON."""
    model, batch = prepare(name, smoke)
    runs, took = contestants(name), defaultdict(list)
    with warnings.catch_warnings():  # the peers', on import and by PyHessian's way to build a graph
        warnings.filterwarnings("ignore", r"`torch.jit.script` is deprecated|Using backward\(\) with create_graph=True")
        for run in runs.values():  # what is imported or set up at a first call
            run(model, (batch[0][:2], batch[1][:2]))
        for _ in range(1 if smoke else NETS[name].rounds):
            for who, run in runs.items():
                gc.collect()
                took[who].append(run(model, batch))
    found = {"network": name, "images": len(batch[0]), "smoke": smoke, "rounds": took}
    found["seconds"] = {who: median(each) for who, each in took.items()}
    found["probes"] = {who: median(map(truediv, each, took[REFERENCE])) for who, each in took.items()}
    found["precision"] = precision(model, batch) if NETS[name].classes <= 10 else {}
    del model, batch  # the peaks need the room
    for what in PEAKS:
        command = [sys.executable, __file__, name, "--peak", what, *["--smoke"] * smoke]
        found[f"bytes of {what}"] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found["training steps of memory"] = found["bytes of exact"] / found["bytes of a training step"]
    return found


def precision(model, batch):
    """How far the values of the rows are from those in float32, by the dtype of the passes."""

    def rows(fast, autocast=None):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
        found = exact(model, CrossEntropy(), [batch], per="row", autocast=autocast)
        return torch.cat([v.flatten() for v in found.diagonal.values()]).double().cpu()

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    full, others = rows(False), {"bf16": rows(False, torch.bfloat16)} | ({"tf32": rows(True)} if CUDA else {})
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    errors = {name: float(((each - full) / full).abs().nanmedian()) for name, each in others.items()}
    return {name: {"error": errors[name], "rho": spearmanr(v, full).statistic.item()} for name, v in others.items()}


def step(model, batch):
    F.cross_entropy(model.train().requires_grad_()(batch[0]), batch[1]).backward()


PEAKS = {"exact": partial(closed, columns=2, per="row"), "a training step": step}


def peak(name, what, smoke):
    """Bytes above model and data at most, in this process (Linux); not by getrusage (see `bench_tracing.peak`)."""
    model, batch = prepare(name, smoke)
    PEAKS[what](model, (batch[0][:2], batch[1][:2]))
    model.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # else the call would live on what the warm-up left
    torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if CUDA else resident("VmRSS")
    PEAKS[what](model, batch)
    return (torch.cuda.max_memory_allocated() if CUDA else resident("VmHWM")) - before


def broken(found):
    """The bars that do not hold."""
    held = [("memory, in training steps", found["training steps of memory"], 2.0)]
    held += [(who, found["probes"][who], bar) for who, bar in NETS[found["network"]].bars.items()]
    return [] if found["smoke"] else [f"{found['network']}, {who}: {v:.2f} > {bar}" for who, v, bar in held if v > bar]


def table(found):
    lines = [f"\n{found['network'] + ', images: ' + str(found['images']):46}{'seconds':>9}{'probes':>8}"]
    lines += [f"  {who:44}{took:9.3f}{found['probes'][who]:8.2f}" for who, took in found["seconds"].items()]
    peaks = ", ".join(f"{what} {found[f'bytes of {what}'] / 2**20:.0f} MiB" for what in PEAKS)
    lines.append(f"  memory of 2 columns per row: {peaks}, ratio {found['training steps of memory']:.2f}")
    close = "  {}: median relative error {error:.2g}, rank correlation {rho:.5f}".format
    return "\n".join(lines + [close(dtype, **each) for dtype, each in found["precision"].items()])


@pytest.mark.parametrize("name", NETS)
def test_curvature_in_probes(benchmark, name, capsys):
    found = benchmark.pedantic(measure, (name, "BENCH_SMOKE" in os.environ), rounds=1, iterations=1)
    benchmark.extra_info |= found
    with capsys.disabled():  # the comparison is the point
        print(table(found))
    assert not broken(found)


def main():
    parser = command.options(__doc__, NETS)
    parser.add_argument("--peak", choices=PEAKS, help="print the bytes of this alone")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.peak:
        print(peak(args.networks[0], args.peak, args.smoke))
        return
    command.run(args, NETS, measure, table, broken)


if __name__ == "__main__":
    main()
