"""Implants of heads: zeros against the mask, means by hand, low-rank maps against regressions by singular values.

What an implant may look at, what it costs, and that a model with implants is a module like any other.
"""

import copy
import io
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import HEADED, SMALL, build, headed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from hap import Budget, Fate, HapError, Plan, apply, couple, implants, mask, trace
from hap.cost import macs, params
from hap.implants import low_rank, mean, zero
from hap.plan import cost, plan
from hap.structure.bypass import Borrower, Lender
from hap.structure.heads import heads
from hap.structure.layers import forward
from hap.surgery.head_implants import Passing

WIDTH, HEADS = 16, 4
HEAD = WIDTH // HEADS  # channels of a head
TEXTS = ("bert", "roberta", "electra", "distilbert")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model, example):
    with torch.no_grad():
        found = forward(model, example)
    return found if isinstance(found, torch.Tensor) else found.logits


@cache
def setting(kind="bert", attention="eager"):
    """A model in float64, an example and the heads; for all tests that leave the model as it is."""
    if kind == "timm":
        pytest.importorskip("timm")
    model, example = headed(kind, attention)
    model, example = model.double(), tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
    return model, example, heads(couple(model, trace(model, example)))


def planned(groups, implanted, dropped=(), rank=None):
    fates = torch.full((len(groups),), int(Fate.KEEP))
    fates[list(implanted)], fates[list(dropped)] = int(Fate.IMPLANT), int(Fate.DROP)
    return Plan.of(groups, fates, {} if rank is None else {"rank": rank})


def batches(example):
    """Two batches of different sizes; of sentences, of different lengths too."""
    if isinstance(example, torch.Tensor) or "input_ids" not in example:
        return [tree_map(lambda t, of=of: t[of].flip(-1), example) for of in ([0, 1, 2], [1, 0])]
    ids = torch.randint(5, 30, (2, 6), generator=seeded(2))
    return [example, {"input_ids": ids, "attention_mask": (torch.arange(6) < torch.tensor([[3], [6]])).long()}]


def layers(kind, model):
    """Query, key, value and output of each layer, by name."""
    found = [n.removesuffix(HEADED[kind][0]) for n, _ in model.named_modules() if n.endswith(HEADED[kind][0])]
    return [tuple(stem + name for name in HEADED[kind]) for stem in found]


def columns(members):
    """Where heads of a layer are among what its output projection reads."""
    return torch.cat([torch.arange(HEAD) + HEAD * (head % HEADS) for head in sorted(members)])


def watched(kind, model, data):
    """Of each layer: what query and output read, at each token that is no padding; in the last, at the first alone.

    The classifiers look at the first token; that no other matters is what the names of these models say.
    """
    found = []
    for layer, (query, *_, out) in enumerate(layers(kind, model)):
        pairs = []
        for batch in data:
            held = []
            handles = [
                model.get_submodule(name).register_forward_pre_hook(lambda _, args, held=held: held.append(args[0]))
                for name in (query, out)
            ]
            logits(model, batch)
            for handle in handles:
                handle.remove()
            keep = torch.ones(held[0].shape[:2], dtype=torch.bool)
            if "attention_mask" in batch if isinstance(batch, dict) else False:
                keep = batch["attention_mask"] == 1
            if layer == 1:
                keep = keep & (torch.arange(keep.shape[1]) == 0)
            pairs.append(tuple(t[keep] for t in held))
        found.append(pairs)
    return found


def contribution(kind, model, data, layer, members):
    """x and y of each position of a layer: what the query reads, and what heads add behind the output projection."""
    weight = model.get_submodule(layers(kind, model)[layer][3]).weight.detach()
    x, c = (torch.cat(parts) for parts in zip(*watched(kind, model, data)[layer], strict=True))
    of = columns(members)
    return x, c[:, of] @ weight[:, of].T


def borrowers(model):
    return [module for module in model.modules() if isinstance(module, Borrower)]


