"""Curvature against the dense Hessian in float64, an independent Gauss-Newton matrix, and curvlinops.

All of these come from autograd, so none can see a point where a rectifier or a maximum has a kink: there a second
derivative is taken to be zero, by them and by us.
"""

import gc
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import SMALL, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from hap import CrossEntropy, HapError, couple, exact, hutchinson, trace
from hap.hessian import persample
from hap.hessian.accumulate import merge
from hap.hessian.linearity import piecewise_linear, sources
from hap.hessian.losses import SquaredError
from hap.hessian.persample import positions, squared_gradients
from hap.structure.layers import is_mixing

STRAIGHT = [name for name in SMALL if name not in ("gated", "attention")]
DEEP = ("preresnet", "option-a", "option-b")  # their dense Hessians take seconds
CURVED = {
    "gelu": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
    "sigmoid": lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(9, 3)),
    "layernorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)),
    "softmax": lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 3)),
    "attention": SMALL["attention"][0],
    "gated": SMALL["gated"][0],
}
INPUTS = {"sigmoid": (2, 5), "attention": (5, 4), "gated": (3, 8, 8)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(name, samples=5):
    """A small case in float64, and a batch with targets."""
    model, example = build(SMALL, name)
    model = model.double()
    x = torch.randn(samples, *example.shape[1:], dtype=torch.float64, generator=seeded(3))
    classes = model(x).shape[1]
    return model, (x, torch.randint(0, classes, (samples,), generator=seeded(4)))


def losses(name, batch, model):
    """The loss of that name, and the batch with targets for it."""
    classes = model(batch[0]).shape[1]
    if name == "squared":
        return SquaredError(), (batch[0], torch.randn(len(batch[0]), classes, dtype=torch.float64, generator=seeded()))
    weight = torch.linspace(0.2, 2, classes, dtype=torch.float64)
    return (CrossEntropy() if name == "plain" else CrossEntropy(label_smoothing=0.1, weight=weight)), batch


def dense(model, loss, batch, name):
    """The Hessian of the mean loss in one weight tensor."""
    weight = model.get_parameter(name).detach()

    def mean(value):
        outputs = functional_call(model, {name: value}, (batch[0],))
        return loss.total(outputs, batch[1]) / loss.mass(batch[1])

    hessian = torch.autograd.functional.hessian(mean, weight, vectorize=True)
    return hessian.reshape(weight.numel(), weight.numel())


def gap(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("name", "how"),
    [(n, how) for n in STRAIGHT for how in ("plain", "both", "squared") if how != "both" or n not in DEEP],
)
def test_exact_is_the_diagonal_of_the_dense_hessian(name, how):
    """To 1e-10 of the largest entry of each weight; entries ten orders below it may be wrong."""
    model, batch = case(name)
    loss, batch = losses(how, batch, model)
    found = exact(model, loss, [batch])
    assert found.kind == "exact Hessian diagonal"
    assert set(found.diagonal) == {f"{n}.weight" for n, m in model.named_modules() if is_mixing(m)}
    for weight, value in found.diagonal.items():
        expected = dense(model, loss, batch, weight).diagonal().reshape(value.shape)
        assert gap(value, expected) < 1e-10, weight
        assert (found.stderr[weight] == 0).all()


@pytest.mark.parametrize("name", ["residual", "branches", "sequence", "option-b", "mlp"])
def test_biases_and_the_affine_weights_of_batchnorm_are_exact_too(name):
    """Against the dense Hessian; parameters of other modules would be refused."""
    model, batch = case(name)
    for module in model.modules():  # scales of one and shifts of zero would hide mistakes
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    found = exact(model, CrossEntropy(), [batch], of="parameters")
    assert found.kind == "exact Hessian diagonal"
    assert set(found.diagonal) == {n for n, _ in model.named_parameters()}
    weights = exact(model, CrossEntropy(), [batch])
    for parameter, value in found.diagonal.items():
        if name == "option-b" and value.dim() > 1:
            assert torch.allclose(value, weights.diagonal[parameter], rtol=1e-9, atol=1e-15)
        else:
            expected = dense(model, CrossEntropy(), batch, parameter).diagonal().reshape(value.shape)
            assert gap(value, expected) < 1e-10, parameter


@pytest.mark.parametrize("columns", [None, 1])
@pytest.mark.parametrize(
    ("name", "of"),
    [(n, "weights") for n in ("residual", "tokens", "attention")]
    + [(n, "parameters") for n in ("residual", "depthwise", "sequence")],
)
def test_a_row_is_the_sum_of_its_weights(name, columns, of):
    model, batch = case(name)
    groups = couple(model, trace(model, batch[0]))
    one, other = (
        exact(model, CrossEntropy(), [batch], groups, columns=columns, of=of, per=per, rng=seeded())
        for per in ("weight", "row")
    )
    for parameter, value in one.diagonal.items():
        rows = value if value.dim() == 1 else value.flatten(1).sum(1)
        assert torch.allclose(other.diagonal[parameter], rows, rtol=1e-9, atol=1e-14)
    assert torch.allclose(one.trace, other.trace, rtol=1e-9)
    assert torch.allclose(one.trace_stderr, other.trace_stderr, rtol=1e-9)
    assert math.isclose(one.drawn, other.drawn, rel_tol=1e-9)
    assert math.isclose(one.drawn_stderr, other.drawn_stderr, rel_tol=1e-9)
    weights = exact(model, CrossEntropy(), [batch], groups, columns=columns, rng=seeded())
    assert torch.allclose(one.trace, weights.trace, rtol=1e-9)  # groups count weights alone


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_columns_are_chosen_so_that_little_is_drawn(share):
    """On logits of a trained scale; where they are flat, shares in weights and in outputs can differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20)).double()
    model[2].weight.data *= 20
    batch = torch.randn(200, 12, dtype=torch.float64), torch.randint(0, 20, (200,))
    found = exact(model, CrossEntropy(), [batch], share=share, rng=seeded())
    whole = exact(model, CrossEntropy(), [batch])
    assert 0 < found.drawn <= share
    assert found.backwards < whole.backwards
    total, truth = (sum(float(v.sum()) for v in f.diagonal.values()) for f in (found, whole))
    assert abs(total / truth - 1) < 4 * found.drawn_stderr + 1e-9
    assert found.drawn_stderr < found.drawn


def test_a_share_that_is_not_kept_is_warned_of():
    class Loose(CrossEntropy):
        def enough(self, outputs, targets, share):
            return 0

    model, batch = case("mlp", samples=30)
    with pytest.warns(UserWarning, match=r"exact: 1 of the trace was drawn, not 0.1; give columns"):
        exact(model, Loose(), [batch], share=0.1, rng=seeded())


@pytest.mark.parametrize("measure", [partial(exact, columns=1), partial(hutchinson, probes=5)])
@pytest.mark.parametrize("weighted", [True, False])
def test_shards_add_up_to_the_whole(measure, weighted):
    """As processes would do it: each draws for its own samples, here from one generator in turn."""
    model, (x, y) = case("residual", samples=9)
    groups = couple(model, trace(model, x))
    loss = CrossEntropy(weight=torch.linspace(0.5, 2, 5, dtype=torch.float64) if weighted else None)
    parts = list(zip(x.split((2, 4, 3)), y.split((2, 4, 3)), strict=True))
    rng, other = seeded(), seeded()
    found = merge([measure(model, loss, [part], groups, rng=rng) for part in parts])
    whole = measure(model, loss, parts, groups, rng=other)
    for name in whole.diagonal:
        assert torch.allclose(found.diagonal[name], whole.diagonal[name], rtol=1e-10, atol=1e-15)
        assert torch.allclose(found.stderr[name], whole.stderr[name], rtol=1e-10, atol=1e-15)
    for field in ("trace", "trace_stderr") + (("halves",) if whole.halves is not None else ()):
        assert torch.allclose(getattr(found, field), getattr(whole, field), rtol=1e-5)
    for field in ("drawn", "drawn_stderr", "mass", "samples", "backwards", "probes"):
        assert getattr(found, field) == pytest.approx(getattr(whole, field), rel=1e-9)
    assert found.kind == whole.kind


def test_shards_of_different_measurements_do_not_add_up():
    model, batch = case("mlp")
    one, two = exact(model, CrossEntropy(), [batch]), hutchinson(model, CrossEntropy(), [batch], probes=2, rng=seeded())
    with pytest.raises(HapError, match=r"merge: shards of one measurement expected, found 1 sets of names, \["):
        merge([one, two])


def test_a_module_that_is_not_known_can_be_left_to_probes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2, 1, 3, 3)), nn.Conv3d(2, 4, (1, 2, 2)), nn.ReLU(), nn.Flatten(),
                          nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).double()  # fmt: skip
    batch = torch.randn(20, 18, dtype=torch.float64), torch.randint(0, 3, (20,), generator=seeded())
    with pytest.raises(HapError, match=r"1 \(Conv3d\) is not known; .* are; unknown=PROBES leaves it to probes"):
        exact(model, CrossEntropy(), [batch])
    with pytest.raises(HapError, match="a generator expected for the probes"):
        exact(model, CrossEntropy(), [batch], unknown=2)
    for per in ("weight", "row"):
        found = exact(model, CrossEntropy(), iter([batch]), unknown=150, rng=seeded(), per=per)
        assert found.estimated == ("1.weight",)
        assert found.kind == "exact Hessian diagonal"
        for name in ("1.weight", "4.weight", "6.weight"):
            truth = dense(model, CrossEntropy(), batch, name).diagonal().reshape(len(model.get_parameter(name)), -1)
            truth = truth.sum(1) if per == "row" else truth
            error = found.stderr[name].reshape(truth.shape)
            close = (found.diagonal[name].reshape(truth.shape) - truth).abs()
            assert (close <= 5 * error + 1e-12).all()
            assert bool((error > 0).all()) == (name == "1.weight")


def test_a_module_with_parameters_of_its_own_is_refused_when_all_are_wanted(unchecked):
    model, batch = case("attention")
    with pytest.raises(HapError, match=r"curvature:  \(Attention\) is not known"):
        exact(model, CrossEntropy(), [batch], of="parameters")
    with pytest.raises(HapError, match="of 'weights', 'parameters' or a list of names expected, found 'biases'"):
        exact(model, CrossEntropy(), [batch], of="biases")


@pytest.mark.parametrize("measure", ["exact", "hutchinson"])
def test_nothing_is_left_in_memory(measure):
    """Softmax, sigmoid and ReLU save what they wrote: a cycle through it is one that Python cannot free."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 5), nn.Softmax(-1), nn.Linear(5, 3))
    batch = (torch.randn(6, 4), torch.randint(3, (6,)))

    def left():
        rng = torch.Generator().manual_seed(0)
        if measure == "exact":
            exact(model, CrossEntropy(), [batch])
        else:
            hutchinson(model, CrossEntropy(), [batch], probes=2, rng=rng)
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    counts = [left() for _ in range(5)]
    assert any(later <= earlier for earlier, later in pairwise(counts))  # what leaks leaks every time


def test_nothing_is_read_back_from_the_device_within_the_loop():
    """By the ops that would wait for a GPU; what a backend does by itself it cannot see."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            masked = name.startswith("index") and any(
                isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in torch.utils._pytree.tree_leaves(args)
            )
            if masked or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select"):
                waited.append(name)
            return function(*args, **(kwargs or {}))

    model, (x, y) = case("residual", samples=8)
    groups, waited, counts = couple(model, trace(model, x)), [], []
    for samples in (4, 8):
        batches = [(x[i : i + 1], y[i : i + 1]) for i in range(samples)]
        waited.clear()
        with Watch():
            exact(model, CrossEntropy(), batches, groups, columns=1, rng=seeded())
        counts.append(len(waited))
    assert counts[0] == counts[1]  # only before and after


@pytest.mark.parametrize("name", ["residual", "option-a", "tokens"])
def test_passes_in_half_precision_are_near(name):
    """bfloat16 has 8 bits; float32 sums keep the error of a row near that of one product."""
    model, (x, y) = case(name, samples=16)
    model, x = model.float(), x.float()
    whole = exact(model, CrossEntropy(), [(x, y)], per="row")
    found = exact(model, CrossEntropy(), [(x, y)], per="row", autocast=torch.bfloat16)
    for parameter, value in whole.diagonal.items():
        assert found.diagonal[parameter].dtype == torch.float32
        assert not torch.equal(found.diagonal[parameter], value)
        assert gap(found.diagonal[parameter], value) < 0.1


def test_a_layer_that_reaches_nothing_has_no_curvature():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.off = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(2, 2)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    batch = (torch.randn(5, 3), torch.randint(0, 4, (5,)))
    found = exact(Idle(), CrossEntropy(), [batch, batch])
    assert (found.diagonal["idle.weight"] == 0).all()
    assert (found.diagonal["used.weight"] > 0).any()
    assert set(found.diagonal) == {"used.weight", "idle.weight"}
    guessed = hutchinson(Idle(), CrossEntropy(), [batch], probes=2, rng=seeded())
    assert (guessed.diagonal["off.weight"] == 0).all()


def test_a_layer_that_only_some_chunks_reach_keeps_nothing_of_the_others():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.other = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            y = self.other(x)
            return self.always(x) + (y if float(x.detach().sum()) > 0 else 0)

    torch.manual_seed(0)
    model, x = Sometimes().double(), torch.rand(4, 3, dtype=torch.float64)
    on, off = (x, torch.randint(0, 4, (4,))), (-x, torch.randint(0, 4, (4,)))
    alone, both = exact(model, CrossEntropy(), [on]), exact(model, CrossEntropy(), [on, off])
    assert torch.allclose(both.diagonal["other.weight"], alone.diagonal["other.weight"] / 2)


def test_a_pass_to_the_sources_passes_all():
    x = torch.randn(3, requires_grad=True)
    a, b = x * 2, x * 3
    c, d = a + b, b.relu()
    nodes = [t.grad_fn for t in (a, b, c, d)]
    assert set(sources(c * d, nodes)) == {a.grad_fn, b.grad_fn}
    assert sources(a.exp(), [c.grad_fn]) == []


@pytest.mark.parametrize("name", CURVED)
def test_elsewhere_it_is_the_gauss_newton_diagonal_and_says_so(name):
    """Against J^T H J from per-sample Jacobians, which know nothing of layers."""
    torch.manual_seed(1)
    model = CURVED[name]().double().eval()
    shape = INPUTS.get(name, (4,))
    x, y = torch.randn(4, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = exact(model, CrossEntropy(), [(x, y)], of="parameters" if name in ("layernorm", "gelu") else "weights")
    assert found.kind == "Gauss-Newton diagonal"
    p = model(x).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    for weight, value in found.diagonal.items():
        value_of = partial(lambda w, v: functional_call(model, {w: v}, (x,)), weight)
        jacobian = torch.autograd.functional.jacobian(value_of, model.get_parameter(weight).detach())
        expected = torch.einsum("nia,nij,nja->a", *(jacobian.flatten(2), hessian, jacobian.flatten(2))) / len(x)
        assert gap(value, expected.detach().reshape(value.shape)) < 1e-10, weight


OPS = {
    "a rectifier": (F.relu, True),
    "a residual sum": (lambda x: x + F.relu(x), True),
    "a constant factor": (lambda x: 3 * x / 7, True),
    "a maximum over positions": (lambda x: F.max_pool1d(x[:, None], 2).flatten(1), True),
    "the mean of some": (lambda x: torch.cat([x[:, ::2], x.mean(1, keepdim=True).expand(-1, 2)], 1), True),
    "gelu": (F.gelu, False),
    "sigmoid": (torch.sigmoid, False),
    "softmax": (lambda x: x.softmax(1), False),
    "a square": (lambda x: x * x, False),
    "a power": (lambda x: x**2, False),
    "a product of two": (lambda x: x[:, :4] * x[:, 4:], False),
    "a Gram matrix": (lambda x: x @ x.T, False),
    "a product of three axes": (lambda x: (x[:, :, None] @ x[:, None]).flatten(1), False),
    "one by it": (lambda x: 1 / (1 + F.relu(x)), False),
    "a tensor by it": (lambda x: torch.ones(8) / (1 + F.relu(x)), False),
    "itself by a sum": (lambda x: x / (1 + x.abs().sum(1, keepdim=True)), False),
    "a kernel made of data": (lambda x: F.conv1d(x[:, None], x[:1, None, :3]).flatten(1), False),
    "instance normalisation": (lambda x: F.instance_norm(x[:, None]).flatten(1), False),
    "normalisation by the batch": (lambda x: F.batch_norm(x, None, None, training=True), False),
}


@pytest.mark.parametrize(("op", "straight"), OPS.values(), ids=OPS)
def test_what_is_piecewise_linear_is_told_from_what_is_not(op, straight):
    outputs = op(nn.Linear(3, 8)(torch.randn(5, 3)))
    assert piecewise_linear(outputs) == straight


def test_batches_and_chunks_do_not_matter():
    model, (x, y) = case("residual", samples=9)
    loss = CrossEntropy(label_smoothing=0.1, weight=torch.linspace(0.5, 2, 5, dtype=torch.float64))
    whole = exact(model, loss, [(x, y)])
    for parts, memory in (((2, 7), None), ((4, 1, 4), 2**17), ((9,), 1)):
        found = exact(model, loss, list(zip(x.split(parts), y.split(parts), strict=True)), memory=memory)
        assert found.samples == 9
        assert (found.forwards, found.backwards) == (1, 4)
        for name, value in whole.diagonal.items():
            assert torch.allclose(found.diagonal[name], value, rtol=1e-12, atol=1e-15)


def test_a_batch_twice_or_in_another_order_is_the_same_mean():
    model, (x, y) = case("residual", samples=6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    whole = exact(model, CrossEntropy(), [(x, y)])
    for batches in ([(x, y), (x, y)], [(x[order], y[order])]):
        found = exact(model, CrossEntropy(), batches)
        assert all(torch.allclose(found.diagonal[n], v, rtol=1e-12, atol=1e-15) for n, v in whole.diagonal.items())


def test_only_ratios_of_class_weights_matter():
    model, batch = case("mlp")
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    one, ten = (exact(model, CrossEntropy(weight=scale * weight), [batch]) for scale in (1, 10))
    assert all(torch.allclose(ten.diagonal[n], v, rtol=1e-12, atol=0) for n, v in one.diagonal.items())


def test_groups_get_the_sum_of_their_weights():
    model, batch = case("residual")
    groups = couple(model, trace(model, batch[0]))
    found = exact(model, CrossEntropy(), [batch], groups)
    assert torch.allclose(found.trace, groups.reduce(found.diagonal), rtol=1e-12)
    assert (found.trace_stderr == 0).all()
    assert exact(model, CrossEntropy(), [batch]).trace is None


@pytest.mark.parametrize("columns", [3, 4, 40])
def test_columns_for_all_classes_but_two_are_all(columns):
    model, batch = case("mlp")
    whole, found = (exact(model, CrossEntropy(), [batch], columns=k, rng=seeded()) for k in (None, columns))
    assert all(torch.equal(found.diagonal[n], v) for n, v in whole.diagonal.items())
    assert found.drawn == 0
    assert all((e == 0).all() for e in found.stderr.values())


@pytest.mark.slow
@pytest.mark.parametrize("columns", [0, 1, 2])
def test_one_drawn_column_is_unbiased_and_its_stated_error_is_a_bound(columns):
    """Over 300 seeds: z-scores of the mean within chance, stated variance at least the measured one up to chance."""
    model, batch = case("plain", samples=6)
    model[-1].weight.data *= 4  # a share of each sample's classes should be likelier than the rest
    groups = couple(model, trace(model, batch[0]))
    whole = exact(model, CrossEntropy(), [batch], groups)
    rng, many = seeded(columns), 300
    runs = [exact(model, CrossEntropy(), [batch], groups, columns=columns, rng=rng) for _ in range(many)]
    assert runs[0].backwards == columns + 1
    flat = [torch.cat([v.flatten() for v in r.diagonal.values()]) for r in runs]
    error = [torch.cat([v.flatten() for v in r.stderr.values()]) for r in runs]
    truth = torch.cat([v.flatten() for v in whole.diagonal.values()])
    for found, stated, expected in (
        (torch.stack(flat), torch.stack(error), truth),
        (torch.stack([r.trace for r in runs]), torch.stack([r.trace_stderr for r in runs]), whole.trace),
    ):
        spread = found.std(0)
        alive = spread > 1e-9 * expected.abs().max()
        z = (found.mean(0) - expected)[alive] / (spread[alive] / math.sqrt(many))
        assert (z.abs() < 5.5).all()
        assert 0.6 < float(z.square().mean().sqrt()) < 1.6  # entries share their draws, so this is wide
        assert torch.allclose(found[:, ~alive].mean(0), expected[~alive], atol=1e-8 * float(expected.abs().max()))
        bound = stated.square().mean(0)[alive].sqrt()
        assert (spread[alive] <= 1.25 * bound).all()


def test_the_drawn_share_is_that_of_the_classes_left_over():
    model, batch = case("mlp", samples=40)
    whole = sum(float(v.sum()) for v in exact(model, CrossEntropy(), [batch]).diagonal.values())
    rng = seeded()
    runs = [exact(model, CrossEntropy(), [batch], columns=2, rng=rng) for _ in range(100)]
    fixed = [sum(float(v.sum()) for v in r.diagonal.values()) * (1 - r.drawn) for r in runs]
    assert max(fixed) - min(fixed) < 1e-12 * whole  # what was not drawn is the same each time
    assert abs(sum(r.drawn for r in runs) / 100 - (1 - fixed[0] / whole)) < 0.02
    assert 0 < runs[0].drawn < 1


def test_a_drawn_column_repeats_under_a_seed():
    model, batch = case("mlp")
    one, two, other = (exact(model, CrossEntropy(), [batch], columns=1, rng=seeded(s)) for s in (5, 5, 6))
    assert all(torch.equal(one.diagonal[n], two.diagonal[n]) for n in one.diagonal)
    assert not all(torch.equal(one.diagonal[n], other.diagonal[n]) for n in one.diagonal)


def test_hutchinson_is_within_its_own_error_of_the_dense_hessian():
    """A net with GELU, where Gauss-Newton is not the Hessian. Probes are shared, so weights are not independent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).double().eval()
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    groups = couple(model, trace(model, batch[0]))
    diagonal = {f"{i}.weight": dense(model, CrossEntropy(), batch, f"{i}.weight").diagonal() for i in (0, 2, 4)}
    diagonal = {n: v.reshape(model.get_parameter(n).shape) for n, v in diagonal.items()}
    zs, ztraces, rng = [], [], seeded()
    for _ in range(30):
        found = hutchinson(model, CrossEntropy(), [batch], groups, probes=60, rng=rng)
        zs += [((found.diagonal[n] - v) / found.stderr[n]).flatten() for n, v in diagonal.items()]
        ztraces.append((found.trace - groups.reduce(diagonal)) / found.trace_stderr)
        assert torch.allclose(found.trace, groups.reduce(found.diagonal))
    for z in (torch.cat(zs), torch.cat(ztraces)):
        assert abs(float(z.mean())) < 0.15
        assert 0.9 < float(z.std()) < 1.15
    assert found.kind == "Hutchinson estimate"
    assert (found.samples, found.backwards, found.drawn) == (8, 121, 1.0)


