"""Updates against oracles that know no moments: torch's least squares, masking, and networks with an exact answer."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import SMALL, bert, build, headed, tokens
from torch import nn

from hap import Budget, CrossEntropy, Fate, HapError, Plan, couple, mask, trace
from hap import apply as operate
from hap.cost import params
from hap.implants import low_rank, zero
from hap.plan import plan
from hap.structure.heads import heads
from hap.structure.layers import forward
from hap.surgery import refit
from hap.surgery.cut import cuts
from hap.surgery.moments import Sums
from hap.surgery.patch import Patch
from hap.testing import random_plan
from hap.updates import curvature_weighted, least_squares, mean, rescale


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def many(example, times=8):
    """Calibration batches like an example: random tensors of its shape."""
    return [torch.randn(16, *example.shape[1:], dtype=example.dtype, generator=seeded(i)) for i in range(times)]


@torch.no_grad()
def gap(model, other, batches):
    out, found = (torch.cat([forward(m, x) for x in batches]) for m in (model, other))
    return float((out - found).square().mean() / out.square().mean())


LAYERS = {
    "3x3": (nn.Conv2d(4, 3, 3, padding=1), (4, 6, 6)),
    "strided": (nn.Conv2d(4, 3, 3, stride=2), (4, 7, 7)),
    "dilated": (nn.Conv2d(4, 3, (3, 1), dilation=2, padding=(2, 0)), (4, 7, 6)),
    "1x1": (nn.Conv2d(5, 3, 1, stride=2, bias=False), (5, 5, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 5)),
    "sequence": (nn.Conv1d(3, 4, 3, padding=2, dilation=2), (3, 9)),
    "linear": (nn.Linear(6, 4), (6,)),
    "tokens": (nn.Linear(6, 4, bias=False), (5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_least_squares_is_that_of_torch(name):
    """What a layer writes is linear in its weights, so `lstsq` needs the Jacobian alone; the ridge is tiny."""
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0], dtype=torch.float64))
    x = torch.randn(40, *shape, dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        y = layer(x).tanh()
    sums = Sums(layer)
    for at in (0, 16, 32):
        sums.add(x[at : at + 16], y[at : at + 16])
    found = least_squares(layer, torch.arange(layer.weight.shape[1]), sums.result(), ridge=1e-13)
    own = dict(layer.named_parameters())
    slopes = torch.func.jacrev(lambda own: torch.func.functional_call(layer, own, x).flatten())(own)
    design = torch.cat([slopes[key].flatten(1) for key in ("weight", "bias")], 1)
    best = torch.linalg.lstsq(design, y.flatten()[:, None]).solution[:, 0]
    assert torch.allclose(torch.cat([found.weight.flatten(), found.bias]), best, atol=1e-7)


def test_the_remaining_loss_is_that_of_the_formula():
    """tr(W S W') - tr(B' A^-1 B) with S, A and B the covariances of all inputs, those kept, and both [Xie21]."""
    layer = nn.Conv2d(6, 4, 3, padding=1).double()
    x = torch.randn(32, 6, 8, 8, dtype=torch.float64, generator=seeded()) @ torch.randn(8, 8, dtype=torch.float64)
    x = torch.einsum("nchw,dc->ndhw", x, torch.randn(6, 6, dtype=torch.float64, generator=seeded(1)))
    kept, columns = torch.tensor([0, 2, 5]), torch.arange(54).reshape(6, 9)[[0, 2, 5]].flatten()
    with torch.no_grad():
        y = layer(x)
    whole, part = Sums(layer), Sums(small := nn.Conv2d(3, 4, 3, padding=1).double())
    whole.add(x, None)
    part.add(x[:, kept], y)
    s, w = whole.result().centred.xx[0], layer.weight.detach().flatten(1)
    b = s[columns] @ w.T
    expected = (w @ s @ w.T).trace() - (b.T @ torch.linalg.solve(s[columns][:, columns], b)).trace()
    with torch.no_grad():
        for p, value in zip(small.parameters(), least_squares(small, kept, part.result(), ridge=1e-14), strict=True):
            p.copy_(value)
        found = (small(x[:, kept]) - y).square().sum(1).mean()
    assert torch.isclose(found, expected, rtol=1e-6)


def planned(name, how="tied", rng=3, **shares):
    model, example = build(SMALL, name)
    model, example = model.double(), example.double()
    groups = couple(model, trace(model, example), how)
    return model, groups, random_plan(groups, seeded(rng), **shares), many(example)


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", SMALL)
def test_every_small_case_is_nearer_to_the_dense_model(name, how):
    """In both couplings, with implants: on inputs of the same kind as those of the moments."""
    model, groups, chosen, batches = planned(name, how)
    old, new = (operate(model, groups, chosen, zero, update, batches=batches) for update in (None, least_squares))
    more = params(new) - params(old)
    assert more == sum(len(m.bias) for n, m in new.named_modules() if _has_more(m, n, old))
    assert gap(model, new, batches) <= gap(model, old, batches) * (1 + 1e-9)


def _has_more(module, name, old):
    """Whether the module has a bias of its own; a Patch answers with those of its parts."""
    own = not isinstance(module, Patch) and getattr(module, "bias", None) is not None
    return own and old.get_submodule(name).bias is None


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", ["option-a", "option-b", "residual", "attention", "depthwise", "plain"])
def test_masking_with_the_new_weights_is_surgery_with_them(name, how):
    """The oracle has the dense shapes: the new weights in the places of the old ones, and what goes silenced."""
    model, groups, chosen, batches = planned(name, how, implant=0.0)
    small = operate(model, groups, chosen, None, least_squares, batches=batches)
    oracle = mask(model, groups, chosen)
    for layer, cut in _whole(model, groups, chosen).items():
        whole, part = oracle.get_submodule(layer), small.get_submodule(layer)
        part = part.parts[0] if isinstance(part, Patch) else part
        with torch.no_grad():
            for key, value in [*part.named_parameters(), *part.named_buffers()]:
                if key == "bias" and whole.bias is None:
                    whole.bias = nn.Parameter(torch.zeros(len(cut.written), dtype=value.dtype))
                if value.dim() == 1:
                    getattr(whole, key)[cut.kept] = value
                elif value.dim() and getattr(whole, "groups", 1) > 1:
                    whole.weight[cut.kept] = value
                elif value.dim():
                    whole.weight[cut.kept[:, None], cut.slots] = value
    assert gap(oracle, small, batches) < 1e-20


def _whole(model, groups, chosen):
    every = {
        name: refit.Cut(torch.arange(s.rows), torch.arange(0), torch.ones(s.rows, dtype=torch.bool),
                        torch.arange(s.slots), torch.ones(s.slots, dtype=torch.bool))
        for name, s in groups.shapes.items()
    }  # fmt: skip
    return {**every, **cuts(groups, chosen)}


@pytest.mark.parametrize("name", ["option-a", "attention"])
def test_where_nothing_is_pruned_nothing_changes(name):
    model, groups, _, batches = planned(name)
    chosen = Plan.of(groups, torch.full((len(groups),), int(Fate.KEEP)))
    small = operate(model, groups, chosen, None, least_squares, batches=batches)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), model.state_dict().values(), strict=True))


class Copied(nn.Module):
    """A residual block of which channel 3 of the inner layer is a copy of 0, and 4 is half of 1."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.two, self.behind, self.fc = nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)
        with torch.no_grad():
            for value in (self.one.weight, self.one.bias):
                value[3], value[4] = value[0], value[1] / 2
            self.behind.running_mean.normal_()

    def forward(self, x):
        x = self.stem(x)
        y = self.behind(self.two(F.relu(self.norm(self.one(x)))))
        return self.fc(F.relu(x[..., 1:-1, 1:-1] + y).mean((2, 3)))