# zero and mean


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", HEADED)
def test_zero_implants_are_the_mask(kind, attention):
    """And to the last bit the model without the heads, to which they add parameters alone."""
    model, example, groups = setting(kind, attention)
    for implanted, dropped in (({1, 2, 5}, {0, 7}), ({0, 1, 2, 3}, {4, 5, 6, 7})):
        chosen = planned(groups, implanted, dropped, rank=3)
        small, bare = apply(model, groups, chosen, zero), apply(model, groups, planned(groups, (), implanted | dropped))
        assert torch.equal(logits(small, example), logits(bare, example))
        expected = logits(mask(model, groups, chosen), example)
        torch.testing.assert_close(logits(small, example), expected, rtol=1e-11, atol=1e-11)
        assert params(small) == params(bare) + 3 * len(implanted) * 2 * WIDTH


@pytest.mark.parametrize("kind", HEADED)
def test_the_mean_of_heads_goes_into_the_bias_behind_them(kind):
    """By hand, over the positions that the classifier depends on; nothing is added to the model."""
    model, example, groups = setting(kind)
    data = batches(example)
    chosen = planned(groups, {1, 2, 4}, {0}, rank=0)
    small, oracle = apply(model, groups, chosen, mean, batches=data), mask(model, groups, chosen)
    for layer, members in enumerate(({1, 2}, {4})):
        _, y = contribution(kind, model, data, layer, members)
        out = layers(kind, model)[layer][3]
        expected = model.get_submodule(out).bias.detach() + y.mean(0)
        torch.testing.assert_close(small.get_submodule(out).bias.detach(), expected, rtol=1e-11, atol=1e-11)
        oracle.get_submodule(out).bias.data.copy_(expected)
    torch.testing.assert_close(logits(small, example), logits(oracle, example), rtol=1e-10, atol=1e-10)
    bare = apply(model, groups, planned(groups, (), {0, 1, 2, 4}))
    assert [(n, type(m)) for n, m in small.named_modules()] == [(n, type(m)) for n, m in bare.named_modules()]
    assert small.state_dict().keys() == bare.state_dict().keys()
    assert params(small) == params(bare)


def test_low_rank_of_rank_0_is_the_mean():
    model, example, groups = setting()
    chosen = planned(groups, {1, 2, 4}, {0}, rank=0)
    one, other = (apply(model, groups, chosen, implant, batches=[example]) for implant in (mean, low_rank))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_where_no_bias_is_free_the_mean_is_nothing_and_a_map_goes_through_the_origin():
    model, example = build(SMALL, "attention")
    model, example = model.double(), example.double()
    model.out.bias = None
    groups = heads(couple(model, trace(model, example)))
    chosen = planned(groups, {1}, rank=0)
    small = apply(model, groups, chosen, mean, batches=[example])
    assert torch.equal(logits(small, example), logits(apply(model, groups, chosen, zero), example))
    assert params(small) == cost(groups, chosen.fates(groups), 0).params
    small = apply(model, groups, planned(groups, {1}, rank=2), low_rank, batches=[example])
    assert params(small) == cost(groups, chosen.fates(groups), 2).params
    assert borrowers(small)[0].implant(torch.zeros(1, 8, dtype=torch.float64)).abs().max() == 0


# low rank


def regression(x, y, ridge, rank, constant=True):
    """The best map of a rank and its constant, as the ridge's rows of data and the singular values of fitted values."""
    middle = (x.mean(0), y.mean(0)) if constant else (0 * x[0], 0 * y[0])
    x, y = x - middle[0], y - middle[1]
    wall = np.sqrt(len(x) * ridge * (x**2).mean()) * np.eye(x.shape[1])
    tall, goal = np.vstack([x, wall]), np.vstack([y, np.zeros((len(wall), y.shape[1]))])
    full = np.linalg.lstsq(tall, goal, rcond=None)[0]
    leading = np.linalg.svd(tall @ full)[2][:rank]
    best = full @ leading.T @ leading
    return best, middle[1] - middle[0] @ best


