"""The module that surgery adds: the same numbers by each of its ways, and the memory format it was given."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import SMALL, build
from torch import nn

from hap import CrossEntropy, apply, couple, exact, trace
from hap.implants import centre_tap, least_squares
from hap.structure.bypass import Borrower, Lender, Relay
from hap.surgery.patch import Patch
from hap.testing import check_groups, random_plan

FORMATS = [torch.contiguous_format, torch.channels_last]


def patch(kind=nn.Conv2d):
    """Two parts that write five of seven rows, in no order, from three of four inputs."""
    torch.manual_seed(0)
    size = (3, 1) if kind is nn.Conv2d else ()
    wide = kind(3, 3, *size[:1], **({"padding": 1} if size else {}))
    parts = [wide, kind(3, 2, *size[1:])]
    axis = 1 if kind is nn.Conv2d else -1
    return Patch(parts, torch.tensor([5, 0, 3, 6, 1]), torch.tensor([0, 1, 3]), axis, 4, 7).double()


def by_hand(module, x):
    """Row by row, from the description alone."""
    taken = x.index_select(module.axis, module.take)
    rows = torch.cat([part(taken) for part in module.parts], module.axis).unbind(module.axis)
    out = [torch.zeros_like(rows[0]) for _ in range(module.width)]
    for place, row in zip(module.places.tolist(), rows, strict=True):
        out[place] = row
    return torch.stack(out, module.axis)


@pytest.mark.parametrize("form", FORMATS)
def test_a_patch_writes_each_row_in_its_place_and_keeps_the_format(form):
    module, x = patch(), torch.randn(2, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=form)
    found = module(x)
    torch.testing.assert_close(found, by_hand(module, x), rtol=1e-12, atol=1e-12)  # of the kernels, by layout
    assert found.is_contiguous(memory_format=form)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4)])
def test_a_patch_of_linear_layers_is_along_the_last_axis(shape):
    module, x = patch(nn.Linear), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMATS)
def test_the_gradients_of_a_patch_are_those_of_its_rows(form):
    module, x = patch(), torch.randn(2, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=form)
    weight = torch.randn(2, 7, 6, 5, dtype=torch.float64)
    own = [*module.parameters(), x.requires_grad_()]
    found = torch.autograd.grad((module(x) * weight).sum(), own)
    for a, b in zip(found, torch.autograd.grad((by_hand(module, x) * weight).sum(), own), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMATS)
def test_an_exported_patch_is_one_gather_of_the_same_numbers(form):
    module, x = patch(), torch.randn(2, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=form)
    program = torch.export.export(module, (x,))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.index_select.default" in ops
    assert not any("scatter" in op for op in ops)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMATS)
def test_surgery_keeps_the_memory_format_of_the_model_and_of_what_flows_through_it(form):
    model, example = build(SMALL, "option-b")
    model, example = model.to(memory_format=form), example.contiguous(memory_format=form)
    groups = couple(model, trace(model, example), "union")
    small = apply(model, groups, random_plan(groups, torch.Generator().manual_seed(3)), centre_tap)
    formats = []
    for module in small.modules():
        if isinstance(module, Patch):
            module.register_forward_hook(lambda _, __, y: formats.append(y.is_contiguous(memory_format=form)))
    small(example)
    assert len(formats) > 4
    assert all(formats)
    kernels = [p for p in small.parameters() if p.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=form) for kernel in kernels)


@pytest.mark.parametrize("form", FORMATS)
def test_curvature_of_a_pruned_model_is_still_exact(form):
    """The ways of a Patch are linear, and are known to be."""
    model, example = build(SMALL, "option-b")
    model, example = model.to(memory_format=form), example.contiguous(memory_format=form)
    groups = couple(model, trace(model, example), "union")
    small = apply(model, groups, random_plan(groups, torch.Generator().manual_seed(3)), centre_tap)
    assert any(isinstance(module, Patch) for module in small.modules())
    assert exact(small, CrossEntropy(), [(example, torch.tensor([1, 2]))]).kind == "exact Hessian diagonal"


def as_one_layer(patch, x):
    """What the function of a layer gives, called with what a Patch answers."""
    if hasattr(patch, "running_mean"):
        return F.batch_norm(x, patch.running_mean, patch.running_var, patch.weight, patch.bias, eps=patch.eps)
    if hasattr(patch, "in_features"):
        return F.linear(x, patch.weight, patch.bias)
    function = {3: F.conv1d, 4: F.conv2d}[x.dim()]
    how = (patch.stride, patch.padding, patch.dilation, patch.groups)
    return function(x, patch.weight, patch.bias, *how)


@pytest.mark.parametrize("implant", [centre_tap, least_squares])
@pytest.mark.parametrize("name", ["dense", "branches", "conv1d", "option-a", "option-b"])
def test_a_patch_answers_as_the_one_layer_that_computes_what_it_does(name, implant):
    """The oracle is the forward of the Patch; its shapes are those of a layer of that width."""
    model, example = build(SMALL, name)
    model, example = model.double(), example.double()
    groups = couple(model, trace(model, example), "union")
    compared = 0

    def compare(module, args, y):
        nonlocal compared
        x = args[0]
        channels = (x.shape[module.axis], y.shape[module.axis])
        if not hasattr(module, "running_mean") or (module.given, module.take.tolist()) == (
            module.width,
            module.places.tolist(),
        ):  # a BatchNorm reads as many channels as it writes
            torch.testing.assert_close(as_one_layer(module, x), y, rtol=1e-10, atol=1e-10)
            compared += 1
        for size, width in zip(("in_channels", "out_channels"), channels, strict=True):
            assert getattr(module, size, width) == width
        assert module.weight.shape[0] == channels[1]
        assert module.weight.dtype == torch.float64

    for seed in range(4):
        small = apply(model, groups, random_plan(groups, seeded(seed), 0.3, 0.3), implant, batches=[example])
        for module in small.modules():
            if isinstance(module, Patch):
                module.register_forward_hook(compare)
        small(example)
    assert compared


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_grouped_convolution_answers_with_its_groups_where_they_are_whole_and_else_as_one():
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=2).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    whole = Patch([conv], torch.tensor([4, 5, 6, 7, 12, 13, 14, 15]), torch.tensor([2, 3, 6, 7]), 1, 8, 16)
    torn = Patch([conv], torch.arange(1, 9), torch.tensor([0, 2, 3, 7]), 1, 8, 10)
    assert (whole.groups, whole.weight.shape) == (4, (16, 2, 3, 3))
    assert (torn.groups, torn.weight.shape) == (1, (10, 8, 3, 3))
    for patched in (whole, torn):
        torch.testing.assert_close(as_one_layer(patched, x), patched(x))


def test_the_weight_that_a_patch_answers_with_passes_gradients_and_is_no_parameter():
    module, x = patch(), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    own = list(module.parameters())
    found = torch.autograd.grad(as_one_layer(module, x).square().sum(), own)
    for a, b in zip(found, torch.autograd.grad(module(x).square().sum(), own), strict=True):
        torch.testing.assert_close(a, b)
    assert (
        names
        == [name for name, _ in module.named_parameters()]
        == [f"parts.{i}.{own}" for i in "01" for own in ("weight", "bias")]
    )
    assert set(module.state_dict()) == {*names, "places", "take"}


def test_a_patch_has_no_attribute_that_the_layer_has_not():
    for name in ("in_features", "running_mean", "nothing", "_stride"):
        with pytest.raises(AttributeError, match=f"'Patch' object has no attribute '{name}'"):
            getattr(patch(), name)
    with pytest.raises(AttributeError, match="in_channels"):
        patch(nn.Linear).in_channels  # noqa: B018
    empty = Patch.__new__(Patch)
    with pytest.raises(AttributeError):
        empty.weight  # noqa: B018


def test_an_implant_that_is_no_such_layer_has_nan_for_its_weights():
    parts = [nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())]
    module = Patch(parts, torch.tensor([5, 0, 3, 6, 1]), torch.tensor([0, 1, 3]), 1, 4, 7)
    assert module.weight.isnan().flatten(1).all(1).tolist() == [False, True, False, False, False, False, True]
    assert module.bias.isnan().tolist() == [False, True, False, False, False, False, True]
    strided = Patch([parts[0], nn.Conv2d(3, 2, 1, stride=2)], module.places, module.take, 1, 4, 7)
    assert strided.weight[6].isnan().all()


class Reading(nn.Module):
    """A forward pass that reads what its layers are."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.norm, self.fc, self.last = nn.BatchNorm2d(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype)).relu()
        left = self.left(x) * (self.left.weight.shape[0] / self.left.out_channels) * self.left.stride[0]
        y = (left + self.right(x).view(len(x), self.right.out_channels, *x.shape[2:])).relu()
        y = y.new_zeros(len(y), self.norm.num_features, *y.shape[2:]) + self.norm(y)
        y = y.mean((2, 3)).view(-1, self.fc.in_features)
        return self.last(self.fc(y).view(-1, self.last.in_features).relu() * (self.right.kernel_size[0] - 2))