def test_nothing_is_lost_where_a_channel_follows_from_others():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Copied().double().eval()
    batches = many(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    groups = couple(model, trace(model, batches[0]))
    fates = torch.full((len(groups),), int(Fate.KEEP))
    fates[groups.row_group[groups.shapes["one"].rows_at][3:]] = int(Fate.DROP)
    chosen = Plan.of(groups, fates)
    small = operate(model, groups, chosen, None, lambda *given: least_squares(*given, ridge=1e-13), batches=batches)
    assert gap(model, operate(model, groups, chosen), batches) > 1e-4
    assert gap(model, small, batches) < 1e-18
    assert small.two.bias is None


class Stream(nn.Module):
    """Two residual blocks, the sum taken in place or not, before or after a BatchNorm."""

    def __init__(self, inplace, norm):
        super().__init__()
        self.stem, self.inplace = nn.Conv2d(3, 6, 1), inplace
        self.ins = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1) for _ in "12")
        self.outs = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1, bias=False) for _ in "12")
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) if norm else nn.Identity() for _ in "12")
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for one, two, norm in zip(self.ins, self.outs, self.norms, strict=True):
            y = norm(two(F.relu(one(x))))
            if self.inplace:
                y += x
            else:
                y = x + y
            x = F.relu(y)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_branch_mends_what_the_stream_has_lost_before(inplace, norm):
    """The second branch is held to the dense stream: to regress it so by hand gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stream(inplace, norm).double().eval()
        for each in model.norms:
            if norm:
                nn.init.uniform_(each.weight, 0.5, 2)
    batches = many(torch.zeros(1, 3, 6, 6, dtype=torch.float64))
    groups = couple(model, trace(model, batches[0]))
    chosen = plan(groups, torch.rand(len(groups), generator=seeded()), Budget(ratios={"ins.*": 0.5}))
    small = operate(model, groups, chosen, None, least_squares, batches=batches)
    seen = {}
    reader = small.outs[1]
    for tag, each in (("dense", model), ("small", small)):
        for part in ("outs.1", "norms.1", "ins.1"):
            each.get_submodule(part).register_forward_hook(
                lambda _, args, out, key=(tag, part): seen.setdefault(key, []).append((args[0].clone(), out.clone()))
            )
    with torch.no_grad():
        for each in (model, small):
            for x in batches:
                each(x)
    joined = {key: [torch.cat(parts) for parts in zip(*value, strict=True)] for key, value in seen.items()}
    stream = [joined[tag, "ins.1"][0] for tag in ("dense", "small")]
    wanted = joined["dense", "norms.1"][1] + stream[0] - stream[1]  # what the branch must add, behind its norm
    if norm:
        each = model.norms[1]
        scale = (each.running_var + each.eps).rsqrt() * each.weight
        shape = (1, -1, 1, 1)
        wanted = (wanted - each.bias.view(shape)) / scale.view(shape) + each.running_mean.view(shape)
    start = operate(model, groups, chosen).outs[1]
    sums = Sums(start)
    sums.add(joined["small", "outs.1"][0], wanted.detach())
    weight, bias = least_squares(start, torch.arange(4), sums.result())
    assert torch.allclose(reader.weight, weight, atol=1e-10)
    found = model.norms[1].running_mean - small.norms[1].running_mean if norm else reader.bias
    assert torch.allclose(found, bias, atol=1e-10)


def test_passes_that_are_not_held_give_the_same():
    model, groups, chosen, batches = planned("option-b", "union")
    before = threading.active_count()
    held, anew = (operate(model, groups, chosen, zero, least_squares, batches=batches, memory=m) for m in (2**30, 0))
    for a, b in zip(held.state_dict().values(), anew.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert threading.active_count() == before


def test_a_layer_too_wide_is_solved_in_blocks_and_says_so(monkeypatch):
    """Block after block, each against what the others leave: more and more of the whole solution."""
    model, groups, chosen, batches = planned("plain", implant=0.0, drop=0.3)
    whole = operate(model, groups, chosen, None, least_squares, batches=batches)
    none = operate(model, groups, chosen)
    monkeypatch.setattr(refit, "WIDEST", 12)
    with pytest.warns(UserWarning, match=r"update: \d: its \d+ columns are solved in \d blocks"):
        blocks = operate(model, groups, chosen, None, least_squares, batches=batches)
    gaps = [gap(model, each, batches) for each in (whole, blocks, none)]
    assert gaps == sorted(gaps)


def test_means_go_into_biases():
    model, groups, chosen, batches = planned("plain", implant=0.0)
    small = operate(model, groups, chosen, None, mean, batches=batches)
    bare = operate(model, groups, chosen)
    with torch.no_grad():
        means = [torch.cat([forward(m, x) for x in batches]).mean(0) for m in (model, small, bare)]
    assert torch.allclose(means[0], means[1], atol=1e-12)
    assert not torch.allclose(means[0], means[2], atol=1e-3)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(small, bare, strict=True) if hasattr(a, "weight"))


def test_rescaling_gives_variances_back_and_worsens_the_error():
    model, groups, chosen, batches = planned("plain", implant=0.0)
    best, scaled = (operate(model, groups, chosen, None, u, batches=batches) for u in (least_squares, rescale))
    with torch.no_grad():
        spread = [torch.cat([forward(m, x) for x in batches]).var(0) for m in (model, scaled)]
    assert torch.allclose(*spread, rtol=1e-6)
    assert gap(model, best, batches) < gap(model, scaled, batches)


def test_a_row_that_never_varies_is_not_scaled():
    layer, sums = nn.Linear(3, 2), None
    sums = Sums(layer)
    sums.add(torch.ones(8, 3), torch.ones(8, 2))
    weight, bias = rescale(layer, torch.arange(3), sums.result())
    assert torch.isfinite(weight).all()
    assert torch.allclose(weight.sum(1) + bias, torch.ones(2), atol=1e-5)


def test_weighing_by_curvature_needs_a_loss_and_moves_weights():
    model, groups, chosen, batches = planned("option-a", implant=0.0)
    with pytest.raises(HapError, match="update: a loss expected"):
        operate(model, groups, chosen, None, curvature_weighted, batches=batches)
    plain, weighed = (
        operate(model, groups, chosen, None, update, batches=batches, loss=CrossEntropy())
        for update in (least_squares, curvature_weighted)
    )
    assert gap(plain, weighed, batches) > 1e-8


def test_a_weight_that_all_positions_share_changes_nothing():
    layer, x = nn.Conv2d(3, 2, 3), torch.randn(4, 3, 6, 6, generator=seeded())
    plain, weighed = Sums(layer), Sums(layer)
    y = torch.randn(4, 2, 4, 4, generator=seeded(1))
    plain.add(x, y)
    weighed.add(x, y, torch.full((4, 16), 0.25))
    for a, b in zip(vars(plain.result()).values(), vars(weighed.result()).values(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("implant", [None, low_rank])
def test_heads_and_ffns_are_updated_with_implants_beside_them(implant):
    model, example = headed("bert")
    groups = heads(couple(model, trace(model, example)))
    batches = [{**example, "input_ids": torch.randint(5, 30, (3, 7), generator=seeded(i))} for i in range(12)]
    shares = {"implant": 0.5, "rank": 1} if implant else {}
    chosen = plan(groups, torch.rand(len(groups), generator=seeded()), Budget(prunable=0.5, **shares))

    def off(small):
        with torch.no_grad():
            pairs = [[forward(m, x).logits for m in (model, small)] for x in batches]
        return float(sum((a - b).square().sum() for a, b in pairs))

    old, new = (operate(model, groups, chosen, implant, u, batches=batches) for u in (None, least_squares))
    assert params(old) == params(new)
    assert off(new) < 0.7 * off(old)


def test_the_inner_layer_of_an_ffn_is_pruned_and_made_up_for():
    model = bert().eval()
    groups = couple(model, trace(model, tokens()))
    chosen = plan(groups, torch.rand(len(groups), generator=seeded()), Budget(ratios={"*.intermediate.dense": 0.5}))
    batches = [{**tokens(), "input_ids": torch.randint(1, 50, (2, 8), generator=seeded(i))} for i in range(12)]
    old, new = (operate(model, groups, chosen, None, u, batches=batches) for u in (None, least_squares))
    with torch.no_grad():
        errors = [sum(float((m(**x).logits - model(**x).logits).square().sum()) for x in batches) for m in (old, new)]
    assert errors[1] < errors[0] / 2


def test_an_update_without_batches_is_refused():
    model, groups, chosen, _ = planned("plain", implant=0.0)
    with pytest.raises(HapError, match="update: calibration batches expected, found none"):
        operate(model, groups, chosen, None, least_squares)


def test_what_a_pass_raises_comes_out():
    model, groups, chosen, batches = planned("plain", implant=0.0)
    before = threading.active_count()

    def call(model, x):
        model(x)
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        operate(model, groups, chosen, None, least_squares, batches=batches, call=call)
    assert threading.active_count() == before


def test_weights_that_are_not_finite_are_refused():
    model, groups, chosen, batches = planned("plain", implant=0.0)

    def broken(reader, kept, moments):
        return reader.weight * torch.nan, moments.y.flatten()

    with pytest.raises(HapError, match=r"update: \d: finite weights expected"):
        operate(model, groups, chosen, None, broken, batches=batches)