def least_error(x, y, rank):
    """The smallest sum of squared errors that a map of a rank and a constant can have [Izenman75]."""
    x, y = x - x.mean(0), y - y.mean(0)
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return ((y - fitted) ** 2).sum() + (np.linalg.svd(fitted, compute_uv=False)[rank:] ** 2).sum()


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("noise", [1e-4, 3.0])
@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_a_low_rank_map_is_the_reduced_rank_regression_with_the_ridge_that_predicts_best(rank, noise, constant):
    """By numpy on the data themselves, where ours has sums of products alone; ranks from one to beyond the outputs."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((7, 5)) * np.geomspace(1, 0.1, 5)
    data = []
    for size in (9, 8, 7):
        x = rng.standard_normal((size, 7)) * np.geomspace(1, 0.2, 7) + 1
        data.append((x, x @ truth + 2 + noise * rng.standard_normal((size, 5))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the best ridge depends on the weights
        reader = nn.Linear(8, 6, bias=constant).double()
    of = torch.tensor([5, 0, 1, 6, 2])
    given = [
        (torch.from_numpy(x), torch.zeros(len(x), 8, dtype=torch.float64).index_copy(1, of, torch.from_numpy(c)))
        for x, c in data
    ]
    weight = reader.weight.detach().numpy()[:, of]
    pairs = [(x, c @ weight.T) for x, c in data]

    def joined(parts):
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def error(ridge):
        best, shift = regression(*joined(pairs[::2]), ridge, rank, constant)
        return sum(((y - x @ best - shift) ** 2).sum() for x, y in pairs[1::2])

    ridge = min(implants.RIDGES, key=error)
    if constant and rank >= 5:  # the truth is such a map; the ridge grows with the noise, and is not the first
        assert ridge < 1e-4 if noise < 1 else ridge > 1e-2
    down, up = low_rank(reader, of, Passing(lambda: iter(given), 7, rank, constant))
    assert (down.out_features, down.bias, up.bias is not None) == (rank, None, constant)
    best, shift = regression(*joined(pairs), ridge, rank, constant)
    np.testing.assert_allclose((up.weight @ down.weight).detach().numpy().T, best, rtol=1e-6, atol=1e-8)
    if constant:
        np.testing.assert_allclose(up.bias.detach().numpy(), shift, rtol=1e-6, atol=1e-8)


def test_a_single_batch_takes_the_first_ridge():
    rng = np.random.default_rng(0)
    x, c = rng.standard_normal((9, 4)), rng.standard_normal((9, 3))
    reader = nn.Linear(3, 5).double()
    passing = Passing(lambda: iter([(torch.from_numpy(x), torch.from_numpy(c))]), 4, 2, True)
    down, up = low_rank(reader, torch.arange(3), passing)
    best, _ = regression(x, c @ reader.weight.detach().numpy().T, implants.RIDGES[0], 2)
    np.testing.assert_allclose((up.weight @ down.weight).detach().numpy().T, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["bert", "vit", "timm"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_of_a_low_rank_map_is_the_least_there_is(kind, rank, monkeypatch):
    """Without a ridge to speak of, on the calibration batches: positions of the first layer, two heads together."""
    monkeypatch.setattr(implants, "RIDGES", (1e-12,))
    model, example, groups = setting(kind)
    data = [tree_map(lambda t: torch.cat([t] * 2), batch) for batch in batches(example)]
    small = apply(model, groups, planned(groups, {1, 3}, {0}, rank), low_rank, batches=data)
    x, y = contribution(kind, model, data, 0, {1, 3})
    out, (made,) = layers(kind, model)[0][3], borrowers(small)
    assert [tuple(p.shape) for p in made.implant.parameters()] == [(2 * rank, WIDTH), (WIDTH, 2 * rank)]
    with torch.no_grad():
        found = made.implant(x) + made.layer.bias - model.get_submodule(out).bias
    error, least = float((y - found).square().sum()), least_error(x.numpy(), y.numpy(), 2 * rank)
    # a linear map is exact where there are few positions
    assert error == pytest.approx(least, rel=1e-4, abs=1e-8 * float(y.square().sum()))


def single():
    """Each word as a sentence of its own: attention is then to itself, and what a head adds is linear in the word."""
    ids = torch.arange(5, 30)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_head_that_is_linear_is_replaced_without_loss_by_a_map_of_its_rank(kind, attention, monkeypatch):
    monkeypatch.setattr(implants, "RIDGES", (1e-13,))
    model, _, groups = setting(kind, attention)
    words = single()
    dense = logits(model, words)
    for implanted in ({2}, {0, 1, 2, 3, 5, 6}, set(range(8))):
        small = apply(model, groups, planned(groups, implanted, rank=HEAD), low_rank, batches=[words])
        torch.testing.assert_close(logits(small, words), dense, rtol=1e-5, atol=1e-5)
        less = apply(model, groups, planned(groups, implanted, rank=1), low_rank, batches=[words])
        assert float((logits(less, words) - dense).abs().max()) > 1e-3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_below_its_rank_the_error_is_that_of_the_singular_values_left_out(rank, monkeypatch):
    monkeypatch.setattr(implants, "RIDGES", (1e-13,))
    model, _, groups = setting()
    small = apply(model, groups, planned(groups, {2}, rank=rank), low_rank, batches=[single()])
    x, y = contribution("bert", model, [single()], 0, {2})
    values = np.linalg.svd((y - y.mean(0)).numpy(), compute_uv=False)
    assert values[HEAD] < 1e-10 * values[0]  # linear it is
    (made,) = borrowers(small)
    with torch.no_grad():
        found = made.implant(x) + made.layer.bias - model.get_submodule(layers("bert", model)[0][3]).bias
    assert float((y - found).square().sum()) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-6)


def test_a_rank_beyond_the_width_adds_nothing_but_its_cost():
    model, example, groups = setting()
    everything = set(range(4))
    full, beyond = (
        apply(model, groups, planned(groups, everything, rank=rank), low_rank, batches=batches(example))
        for rank in (HEAD, HEAD + 3)
    )
    torch.testing.assert_close(logits(beyond, example), logits(full, example), rtol=1e-6, atol=1e-6)
    assert params(beyond) - params(full) == 3 * 4 * 2 * WIDTH


@pytest.mark.parametrize("rank", [0, 1])
def test_a_single_position_gives_its_own_contribution(rank):
    """One sentence, or one several times: in the last layer one token, of which nothing but the mean can be known."""
    model, example, groups = setting()
    one = {name: value[:1] for name, value in example.items()}
    average = apply(model, groups, planned(groups, {5}, rank=0), mean, batches=[one])
    for count in (1, 2, 3, 6, 7):
        small = apply(model, groups, planned(groups, {5}, rank=rank), low_rank, batches=[one] * count)
        torch.testing.assert_close(logits(small, one), logits(model, one), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(logits(small, example), logits(average, example), rtol=1e-3, atol=1e-3)


# what they look at


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", HEADED)
def test_an_implant_is_shown_the_positions_that_the_output_depends_on(kind, attention):
    """All heads of a layer at once, batch by batch: no padding, and in the last layer the first token alone."""
    model, example, groups = setting(kind, attention)
    data, shown = batches(example), []

    def spying(module, slots, inputs):
        shown.append((module, slots, inputs, list(inputs.batches())))
        return zero(module, slots, inputs)

    apply(model, groups, planned(groups, {1, 2, 7}, rank=2), spying, batches=data)
    expected = watched(kind, model, data)
    assert len(shown) == 2
    for layer, members in enumerate(({1, 2}, {7})):
        module, slots, inputs, pairs = shown[layer]
        assert module is model.get_submodule(layers(kind, model)[layer][3])
        assert torch.equal(slots, columns(members))
        assert (inputs.slots, inputs.rank, inputs.constant) == (WIDTH, 2 * len(members), True)
        for (x, c), (known_x, known_c) in zip(pairs, expected[layer], strict=True):
            torch.testing.assert_close(x, known_x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(c, known_c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implant", [mean, low_rank])
@pytest.mark.parametrize("kind", TEXTS)
def test_what_stands_in_padding_does_not_matter(kind, implant):
    model, example, groups = setting(kind)
    chosen = planned(groups, {1, 2, 4, 7}, {0}, rank=0 if implant is mean else 2)
    ids, keep = example["input_ids"], example["attention_mask"] == 1
    others = {**example, "input_ids": torch.where(keep, ids, (ids + 7) % 25 + 5)}
    assert not torch.equal(others["input_ids"], ids)
    one, other = (apply(model, groups, chosen, implant, batches=[x]).state_dict() for x in (example, others))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12)


def test_implants_do_not_depend_on_modes_of_the_model_or_of_the_caller():
    model, example, groups = setting()
    chosen = planned(groups, {1, 5}, {0}, rank=2)
    expected = apply(model, groups, chosen, low_rank, batches=[example])
    training = copy.deepcopy(model).train()  # with dropout
    with torch.no_grad():
        found = apply(training, groups, chosen, low_rank, batches=[example])
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    assert all(module.training for module in found.modules())
    assert not any(module.training for module in expected.modules())
    with_loss = {**example, "labels": torch.tensor([0, 1, 2])}
    again = apply(model, groups, chosen, low_rank, batches=[with_loss])
    assert torch.equal(logits(again, example), logits(expected, example))


def test_an_implant_has_the_dtype_of_the_model_and_leaves_the_model_as_it_is():
    model, example = headed("bert")
    before = copy.deepcopy(model.state_dict())
    groups = heads(couple(model, trace(model, example)))
    for implant in (zero, low_rank):
        small = apply(model, groups, planned(groups, {1, 5}, rank=2), implant, batches=[example])
        assert {p.dtype for p in small.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in small.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


# what they cost


@settings(deadline=None, max_examples=25)
@given(
    unit=st.sampled_from(["prunable", "params", "groups"]),
    target=st.floats(0.02, 0.9),
    implant=st.sampled_from([0.1, 0.25, 0.5, 0.8]),
    rank=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_the_parameters_of_implants_are_counted(unit, target, implant, rank, seed):
    """What is planned is what is there, and the budget is met; one that implants cannot meet is refused."""
    model, example, groups = setting()
    target = target * 0.4 if unit == "params" else target
    budget = Budget(**{unit: target}, implant=implant, rank=rank, layer_limit=1.0)
    try:
        chosen = plan(groups, torch.rand(len(groups), generator=seeded(seed)), budget)
    except HapError as error:
        assert "cannot be removed, at most" in str(error)  # noqa: PT017 (most of the time there is a plan)
        return
    fates = chosen.fates(groups)
    small = apply(model, groups, chosen, zero if rank else mean, batches=[example])
    assert params(small) == cost(groups, fates, rank).params
    left, gone = params(model) - params(small), int((fates != Fate.KEEP).sum())
    whole = {"prunable": len(groups) * (4 * WIDTH * HEAD + 3 * HEAD), "params": params(model), "groups": len(groups)}
    assert (gone if unit == "groups" else left) / whole[unit] >= target - 1e-9
    assert left == gone * (4 * WIDTH * HEAD + 3 * HEAD) - int((fates == Fate.IMPLANT).sum()) * rank * 2 * WIDTH
    assert chosen.removed["params"] == pytest.approx(left / params(model))
    assert chosen.rank == rank
    assert Plan.from_json(chosen.to_json()) == chosen


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("kind", HEADED)
def test_what_is_foreseen_is_what_a_counter_finds_in_every_architecture(kind, rank):
    """Parameters and MACs; the products of queries, keys and values are of no weights and count on neither side."""
    model, example, groups = setting(kind, "sdpa")
    chosen = planned(groups, {1, 5, 6}, {0}, rank)
    small = apply(model, groups, chosen, zero if rank else mean, batches=[example])
    one = tree_map(lambda t: t[:1], example)
    left = cost(groups, chosen.fates(groups), rank)
    assert (left.params, left.macs, left.groups) == (params(small), macs(small, one), 4)
    assert left.macs < macs(model, one)


def test_a_share_of_heads_with_implants_is_that_of_what_their_parameters_leave():
    """Of 8 heads of 268 parameters 0.5 are 1072: 4 heads as means, and with maps of rank 3 a fifth."""
    _, _, groups = setting()
    scores = torch.arange(8.0)
    counts = {}
    for rank in (0, 3):
        chosen = plan(groups, scores, Budget(prunable=0.5, implant=0.5, rank=rank, layer_limit=1.0)).fates(groups)
        counts[rank] = tuple(int((chosen == fate).sum()) for fate in (Fate.DROP, Fate.IMPLANT))
    assert counts == {0: (2, 2), 3: (3, 2)}


# what is refused


def test_a_plan_with_a_rank_needs_an_implant_and_one_that_looks_at_data_needs_batches():
    model, example, groups = setting()
    chosen = planned(groups, {1}, rank=2)
    with pytest.raises(HapError, match=r"the plan has implants of heads, so apply\(\) needs an implant, found none"):
        apply(model, groups, chosen, batches=[example])
    for implant in (low_rank, mean):
        with pytest.raises(HapError, match=r"calibration batches expected, found none; pass batches= to apply\(\)"):
            apply(model, groups, chosen, implant)
    assert len(borrowers(apply(model, groups, chosen, zero))) == 1  # which looks at none


class Odd(nn.Module):
    """Attention whose output is averaged over tokens before it is read, or read by two layers."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.out, self.gate = (nn.Linear(8, 8) for _ in range(5))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        c = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        c = c.mean(1) if self.how == "pooled" else c
        y = self.out(c) * self.gate(c).sigmoid() if self.how == "twice" else self.out(c) + self.gate(x.mean(1))
        return self.fc(y)