def test_probes_of_one_layer_at_a_time_are_right_and_less_noisy():
    """Z-scores against the dense Hessian; and the noise of a layer's estimate is what its own block leaves."""
    model, batch = case("residual", samples=8)
    groups = couple(model, trace(model, batch[0]))
    names = [f"{n}.weight" for n in ("stem", "grouped", "point", "fc")]
    blocks = {n: dense(model, CrossEntropy(), batch, n) for n in names}
    found = hutchinson(model, CrossEntropy(), [batch], groups, probes=400, rng=seeded(), block=True)
    joint = hutchinson(model, CrossEntropy(), [batch], groups, probes=400, rng=seeded())
    assert found.backwards == 1 + 2 * 400 * 4
    for name, block in blocks.items():
        off = block - torch.diag(block.diagonal())
        error = (off.square().sum(1) / 400).sqrt().reshape(found.diagonal[name].shape)
        alive = error > 1e-9 * error.max()
        z = (found.diagonal[name] - block.diagonal().reshape(error.shape))[alive] / error[alive]
        assert z.abs().max() < 5
        assert torch.allclose(found.stderr[name][alive], error[alive], rtol=0.3)
    alive = joint.trace_stderr > 0
    assert (found.trace_stderr < 0.9 * joint.trace_stderr)[alive].all()


