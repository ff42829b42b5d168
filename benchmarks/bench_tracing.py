"""Tracing and grouping on two threads: seconds, and memory above the model; Torch-Pruning's graph printed beside.

The bars: ResNet-50 and DenseNet-121 at 32x32 under 5 s, BERT-base at 16 tokens under 10 s, each under 1 GiB. Weights
are random: where a NaN goes does not depend on them.
"""

import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median

import pytest
import torch
from torchvision import models

from hap import couple, trace

GIB = 2**30
ROOT = Path(__file__).parents[1]
MODULE = "benchmarks.bench_tracing"


def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bert_base():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def sentence():
    return {"input_ids": torch.randint(1, 1000, (1, 16)), "attention_mask": torch.ones(1, 16, dtype=torch.long)}


NETS = {
    "resnet50": (models.resnet50, image, 5.0),
    "densenet121": (models.densenet121, image, 5.0),
    "bert-base": (bert_base, sentence, 10.0),
}


def grouped(model, example):
    return couple(model, trace(model, example), "tied")


def peak(name):
    """Bytes above the model that tracing and grouping need at most, in this process (Linux).

    Not by getrusage: its maximum outlives exec, so a child would start at the size of pytest.
    """
    model, example = NETS[name][0]().eval(), NETS[name][1]()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    before = resident("VmRSS")
    grouped(model, example)
    return resident("VmHWM") - before


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NETS)
def test_trace_and_couple(benchmark, name, capsys):
    build, example, bar = NETS[name]
    model, inputs = build().eval(), example()
    groups = benchmark.pedantic(grouped, (model, inputs), rounds=3, iterations=1, warmup_rounds=1)
    ran = subprocess.run([sys.executable, "-m", MODULE, name], cwd=ROOT, capture_output=True, text=True, check=True)
    above = int(ran.stdout)
    benchmark.extra_info |= {"groups": len(groups), "peak MiB above the model": above // 2**20}
    if (peer := torch_pruning_seconds(model, inputs)) is not None:
        benchmark.extra_info["torch-pruning seconds"] = round(peer, 3)
    took = "not timed" if benchmark.stats is None else f"{benchmark.stats.stats.median:.2f} s"
    beside = "not measured" if peer is None else f"{peer:.2f} s"
    with capsys.disabled():  # the comparison is the point
        print(f"\n{name}: {took}, {above / GIB:.2f} GiB, {len(groups)} groups; torch-pruning's graph {beside}")
    assert above < GIB
    assert benchmark.stats is None or benchmark.stats.stats.median < bar


def torch_pruning_seconds(model, inputs):
    """Median seconds of its build_dependency; None where it is not installed, or cannot read the model's output."""
    if isinstance(inputs, dict):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import and while tracing
        try:
            import torch_pruning
        except ImportError:
            return None
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(peak(sys.argv[1]))