@pytest.mark.parametrize(("how", "found"), [("pooled", "1 readers and 0 layers"), ("twice", "2 readers and")])
def test_heads_that_do_not_lie_between_two_layers_take_no_implant_but_can_be_dropped(how, found):
    torch.manual_seed(0)
    model, x = Odd(how).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64, generator=seeded())
    groups = heads(couple(model, trace(model, x), "union"))
    assert len(groups) == 2
    for rank in (0, 1):
        with pytest.raises(HapError, match=f"a head with one reader, and a layer before it, expected; found {found}"):
            apply(model, groups, planned(groups, {0}, rank=rank), low_rank, batches=[x])
    chosen = planned(groups, (), {0})
    torch.testing.assert_close(logits(apply(model, groups, chosen), x), logits(mask(model, groups, chosen), x))


# a model like any other


def implanted(kind="bert", attention="eager", implant=low_rank):
    model, example, groups = setting(kind, attention)
    chosen = planned(groups, {1, 2, 4, 5, 6, 7}, {0}, rank=2)
    return apply(model, groups, chosen, implant, batches=batches(example)), example


def test_a_copy_shares_nothing_with_the_original():
    small, example = implanted()
    expected = logits(small, example)
    other = copy.deepcopy(small)
    lenders = [[m for m in model.modules() if isinstance(m, Lender)] for model in (small, other)]
    pairs = [*zip(lenders[0], borrowers(small), strict=True), *zip(lenders[1], borrowers(other), strict=True)]
    assert len(pairs) == 4
    assert all(lender.relay is borrower.relay and lender.relay.held is None for lender, borrower in pairs)
    assert len({id(borrower.relay) for _, borrower in pairs}) == 4
    with torch.no_grad():
        borrowers(other)[0].implant[0].weight.add_(1)
    assert not torch.allclose(logits(other, example), expected)
    assert torch.equal(logits(small, example), expected)