@pytest.mark.parametrize("block", [False, True])
def test_probes_together_are_the_probes_one_by_one(block):
    model, batch = case("plain")
    groups = couple(model, trace(model, batch[0]))
    one, four = (
        hutchinson(model, CrossEntropy(), [batch], groups, probes=6, rng=seeded(), together=n, block=block)
        for n in (1, 4)
    )
    for name, value in one.diagonal.items():
        assert torch.allclose(four.diagonal[name], value, rtol=1e-8, atol=1e-14)
        assert torch.allclose(four.stderr[name], one.stderr[name], rtol=1e-8, atol=1e-14)
    assert torch.allclose(four.halves, one.halves)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad if float(x.detach().sum()) else grad


def test_what_cannot_be_vectorised_is_done_one_by_one():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(Square.apply(self.a(x)))

    torch.manual_seed(0)
    model, batch = Squared().double(), (torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5,)))
    one, four = (hutchinson(model, CrossEntropy(), [batch], probes=4, rng=seeded(), together=n) for n in (1, 4))
    assert all(torch.allclose(four.diagonal[n], v) for n, v in one.diagonal.items())


def test_both_halves_of_the_probes_make_the_whole():
    model, (x, y) = case("residual", samples=6)
    parts = list(zip(x.split(3), y.split(3), strict=True))
    groups = couple(model, trace(model, x))
    found = hutchinson(model, CrossEntropy(), parts, groups, probes=7, rng=seeded())
    assert torch.allclose((4 * found.halves[0] + 3 * found.halves[1]) / 7, found.trace)
    assert found.probes == 7


