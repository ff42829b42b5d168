"""Implants: the closed form against a least-squares solver on materialised data, and merging to rounding."""

import pytest
import torch
from cases import SMALL, build
from torch import nn

from hap import HapError, couple, mask, merge, trace
from hap import apply as operate
from hap.implants import centre_tap, least_squares, zero
from hap.structure.groups import implantable
from hap.surgery.apply import Inputs
from hap.surgery.patch import Patch
from hap.testing import check_implant, random_plan

CONVS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "strided": lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(5, 7, 3, padding=2, dilation=2),
    "oblong": lambda: nn.Conv2d(5, 7, (5, 3), padding="same"),
    "1d": lambda: nn.Conv1d(5, 7, 3, padding=1),
}


def setting(name):
    torch.manual_seed(0)
    conv = CONVS[name]().double()
    x = torch.randn(6, 5, *[8] * (conv.weight.dim() - 2), dtype=torch.float64) + 0.3
    return conv, x


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("implant", [zero, centre_tap, least_squares])
def test_each_implant_writes_its_rows_at_their_places(name, implant):
    conv, x = setting(name)
    check_implant(implant, conv, x)


@pytest.mark.parametrize("name", CONVS)
def test_the_centre_tap_is_the_convolution_when_nothing_surrounds_it(name):
    """A convolution whose other taps are zero is its own implant; nothing else may be read."""
    conv, x = setting(name)
    centre = torch.zeros_like(conv.weight)
    middle = (slice(None), slice(None), *[k // 2 for k in conv.kernel_size])
    centre[middle] = conv.weight.detach()[middle]
    conv.weight.data = centre
    rows = torch.tensor([1, 4])
    made = centre_tap(conv, rows, Inputs(lambda: iter(()), torch.arange(5), True))
    assert torch.allclose(made(x), conv(x)[:, rows], atol=1e-12)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_least_squares_is_the_solution_of_the_stacked_problem(name, constant):
    """Against torch.linalg.lstsq on all positions of all images; the oracle shares only the centre's place."""
    conv, x = setting(name)
    rows, slots = torch.tensor([0, 3, 6]), torch.tensor([0, 2, 3])
    made = least_squares(conv, rows, Inputs(lambda: iter([x[:2], x[2:]]), slots, constant))
    steps = (slice(None), slots, *[slice(None, None, s) for s in conv.stride])
    z = x[steps].movedim(1, -1).reshape(-1, 3)
    z = torch.cat([z, torch.ones_like(z[:, :1])], 1) if constant else z
    y = conv(x)[:, rows].movedim(1, -1).reshape(-1, 3)
    solution = torch.linalg.lstsq(z, y).solution
    assert torch.allclose(made.weight.flatten(1), solution[:3].T, atol=1e-10)
    if constant:
        assert torch.allclose(made.bias, solution[3], atol=1e-10)
    tap = centre_tap(conv, rows, Inputs(lambda: iter(()), slots, constant))
    far, near = ((m(x[:, slots]) - conv(x)[:, rows]).square().sum() for m in (tap, made))
    assert near <= far


def test_least_squares_survives_dead_inputs_and_needs_data():
    conv, x = setting("3x3")
    x[:, 1] = 0
    made = least_squares(conv, torch.tensor([0]), Inputs(lambda: iter([x]), torch.arange(5), True))
    assert made.weight.isfinite().all()
    with pytest.raises(HapError, match="calibration batches expected, found none"):
        least_squares(conv, torch.tensor([0]), Inputs(lambda: iter(()), torch.arange(5), True))


def test_a_bias_moves_into_the_batchnorm_that_reads_it():
    """The sum of what is written, in eval mode, is what a biased implant would have written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(384, 2))
    model[1].running_var.uniform_(0.5, 2)
    model.double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1
    groups = couple(model, trace(model, x))
    chosen = random_plan(groups, torch.Generator().manual_seed(2), 0.3, 0.5)
    small = operate(model, groups, chosen, least_squares, batches=[x])
    patch, norm = small[0], small[1]
    assert isinstance(patch, Patch)
    assert patch.parts[1].bias is None
    rows = torch.tensor([i for i, c in enumerate(chosen.rows["0"]) if c == "o"])
    left = torch.tensor([i for i, c in enumerate(chosen.rows["0"]) if c != "-"])
    biased = least_squares(model[0], rows, Inputs(lambda: iter([x]), torch.arange(3), True))
    where = torch.searchsorted(left, rows)
    dense = model[1](torch.zeros(4, 6, 8, 8, dtype=torch.float64).index_copy(1, rows, biased(x)))[:, rows]
    assert torch.allclose(norm(patch(x))[:, where], dense, atol=1e-12)
    assert torch.equal(norm.running_mean[torch.searchsorted(left, left[~torch.isin(left, rows)])],
                       model[1].running_mean[left[~torch.isin(left, rows)]])  # fmt: skip


def test_without_a_bias_or_a_batchnorm_there_is_no_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(384, 2)).eval()
    x = torch.randn(4, 3, 8, 8)
    groups = couple(model, trace(model, x))
    small = operate(
        model, groups, random_plan(groups, torch.Generator().manual_seed(2), 0.3, 0.5), least_squares, batches=[x]
    )
    assert small[0].parts[1].bias is None


@pytest.mark.parametrize("name", ["preresnet", "option-a", "plain"])
def test_an_implant_merges_into_one_convolution(name):
    model, example = build(SMALL, name)
    model, example = model.double(), example.double()
    groups = couple(model, trace(model, example), "union")
    small = operate(model, groups, random_plan(groups, torch.Generator().manual_seed(4), 0.3, 0.4), centre_tap)
    merged = 0
    for patch in [m for m in small.modules() if isinstance(m, Patch)]:
        if not all(isinstance(part, nn.Conv2d) for part in patch.parts):
            continue
        x = torch.randn(2, patch.given, 6, 6, dtype=torch.float64)
        one = merge(patch)
        assert isinstance(one, nn.Conv2d)
        assert torch.allclose(one(x), patch(x), atol=1e-12)
        merged += 1
    assert merged


def test_merging_anything_else_is_refused():
    with pytest.raises(HapError, match="a Patch of convolutions expected, found Linear"):
        merge(nn.Linear(2, 2))


def test_an_implant_is_closer_to_the_dense_model_than_dropping():
    model, example = build(SMALL, "preresnet")
    groups = couple(model, trace(model, example), "union")
    chosen = random_plan(groups, torch.Generator().manual_seed(0), 0.0, 0.5)
    with torch.no_grad():
        dense = model(example)
        gaps = [
            (operate(model, groups, chosen, implant, batches=[example])(example) - dense).norm().item()
            for implant in (least_squares, zero)
        ]
        assert gaps[0] < gaps[1]
        assert torch.allclose(
            mask(model, groups, chosen)(example) - dense,
            operate(model, groups, chosen, zero)(example) - dense,
            atol=1e-5,
        )


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Softplus()])
def test_a_bias_does_not_move_past_what_stands_between(between):
    """The BatchNorm reads a function of the convolution, so it cannot take what the convolution lacks."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), between, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(384, 2)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(4, 3, 8, 8)
    groups = couple(model, trace(model, x))
    small = operate(
        model, groups, random_plan(groups, torch.Generator().manual_seed(2), 0.0, 0.9), least_squares, batches=[x]
    )
    assert torch.equal(small[2].running_mean, torch.zeros(6))
    assert small[0].parts[1].bias is None


def test_a_bias_that_nothing_can_take_is_refused():
    def biased(module, rows, inputs):
        return nn.Conv2d(len(inputs.slots), len(rows), 1)

    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(384, 2)).eval()
    groups = couple(model, trace(model, torch.randn(4, 3, 8, 8)))
    with pytest.raises(HapError, match="0: an implant without a bias expected"):
        operate(model, groups, random_plan(groups, torch.Generator().manual_seed(2), 0.3, 0.5), biased)


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_an_even_kernel_has_no_centre_and_gets_no_implant(kernel):
    assert not implantable(nn.Conv2d(3, 4, kernel, padding="same"))
    assert not implantable(nn.Conv2d(3, 4, 2, dilation=2, padding=1))


def test_calibration_batches_may_be_an_iterator():
    model, example = build(SMALL, "preresnet")
    groups = couple(model, trace(model, example), "union")
    chosen = random_plan(groups, torch.Generator().manual_seed(0), 0.2, 0.5)
    listed, streamed = (
        operate(model, groups, chosen, least_squares, batches=b).state_dict() for b in ([example], iter([example]))
    )
    assert all(torch.equal(listed[k], streamed[k]) for k in listed)


def test_an_implant_of_a_frozen_layer_is_frozen():
    model, example = build(SMALL, "preresnet")
    model.requires_grad_(False)
    groups = couple(model, trace(model, example), "union")
    small = operate(
        model, groups, random_plan(groups, torch.Generator().manual_seed(0)), least_squares, batches=[example]
    )
    assert not any(p.requires_grad for p in small.parameters())