def test_a_pass_that_was_broken_off_leaves_nothing_in_copies_or_files():
    small, example = implanted()

    def stop(*_):
        raise KeyboardInterrupt

    key = small.get_submodule(layers("bert", small)[0][1])  # between query, which lends, and output, which borrows
    with key.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        small(**example)
    assert borrowers(small)[0].relay.held is not None
    other, file = copy.deepcopy(small), io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(m.relay.held is None for model in (other, loaded) for m in borrowers(model))
    assert torch.equal(logits(other, example), logits(small, example))
    assert torch.equal(logits(loaded, example), logits(small, example))


def test_a_state_dict_fits_a_second_surgery():
    first, example = implanted()
    second, _ = implanted(implant=zero)
    assert not torch.allclose(logits(first, example), logits(second, example))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first, example), logits(second, example))


def backward(model, example):
    model.zero_grad()
    loss = F.cross_entropy(model(**example).logits, torch.tensor([0, 1, 2]))
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_reach_both_factors(attention):
    """Of one that starts from zero the second first, and the first factor with the next step."""
    small, example = implanted(attention=attention)
    backward(small, example)
    assert all(p.grad is not None for p in small.parameters())
    assert all(float(p.grad.abs().max()) > 0 for b in borrowers(small) for p in b.implant.parameters())
    small, example = implanted(attention=attention, implant=zero)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    for moving in (False, True):
        backward(small, example)
        for borrower in borrowers(small):
            down, up = (float(p.grad.abs().max()) for p in borrower.implant.parameters())
            assert up > 0
            assert (down > 0) == moving
        optimizer.step()