def test_probes_stop_when_they_are_told_it_is_enough():
    """Rounds are means over all probes so far; the first of two rounds is what one round alone gives."""
    model, batch = case("residual")
    groups, seen = couple(model, trace(model, batch[0])), []

    def enough(found):
        seen.append(found)
        return found.probes >= 8

    found = hutchinson(model, CrossEntropy(), iter([batch]), groups, probes=50, rng=seeded(), until=enough, every=4)
    assert [f.probes for f in seen] == [4, 8]
    assert found.probes == 8
    alone = hutchinson(model, CrossEntropy(), [batch], groups, probes=4, rng=seeded())
    assert all(torch.allclose(seen[0].diagonal[n], v) for n, v in alone.diagonal.items())
    whole = hutchinson(model, CrossEntropy(), [batch], groups, probes=8, rng=seeded())
    assert all(torch.allclose(found.diagonal[n], v) for n, v in whole.diagonal.items())
    ratio = (found.trace_stderr / whole.trace_stderr)[whole.trace_stderr > 0]
    assert 0.5 < float(ratio.mean()) < 2
    assert found.samples == len(batch[1])


def test_hutchinson_streams_over_batches_by_their_mass():
    """The estimate of two batches is the mean of those of each, weighted by samples, probe by probe."""
    model, (x, y) = case("residual", samples=7)
    parts = list(zip(x.split((2, 5)), y.split((2, 5)), strict=True))
    found = hutchinson(model, CrossEntropy(), iter(parts), probes=4, rng=seeded())
    rng = seeded()
    a, b = (hutchinson(model, CrossEntropy(), [part], probes=4, rng=rng) for part in parts)
    assert found.samples == 7
    for name, value in found.diagonal.items():
        assert torch.allclose(value, (2 * a.diagonal[name] + 5 * b.diagonal[name]) / 7, rtol=1e-10)
        error = (4 * a.stderr[name] ** 2 + 25 * b.stderr[name] ** 2).sqrt() / 7
        assert torch.allclose(found.stderr[name], error, rtol=1e-10)
    again = hutchinson(model, CrossEntropy(), parts, probes=4, rng=seeded())
    assert all(torch.equal(again.diagonal[n], v) for n, v in found.diagonal.items())
    assert found.trace is None


