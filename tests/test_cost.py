"""Costs against counts by hand and torch.utils.flop_counter; of seconds, only that they are there."""

from itertools import accumulate

import pytest
import torch
from cases import REAL, SMALL, bert, build, tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hap import cost
from hap.cost import latency, macs, params

HAND = {
    "conv": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 8, 8), 8 * 3 * 9 * 16),
    "oblong": (nn.Conv2d(3, 8, (1, 5)), (3, 8, 8), 8 * 3 * 5 * 8 * 4),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (6, 5, 5), 9 * 2 * 9 * 9),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False), (6, 5, 5), 6 * 9 * 25),
    "1d": (nn.Conv1d(4, 5, 3, dilation=2), (4, 9), 5 * 4 * 3 * 5),
    "linear": (nn.Linear(7, 5), (7,), 35),
    "linear without bias": (nn.Linear(7, 5, bias=False), (7,), 35),
    "linear on tokens": (nn.Linear(7, 5), (11, 7), 11 * 35),
    "batchnorm": (nn.BatchNorm2d(4), (4, 3, 3), 0),
}


@pytest.mark.parametrize(("module", "shape", "expected"), HAND.values(), ids=HAND)
def test_macs_are_those_counted_by_hand(module, shape, expected):
    assert macs(module, torch.randn(1, *shape)) == expected
    assert macs(module, torch.randn(3, *shape)) == 3 * expected


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_macs_are_half_the_flops_that_torch_counts(name):
    """It shares torch's formulas, so it can only see what is counted; products inside attention are not."""
    model, example = build(REAL if name in REAL else SMALL, name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**example) if isinstance(example, dict) else model(example)
    counts = {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
    inside = sum(n for op, n in counts.items() if "attention" in op or op in ("bmm", "baddbmm"))
    assert inside == 0 or name in ("attention", "bert")
    assert 2 * macs(model, example) == counter.get_total_flops() - inside


def test_macs_of_published_networks():
    """At the sizes of the papers: ResNet-50 at 224 (4.09 G) and MobileNetV2 (0.30 G), as torchvision states them."""
    for name, expected in (("resnet50", 4.089e9), ("mobilenet_v2", 0.3008e9)):
        with torch.device("meta"):
            model = REAL[name][0]()
            assert macs(model, torch.empty(1, 3, 224, 224)) == pytest.approx(expected, rel=2e-3)


def test_macs_take_the_call_that_the_model_needs():
    model, example = build(SMALL, "mlp")
    assert macs(model, {"x": example}, call=lambda m, inputs: m(inputs["x"])) == macs(model, example)
    assert macs(bert().eval(), tokens()) > 0


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert params(model) == 20 + 20 + 8
    model[2].weight = model[0].weight
    assert params(model) == 20 + 4 + 8
    assert params(nn.ReLU()) == 0


def test_latency_is_measured_in_eval_mode_at_each_batch_and_leaves_the_model():
    model, example = build(SMALL, "residual")
    model.train()
    model.bn0.eval()
    seen = []
    model.register_forward_pre_hook(lambda m, x: seen.append((len(x[0]), m.training, torch.is_grad_enabled())))
    found = latency(model, example, (1, 5), repeats=3)
    assert list(found) == [1, 5]
    assert all(seconds > 0 for seconds in found.values())
    assert seen == [(1, False, False)] * 6 + [(5, False, False)] * 6  # three to warm up, three measured
    assert model.training
    assert not model.bn0.training


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([0.5, 0.1, 0.1, 0.05, 0.01, 0.03], 0.03),  # three warm up
        ([0.7, 0.1, 0.5, 0.3], 0.3),  # five more would take too long: one warms up, three count
    ],
)
def test_latency_is_the_median_after_warm_up(monkeypatch, passes, expected):
    starts = [0.0, *accumulate(2 * p for p in passes)]
    times = iter([moment for start, took in zip(starts, passes, strict=False) for moment in (start, start + took)])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(times))
    assert latency(nn.Linear(3, 3), torch.randn(1, 3), (2,), repeats=3) == {2: pytest.approx(expected)}
    assert next(times, None) is None


def test_latency_repeats_each_tensor_of_the_input():
    found = latency(bert().eval(), {**tokens(), "return_dict": True}, (1, 3), repeats=1)
    assert set(found) == {1, 3}


def test_a_cuda_device_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    cost._synchronise(torch.device("cuda", 0))
    cost._synchronise(torch.device("cpu"))
    assert waited == [torch.device("cuda", 0)]


def test_attention_products_are_left_out_whichever_kernel_is_used():
    model, example = build(SMALL, "attention")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = macs(model, example)
    assert plain == macs(model, example)
    width, tokens_, neurons = 8, 5, 12
    assert plain == 2 * tokens_ * (4 * width + 4 * width * width + 2 * width * neurons) + 2 * width * 5


def test_counting_does_not_train():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    macs(model, torch.randn(1, 3, 5, 5))
    assert int(model[1].num_batches_tracked) == 0
    assert model.training