@pytest.mark.parametrize("implant", [zero, low_rank])
def test_a_model_with_implants_is_trained(implant):
    """In train mode, with dropout, and with the activations computed anew in the backward pass."""
    small, example = implanted("bert", "sdpa", implant)
    before = backward(small.eval(), example)
    optimizer = torch.optim.Adam(small.parameters(), 0.01)
    torch.manual_seed(0)
    for step in range(12):
        if step == 6:
            checkpoint(small)
        backward(small.train(), example)
        optimizer.step()
    assert backward(small.eval(), example) < 0.5 * before
    assert logits(small, example).isfinite().all()


def checkpoint(model):
    """Activations computed anew in the backward pass; the name of this has changed in transformers 5."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def test_checkpointed_gradients_are_the_plain_ones():
    small, example = implanted()
    other = copy.deepcopy(small)
    checkpoint(other)
    for module in other.modules():  # transformers checkpoints in train mode alone; dropout would differ
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    backward(small, example)
    backward(other.train(), example)
    for (name, p), q in zip(small.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def exported(model, example):
    """The model after torch.export, and once more after a file."""
    program, file = torch.export.export(model, (), example, strict=False), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return program.module(), torch.export.load(file).module()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("with_implants", [False, True])
def test_torch_export_computes_the_same_and_comes_back_from_a_file(with_implants, attention):
    model, example, groups = setting("bert", attention)
    small = apply(model, groups, planned(groups, (), {0, 4, 5, 6, 7}))  # of the last layer no head is left
    if with_implants:
        small, _ = implanted("bert", attention)
    expected = logits(small, example)
    for program in exported(small, example):
        torch.testing.assert_close(logits(program, example), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(logits(small, example), expected)  # the export has left nothing behind


@pytest.mark.parametrize("kind", ["bert", "timm"])
def test_a_model_with_implants_is_pruned_again(kind):
    """The heads that are left are found behind what surgery has added, and modules that count heads count right."""
    model, example, groups = setting(kind, "sdpa")
    small = apply(model, groups, planned(groups, {1, 5}, {2}, rank=2), low_rank, batches=[example])
    groups = heads(couple(small, trace(small, example)))
    assert len(groups) == 5
    chosen = planned(groups, {0}, {3}, rank=1)
    again = apply(small, groups, chosen, zero)
    torch.testing.assert_close(logits(again, example), logits(mask(small, groups, chosen), example))
    assert params(again) == cost(groups, chosen.fates(groups), 1).params