def test_hutchinson_has_no_error_where_the_hessian_is_diagonal():
    """One linear layer of one input under squared error: each probe gives the truth."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False)).double()
    x, y = torch.randn(4, 1, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    found = hutchinson(model, SquaredError(), [(x, y)], probes=2, rng=seeded())
    assert torch.allclose(found.diagonal["0.weight"], (2 * x.square().mean() / 3).expand(3, 1), rtol=1e-12)
    assert (found.stderr["0.weight"] < 1e-15).all()


@pytest.mark.slow
def test_on_a_pretrained_network_probes_agree_with_the_closed_form_within_their_error(hapdata, monkeypatch):
    """Z-scores of all channels of ResNet-20 on CIFAR-10; shared probes make them dependent, so the band is wide."""
    from hap.harness.tasks import cifar10_resnet20

    monkeypatch.setenv("HAP_DATA", str(hapdata))
    task = cifar10_resnet20.task(0, images=32)
    groups = couple(task.model, trace(task.model, task.example), "union")
    truth = exact(task.model, task.loss, task.batches, groups, per="row")
    assert truth.kind == "exact Hessian diagonal"
    for block in (False, True):
        probes = 6 if block else 40
        found = hutchinson(task.model, task.loss, task.batches, groups, probes=probes, rng=seeded(), block=block)
        alive = found.trace_stderr > 0
        z = (found.trace - truth.trace)[alive] / found.trace_stderr[alive]
        assert abs(float(z.median())) < 0.3
        assert 0.8 < float(z.abs().median()) / 0.6745 < 1.3
    few = exact(task.model, task.loss, task.batches, groups, per="row", columns=2, rng=seeded())
    assert few.drawn < 0.01
    alive = truth.trace > 0
    assert float((few.trace / truth.trace - 1)[alive].abs().median()) < 0.01


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # curvlinops, when imported
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_curvlinops_agrees(activation):
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), activation(), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    data = [(torch.randn(n, 2, 4, 4, dtype=torch.float64), torch.randint(0, 4, (n,))) for n in (5, 5)]
    params = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    for bias in (model[0].bias, model[3].bias):
        bias.requires_grad_(False)
    found = exact(model, CrossEntropy(), data)
    flat = torch.cat([found.diagonal[n].flatten() for n in params])
    operators = [GGNLinearOperator] if activation is nn.GELU else [GGNLinearOperator, HessianLinearOperator]
    for operator in operators:
        matrix = operator(model, nn.CrossEntropyLoss(), list(params.values()), data)
        expected = (matrix @ torch.eye(len(flat), dtype=torch.float64)).diagonal()
        assert gap(flat, expected.detach()) < 1e-10
    matrix = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(params.values()), data)
    hessian = (matrix @ torch.eye(len(flat), dtype=torch.float64)).detach()
    estimate = hutchinson(model, CrossEntropy(), data, probes=400, rng=seeded())
    z = torch.cat([((estimate.diagonal[n] - d.reshape(p.shape)) / estimate.stderr[n]).flatten()
                   for (n, p), d in zip(params.items(), hessian.diagonal().split([p.numel() for p in params.values()]),
                                        strict=True)])  # fmt: skip
    assert z.isfinite().all()
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize("measure", [exact, partial(hutchinson, probes=2, rng=seeded())])
def test_the_model_is_left_as_it_was_found(measure):
    model, batch = case("residual")
    model.train()
    model.bn0.eval()
    model.stem.weight.requires_grad_(False)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        found = measure(model, CrossEntropy(), [batch])
    assert "stem.weight" in found.diagonal
    assert not any(v.requires_grad for v in [*found.diagonal.values(), *found.stderr.values()])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, m in model.named_modules() if not m.training] == ["bn0"]
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_it_is_left_so_after_an_error_too():
    model, batch = case("residual")
    model.train()
    with pytest.raises(RuntimeError):
        exact(model, CrossEntropy(), [batch, (batch[0][:, :1], batch[1])])
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_padding_that_is_wider_on_one_side_is_torchs_own(dtype):
    """Against autograd, sample by sample; this cannot see the columns of a loss."""
    conv = nn.Conv2d(3, 2, (2, 4), padding="same", dtype=dtype)
    compare(conv, torch.randn(3, 3, 5, 6, dtype=dtype))


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (Twice(), torch.randn(2, 3), "layer is called twice in one pass"),
        (nn.Linear(3, 3), torch.randn(2, 4, 3), r"outputs \[batch, classes\] expected, found \(2, 4, 3\)"),
        (nn.Sequential(nn.Conv1d(3, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()), torch.randn(2, 3, 4),
         r"0 \(Conv1d\) pads with reflect; only zeros are known"),
        (nn.Sequential(nn.Conv3d(1, 2, 1), nn.Flatten()), torch.randn(2, 1, 2, 2, 2), "is not known"),
    ],
    ids=["called twice", "three axes", "reflection", "3-d"],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(model, x, says):
    with pytest.raises(HapError, match=says):
        exact(model, CrossEntropy(), [(x, torch.tensor([0, 1]))])


def test_no_batches_are_refused():
    model, _ = case("mlp")
    for measure in (exact, partial(hutchinson, probes=2, rng=seeded())):
        with pytest.raises(HapError, match="calibration batches expected, found none"):
            measure(model, CrossEntropy(), [])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"probes": 0}, "probes of at least 1 expected, found 0"),
        ({"probes": 5, "every": 0}, "every of at least 1"),
        ({"probes": 5, "together": 0}, "together of at least 1"),
    ],
)
def test_probes_that_are_none_are_refused(given, says):
    model, batch = case("mlp")
    with pytest.raises(HapError, match=says):
        hutchinson(model, CrossEntropy(), [batch], rng=seeded(), **given)


def test_one_probe_does_not_know_its_error():
    model, batch = case("mlp")
    found = hutchinson(model, CrossEntropy(), [batch], couple(model, trace(model, batch[0])), probes=1, rng=seeded())
    assert all(e.isinf().all() for e in found.stderr.values())
    assert found.halves is None


def by_autograd(module, x, grads, name):
    """Squares of per-sample gradients, one backward pass a sample and column."""
    parameter = module.get_parameter(name)
    each = torch.stack([
        torch.stack([torch.autograd.grad(module(x[n : n + 1]), parameter, g[n : n + 1])[0] for n in range(len(x))])
        for g in grads
    ]).square()  # fmt: skip
    rows = each.reshape(*each.shape[:2], len(parameter.flatten() if parameter.dim() == 1 else parameter), -1).sum(-1)
    if isinstance(module, nn.LayerNorm):
        rows = each.flatten(2)
    return {
        "weight": (each.sum((0, 1)), rows[-1], each[-1].square().sum(0)),
        "row": (rows.sum((0, 1)), rows[-1], rows[-1].square().sum(0)),
    }


def stacked(module, grads):
    """The gradients as `exact` hands them over."""
    return torch.stack([positions(module, g) for g in grads], 1)


def compare(module, x, columns=3):
    grads = torch.randn(columns, *module(x).shape, dtype=x.dtype)
    names = [name for name, _ in module.named_parameters()]
    for per in ("weight", "row"):
        for drawn in (True, False):
            found = squared_gradients(module, x, stacked(module, grads), names, per=per, drawn=drawn)
            for name in names:
                expected = by_autograd(module, x, grads, name)[per]
                for one, other in zip(found[name], expected if drawn else expected[:1], strict=False):
                    assert one.shape == other.shape
                    if x.dtype == torch.float64:
                        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
                    else:  # another kernel, and rounding
                        assert gap(one, other) < 1e-4


@given(st.data())
@settings(max_examples=60)
def test_squares_of_any_convolution_are_those_of_autograd(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    dims, groups = draw(1, 2), draw(1, 3)
    kernel = tuple(draw(1, 3) for _ in range(dims))
    dilation = tuple(draw(1, 2) for _ in range(dims))
    odd = all(d * (k - 1) % 2 == 0 for d, k in zip(dilation, kernel, strict=True))
    stride = tuple(draw(1, 3) for _ in range(dims))
    padding = data.draw(st.sampled_from(["valid", "number", *(["same"] if odd and set(stride) == {1} else [])]))
    torch.manual_seed(draw(0, 9))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    module = (nn.Conv1d, nn.Conv2d)[dims - 1](
        groups * draw(1, 2), groups * draw(1, 2), kernel, stride, draw(0, 2) if padding == "number" else padding,
        dilation, groups, bias=data.draw(st.booleans()), dtype=dtype,
    )  # fmt: skip
    compare(module, torch.randn(draw(1, 3), module.in_channels, *[draw(5, 7)] * dims, dtype=dtype), draw(1, 30))


@given(st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=30)
def test_squares_of_a_linear_layer_on_any_axes_are_those_of_autograd(n, axes, slots, rows):
    compare(nn.Linear(slots, rows).double(), torch.randn(n, *axes, slots, dtype=torch.float64))


def test_memory_is_bounded_by_parts_of_a_batch(monkeypatch):
    monkeypatch.setattr(persample, "BYTES", 1)
    module = nn.Conv2d(2, 3, 3, padding=1).double()
    compare(module, torch.randn(5, 2, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("twice", ["two layers", "transposed", "squared"])
def test_a_weight_that_is_used_twice_is_refused(twice):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight if twice == "two layers" else self.b.weight

        def forward(self, x):
            x = F.relu(self.a(x))
            if twice == "two layers":
                return self.b(x)
            return self.b(F.linear(x, self.a.weight.T if twice == "transposed" else self.a.weight.square()))

    with pytest.raises(HapError, match=r"the weight of [ab] is used \d times in one pass"):
        exact(Shared(), CrossEntropy(), [(torch.randn(2, 4), torch.tensor([0, 1]))])


def test_batch_statistics_and_strange_forwards_are_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    coupled = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    for model, says in ((coupled, "1 takes the statistics of the batch"), (Doubled(3, 2), "Doubled.* is not known")):
        with pytest.raises(HapError, match=says):
            exact(model, CrossEntropy(), [batch])
    for model, says in (
        (nn.Flatten(), "has no convolution"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "is computed from others"),
    ):
        with pytest.raises(HapError, match=says):
            hutchinson(model, CrossEntropy(), [batch], probes=2, rng=torch.Generator())


def test_a_strangers_function_is_not_believed_by_its_name():
    class Relu(Square):
        """A square by another name."""

    x = torch.randn(3, requires_grad=True)
    assert not piecewise_linear(Relu.apply(x).sum())
    assert piecewise_linear(F.relu(x).sum())


def test_columns_beside_an_opaque_module_count_what_is_grouped():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    batch = (torch.randn(8, 4), torch.randint(5, (8,)))
    groups = couple(model, trace(model, batch[0], opaque=["2"]))
    found = exact(model, CrossEntropy(), [batch], groups, columns=2, rng=torch.Generator().manual_seed(0))
    assert len(groups) == 0
    assert found.drawn > 0


def test_a_fused_attention_has_its_second_derivative():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            q = self.q(x)[:, None]
            return self.out(F.scaled_dot_product_attention(q, q, q)[:, 0].mean(1))

    batch = (torch.randn(2, 5, 4), torch.tensor([0, 1]))
    found = hutchinson(Attend(), CrossEntropy(), [batch], probes=4, rng=torch.Generator().manual_seed(0))
    assert all(d.isfinite().all() for d in found.diagonal.values())


def test_a_model_without_a_name_for_its_layer_has_a_weight():
    found = exact(nn.Linear(3, 2), CrossEntropy(), [(torch.randn(4, 3), torch.randint(2, (4,)))])
    assert set(found.diagonal) == {"weight"}


def test_sums_of_half_precision_are_kept_in_single():
    model = nn.Linear(3, 2).bfloat16()
    batches = [(torch.randn(2, 3).bfloat16(), torch.randint(2, (2,))) for _ in range(3)]
    assert exact(model, CrossEntropy(), batches).diagonal["weight"].dtype == torch.float32
    assert (
        hutchinson(model, CrossEntropy(), batches, probes=2, rng=torch.Generator()).diagonal["weight"].dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"memory": 0}, "a memory of at least 1 byte expected, found 0"),
        ({"columns": 1, "share": 0.1}, "one of columns and share expected, found 1 and 0.1"),
        ({"share": 1.0}, "a share of the trace above 0 and below 1 expected, found 1.0"),
        ({"columns": 1}, "a generator to draw with"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, says):
    with pytest.raises(HapError, match=says):
        exact(nn.Linear(3, 4), CrossEntropy(), [(torch.randn(2, 3), torch.randint(2, (2,)))], **given)


@pytest.mark.parametrize("classes", [5, 120])
@pytest.mark.parametrize("name", ["plain", "both"])
def test_ignored_targets_count_nowhere_in_a_measurement(name, classes):
    """Against the dense Hessian of torch's own loss over all batches, of which one is ignored altogether."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, classes)).double()
    x, targets = torch.randn(9, 3, dtype=torch.float64), torch.tensor([0, -100, 4, 1, -100, 3, -100, -100, -100])
    weight = None if name == "plain" else torch.rand(classes, dtype=torch.float64)
    loss = CrossEntropy(label_smoothing=0.1 * (name == "both"), weight=weight)
    peer = nn.CrossEntropyLoss(weight, label_smoothing=loss.label_smoothing)
    batches = [(x[i : i + 3], targets[i : i + 3]) for i in (0, 3, 6)]
    counted = [(x[targets >= 0], targets[targets >= 0])]
    groups = couple(model, trace(model, x))

    def mean(value):
        return peer(functional_call(model, {"0.weight": value}, (x,)), targets)

    found = exact(model, loss, batches, groups)
    hessian = torch.autograd.functional.hessian(mean, model[0].weight.detach()).reshape(12, 12)
    assert gap(found.diagonal["0.weight"], hessian.diagonal().reshape(4, 3)) < 1e-10
    expected = exact(model, loss, counted, groups)
    assert torch.allclose(found.trace, expected.trace, rtol=1e-10)
    assert math.isclose(found.mass, expected.mass, rel_tol=1e-12)
    drawn = exact(model, loss, batches, groups, columns=1, rng=seeded())
    assert drawn.trace_stderr.isfinite().all()
    assert ((drawn.trace - found.trace).abs() <= 6 * drawn.trace_stderr).all()
    shared = exact(model, loss, batches, share=0.3, rng=seeded())
    assert shared.drawn < 0.3
    probed, again = (hutchinson(model, loss, b, groups, probes=20, rng=seeded()) for b in (batches, batches[:2]))
    assert torch.equal(probed.trace, again.trace)
    assert ((probed.trace - found.trace).abs() <= 6 * probed.trace_stderr).all()


