"""The module that surgery adds: the same numbers by each of its ways, and the memory format it was given."""

import pytest
import torch
from cases import SMALL, build
from torch import nn

from hap import CrossEntropy, apply, couple, exact, trace
from hap.implants import centre_tap
from hap.surgery.patch import Patch
from hap.testing import random_plan

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