@pytest.mark.parametrize("how", ["tied", "union"])
def test_a_forward_that_reads_its_layers_runs_pruned(how, tmp_path):
    torch.manual_seed(0)
    model, x = Reading().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    groups = couple(model, trace(model, x), how)
    check_groups(model, x, groups, tolerance=1e-12)
    small = apply(model, groups, random_plan(groups, seeded(1)), centre_tap)
    assert how == "tied" or isinstance(small.right, Patch)
    expected = small(x)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.export.export(small, (x,)).module()):
        torch.testing.assert_close(again(x), expected, rtol=1e-12, atol=1e-12)


def test_a_forward_that_reads_its_layers_compiles_pruned(unchecked):
    """Without checks of types, which a compiler cannot see through."""
    torch.manual_seed(0)
    model, x = Reading().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    groups = couple(model, trace(model, x), "union")
    small = apply(model, groups, random_plan(groups, seeded(1)), centre_tap)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-12, atol=1e-12)


def test_what_stands_around_heads_answers_as_its_layer():
    relay, x = Relay("out"), torch.randn(2, 5, 4)
    lender, borrower = Lender(nn.Linear(4, 6), relay), Borrower(nn.Linear(6, 3), nn.Linear(4, 3), relay)
    lender(x), borrower(torch.randn(2, 5, 6))
    for module in (lender, borrower, copy.deepcopy(lender), pickle.loads(pickle.dumps(borrower))):
        assert module.in_features == module.layer.in_features
        assert module.weight is module.layer.weight
        assert module.bias.shape == (module.out_features,)
        with pytest.raises(AttributeError, match="kernel_size"):
            module.kernel_size  # noqa: B018
    assert [name for name, _ in lender.named_parameters()] == ["layer.weight", "layer.bias"]
    with pytest.raises(AttributeError):
        Lender.__new__(Lender).weight  # noqa: B018