def test_a_measurement_without_a_target_that_counts_is_refused():
    model, batch = nn.Sequential(nn.Linear(3, 4)), (torch.randn(2, 3), torch.full((2,), -100))
    with pytest.raises(HapError, match="targets that count expected, found 2 that are ignored"):
        exact(model, CrossEntropy(), [batch])
    with pytest.raises(HapError, match="found none with a target that counts"):
        hutchinson(model, CrossEntropy(), [batch], probes=2, rng=seeded())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_with_the_name_of_the_parameter(value):
    for name in ("0.weight", "2.bias"):
        model, batch = case("mlp")
        model = nn.Sequential(*model[:2], nn.BatchNorm1d(8).double(), *model[2:]).eval()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[1] = value
        says = f"finite numbers expected, found 1 of .* in {name} that are not"
        for measure in (exact, partial(hutchinson, probes=2, rng=seeded())):
            with pytest.raises(HapError, match=says):
                measure(model, CrossEntropy(), [batch])


def test_a_diagonal_that_is_not_finite_names_its_parameter_and_the_cause():
    model, (x, y) = case("mlp")
    model = nn.Sequential(*model[:2], nn.BatchNorm1d(8).double(), *model[2:]).eval()
    for measure, who in ((exact, "exact"), (partial(hutchinson, probes=2, rng=seeded()), "hutchinson")):
        model[2].running_mean.zero_()
        with pytest.raises(
            HapError, match=f"^{who}, diagonal: .* in 0.weight that are not; see whether inputs.*classes$"
        ):
            measure(model, CrossEntropy(), [(x * math.nan, y)])
        model[2].running_mean[0] = math.nan
        with pytest.raises(HapError, match=r"that are not; the buffer 2.running_mean holds NaN$"):
            measure(model, CrossEntropy(), [(x, y)])


