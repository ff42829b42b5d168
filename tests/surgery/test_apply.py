"""Surgery against its oracle: a masked model of full size computes what the smaller one does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import FROZEN_NORMS, OPAQUE, REAL, SMALL, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hap import Budget, Fate, HapError, Plan, couple, mask, trace
from hap import apply as operate
from hap.cost import macs, params
from hap.implants import centre_tap, least_squares, zero
from hap.plan import cost, plan
from hap.structure.layers import forward
from hap.surgery.patch import Patch
from hap.testing import check_groups, random_plan


def logits(model, example):
    with torch.no_grad():
        found = forward(model, example)
    return found if isinstance(found, torch.Tensor) else found.logits


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", REAL)
def test_surgery_is_masking_on_real_architectures(name, how):
    """The oracle zeroes channels in the dense model; it cannot see an error in which channels a plan names."""
    model, example = build(REAL, name)
    groups = couple(model, trace(model, example), how)
    rng = torch.Generator().manual_seed(7)
    for drop, implant in ((0.3, 0.0), (0.5, 0.3)):
        chosen = random_plan(groups, rng, drop, implant)
        small, oracle = operate(model, groups, chosen, zero), mask(model, groups, chosen)
        found, expected = logits(small, example), logits(oracle, example)
        assert gap(found, expected) < 1e-4
        left = cost(groups, chosen.fates(groups))
        assert left.params == params(small) < params(model)
        one = {k: v[:1] for k, v in example.items()} if isinstance(example, dict) else example[:1]
        if name != "bert":  # its matrix products inside attention are not of weights, and are not counted
            assert left.macs == macs(small, one) < macs(model, one)


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", SMALL)
def test_surgery_is_masking_on_every_small_case(name, how):
    model, example = build(SMALL, name)
    model, example = model.double(), example.double()
    groups = couple(model, trace(model, example), how)
    check_groups(model, example, groups, trials=6, tolerance=1e-12)


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", FROZEN_NORMS)
def test_what_freezes_a_norm_freezes_the_rows_that_feed_it(name, how):
    """In float64; the oracle cannot see that more rows than needed are frozen, so the free layer is counted."""
    model, example = build(FROZEN_NORMS, name)
    model, example = model.double(), example.double()
    groups = couple(model, trace(model, example, opaque=OPAQUE.get(name, [])), how)
    check_groups(model, example, groups, trials=6, tolerance=1e-12)
    assert len(groups) == groups.shapes[groups.feeds.modules[0]].rows  # of the first layer, no norm behind it
    small = operate(model, groups, random_plan(groups, torch.Generator().manual_seed(1), 0.5, 0.0))
    assert logits(small, example).shape == logits(model, example).shape


class Random(nn.Module):
    """A residual network drawn at random: widths, kernels, strides, groups, norms, joins and activations."""

    def __init__(self, draw) -> None:
        super().__init__()
        width = draw(st.integers(2, 5)) * 2
        self.stem = nn.Conv2d(3, width, draw(st.sampled_from([1, 3])), padding="same", bias=draw(st.booleans()))
        self.blocks, self.joins, self.acts = nn.ModuleList(), [], []
        for _ in range(draw(st.integers(1, 3))):
            inner, join = draw(st.integers(1, 6)), draw(st.sampled_from(["add", "cat", "gate", "none"]))
            norm = nn.BatchNorm2d if draw(st.booleans()) else nn.Identity
            outer = width if join != "cat" else draw(st.integers(1, 4))
            first = nn.Conv2d(width, inner, 3, padding=1, bias=draw(st.booleans()))
            depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner) if draw(st.booleans()) else nn.Identity()
            last = nn.Conv2d(inner, outer, draw(st.sampled_from([1, 3])), padding="same", bias=draw(st.booleans()))
            self.blocks.append(nn.Sequential(norm(width), first, norm(inner), nn.ReLU(), depth, last, norm(outer)))
            self.joins.append(join)
            self.acts.append(draw(st.sampled_from([F.relu, torch.sigmoid, F.silu])))
            width += outer if join == "cat" else 0
        self.size = draw(st.integers(1, 2))
        self.fc = nn.Linear(width * self.size**2, 3)

    def forward(self, x):
        x = self.stem(x)
        for block, join, act in zip(self.blocks, self.joins, self.acts, strict=True):
            y = act(block(x))
            x = {"add": lambda x, y: x + y, "gate": torch.mul, "none": lambda x, y: y}.get(
                join, lambda x, y: torch.cat([x, y], 1)
            )(x, y)
        return self.fc(F.adaptive_avg_pool2d(x, self.size).flatten(1))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_surgery_is_masking_on_random_architectures_and_plans(data):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.draw(st.integers(0, 99)))
        model = Random(data.draw).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.bias)
    model.eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = couple(model, trace(model, x), data.draw(st.sampled_from(["tied", "union"])))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    chosen = random_plan(groups, rng, data.draw(st.floats(0, 0.9)), data.draw(st.floats(0, 0.1)))
    small = operate(model, groups, chosen, zero)
    assert torch.allclose(logits(small, x), logits(mask(model, groups, chosen), x), atol=1e-10)
    left = cost(groups, chosen.fates(groups))
    assert (left.params, left.macs) == (params(small), macs(small, x[:1]))


@pytest.mark.parametrize("name", ["preresnet", "option-a", "option-b", "plain"])
def test_zero_implants_are_the_mask_to_the_last_bit_of_their_rows(name):
    """In float64, so that only the order of summation differs."""
    model, example = build(SMALL, name)
    model, example = model.double(), example.double()
    groups = couple(model, trace(model, example), "union")
    chosen = random_plan(groups, torch.Generator().manual_seed(1), 0.0, 0.5)
    small, oracle = operate(model, groups, chosen, zero), mask(model, groups, chosen)
    assert any(isinstance(m, Patch) for m in small.modules())
    assert torch.allclose(logits(small, example), logits(oracle, example), rtol=1e-13, atol=1e-13)


def test_tied_surgery_leaves_ordinary_modules_only():
    model, example = build(SMALL, "option-b")
    groups = couple(model, trace(model, example), "tied")
    small = operate(model, groups, random_plan(groups, torch.Generator().manual_seed(0), 0.5, 0.0))
    assert {type(m) for m in small.modules()} == {type(m) for m in model.modules()}


def test_a_batchnorm_that_only_dropped_rows_feed_is_narrowed_under_union():
    model, example = build(SMALL, "option-b")
    groups = couple(model, trace(model, example), "union")
    everything = {name: "#" * s.rows for name, s in groups.shapes.items() if s.mixing}
    small = operate(model, groups, Plan({**everything, "layer1.0.conv2": "-##-"}))
    conv, norm = small.get_submodule("layer1.0.conv2"), small.get_submodule("layer1.0.bn2")
    assert conv.out_channels == 2  # not scattered before the norm
    assert isinstance(norm, Patch)
    assert norm.parts[0].num_features == 2
    assert norm.places.tolist() == [1, 2]  # the stem still writes all four channels of the stream
    assert small.get_submodule("layer1.0.bn1").num_features == 4


def test_a_surgery_does_not_touch_the_dense_model_and_keeps_its_mode():
    model, example = build(SMALL, "preresnet")
    groups = couple(model, trace(model, example), "union")
    before = copy.deepcopy(model.state_dict())
    model.train()
    chosen = random_plan(groups, torch.Generator().manual_seed(0))
    small = operate(model, groups, chosen, least_squares, batches=[example])
    assert small.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    loss = forward(small, example).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_state_dict_fits_a_second_surgery():
    model, example = build(SMALL, "option-a")
    groups = couple(model, trace(model, example), "union")
    chosen = random_plan(groups, torch.Generator().manual_seed(0))
    first = operate(model, groups, chosen, centre_tap)
    second = operate(build(SMALL, "option-a")[0], groups, chosen, zero)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first, example), logits(second, example))


def test_what_is_made_under_inference_mode_can_be_trained():
    model, example = build(SMALL, "preresnet")
    groups = couple(model, trace(model, example), "union")
    with torch.inference_mode():
        small = operate(model, groups, random_plan(groups, torch.Generator().manual_seed(0)), zero)
    forward(small, example).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_model_that_cannot_be_copied_is_said_to():
    model, example = build(SMALL, "mlp")
    groups = couple(model, trace(model, example))
    model.seen = model(example)  # a tensor with a history
    for make in (operate, mask):
        with pytest.raises(HapError, match=r"apply: Sequential cannot be copied .*; take off what wraps it, or drop"):
            make(model, groups, random_plan(groups, torch.Generator().manual_seed(0), 0.5, 0.0))


def test_pruning_twice_is_possible():
    model, example = build(SMALL, "preresnet")
    for seed in range(2):
        groups = couple(model, trace(model, example), "tied")
        scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed))
        model = operate(model, groups, plan(groups, scores, Budget(params=0.3)))
    assert logits(model, example).isfinite().all()


def all_but(groups, module):
    """A plan that drops every prunable row of one module."""
    shape = groups.shapes[module]
    of = groups.row_group[shape.first_row : shape.first_row + shape.rows]
    fates = torch.full((len(groups),), int(Fate.KEEP)).index_fill_(0, of[of >= 0], int(Fate.DROP))
    return Plan.of(groups, fates)


@pytest.mark.parametrize(("name", "module"), [("attention", "v"), ("attention", "up"), ("mlp", "0"), ("plain", "6")])
def test_a_linear_layer_may_lose_every_row(name, module):
    """No budget asks for it, a plan may: a block may lose all heads, and what read the layer reads nothing."""
    model, example = build(SMALL, name)
    groups = couple(model, trace(model, example), "union")
    chosen = all_but(groups, module)
    small = operate(model, groups, chosen)
    assert small.get_submodule(module).out_features == 0
    assert torch.allclose(logits(small, example), logits(mask(model, groups, chosen), example), atol=1e-5)


@pytest.mark.parametrize("module", ["0", "3"])
def test_a_convolution_may_not(module):
    model, example = build(SMALL, "plain")
    groups = couple(model, trace(model, example), "union")
    with pytest.raises(HapError, match=f"{module}: a Conv2d must keep a row and an input"):
        operate(model, groups, all_but(groups, module))


def test_a_patched_model_is_not_pruned_again():
    model, example = build(SMALL, "option-b")
    groups = couple(model, trace(model, example), "union")
    small = operate(model, groups, random_plan(groups, torch.Generator().manual_seed(0)), zero)
    with pytest.raises(HapError, match="a Patch, so the model was pruned before"):
        trace(small, example)


def test_a_plan_with_implants_needs_one():
    model, example = build(SMALL, "preresnet")
    groups = couple(model, trace(model, example), "union")
    with pytest.raises(HapError, match="so apply\\(\\) needs an implant"):
        operate(model, groups, random_plan(groups, torch.Generator().manual_seed(0)))


def test_a_module_of_two_names_is_replaced_under_both():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
            self.c = self.b

        def forward(self, x):
            return self.fc(self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(2, 3, 6, 6)
    for how in ("tied", "union"):
        check_groups(model, x, couple(model, trace(model, x), how))


def test_a_module_called_by_keyword_is_pruned_like_another():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(input=self.b(input=F.relu(self.a(input=x))).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(2, 3, 6, 6)
    groups = couple(model, trace(model, x), "union")
    check_groups(model, x, groups)
    operate(model, groups, random_plan(groups, torch.Generator().manual_seed(0)), least_squares, batches=[x])


def test_each_module_keeps_its_own_mode():
    model, example = build(SMALL, "option-b")
    model.train()
    model.bn1.eval()
    groups = couple(model, trace(model, example), "union")
    small = operate(model, groups, random_plan(groups, torch.Generator().manual_seed(0), 0.5, 0.0))
    assert small.training
    assert not small.bn1.training
    assert small.layer1[0].bn1.training