def test_a_mask_of_infinities_in_a_buffer_is_no_mistake():
    model, batch = case("attention")
    model.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))
    assert exact(model, CrossEntropy(), [batch]).diagonal["q.weight"].isfinite().all()


@pytest.mark.parametrize("measure", [exact, partial(hutchinson, probes=2)], ids=["exact", "hutchinson"])
def test_inference_mode_is_left_for_the_measurement_and_no_longer(measure):
    model, (x, y) = case("mlp")
    groups = couple(model, trace(model, x))
    expected = measure(model, CrossEntropy(), [(x, y)], groups, rng=seeded())
    with torch.inference_mode():
        found = measure(model, CrossEntropy(), [(x.clone(), y)], groups, rng=seeded())
        assert torch.is_inference_mode_enabled()
        made = nn.Linear(6, 3)
    assert torch.equal(found.trace, expected.trace)
    with pytest.raises(HapError, match=r"weight was made under torch.inference_mode, so pass copy.deepcopy\(model\)"):
        measure(made, CrossEntropy(), [(x.float(), y)], rng=seeded())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda model, batch: model(batch[0]).sum()])
def test_a_loss_without_columns_is_refused_with_what_to_do(loss):
    model, batch = case("mlp")
    with pytest.raises(HapError, match=r"^exact: a loss with .*columns expected, as hap.CrossEntropy\(\).*hutchinson"):
        exact(model, loss, [batch])
    with pytest.raises(HapError, match=r"^hutchinson: a loss with mass expected"):
        hutchinson(model, loss, [batch], probes=1, rng=seeded())
