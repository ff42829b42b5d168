"""Attention heads as groups, their surgery, scores and budgets: against masks, slices, dense curvature and loops.

The heads that are expected come from the names that layers have in each architecture, which the package does not read.
"""

import copy
import math
import warnings
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from cases import HEADED, SMALL, build, headed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from hap import Budget, CrossEntropy, Fate, HapError, Plan, apply, couple, exact, hutchinson, mask, trace
from hap.cost import params
from hap.methods import ablation, hessian_trace, magnitude, michel, taylor
from hap.plan import cost, plan
from hap.structure.heads import heads
from hap.structure.layers import forward
from hap.testing import check_groups, check_score

WIDTH, HEADS, LAYERS = 16, 4, 2
HEAD = WIDTH // HEADS  # channels of a head
COUNTS = {  # what a module of attention calls its heads, and how many of these numbers there are for each
    "bert": {"num_attention_heads": 1, "all_head_size": HEAD},
    "roberta": {"num_attention_heads": 1, "all_head_size": HEAD},
    "electra": {"num_attention_heads": 1, "all_head_size": HEAD},
    "distilbert": {"n_heads": 1},
    "vit": {"num_attention_heads": 1},
    "timm": {"num_heads": 1, "attn_dim": HEAD},
}
TEXTS = ("bert", "roberta", "electra", "distilbert")
TINY = {"width": 8, "heads": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def call(model, example):
    found = forward(model, example)
    return found if isinstance(found, torch.Tensor) else found.logits


def logits(model, example):
    with torch.no_grad():
        return call(model, example)


@cache
def traced(kind, attention, **size):
    """A model in float64, an example and what feeds what; for all tests that leave the model as it is."""
    if kind == "timm":
        pytest.importorskip("timm")
    model, example = headed(kind, attention, **size)
    model, example = model.double(), tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
    return model, example, trace(model, example)


def setting(kind="bert", attention="eager", how="tied", **size):
    """A model in float64, an example and the heads."""
    model, example, feeds = traced(kind, attention, **size)
    return model, example, heads(couple(model, feeds, how))


def layers(kind, model):
    """Query, key, value and output of each layer, by name."""
    found = [n.removesuffix(HEADED[kind][0]) for n, _ in model.named_modules() if n.endswith(HEADED[kind][0])]
    return [tuple(stem + name for name in HEADED[kind]) for stem in found]


def places(kind, model, width=WIDTH, count=HEADS):
    """Of each head, layer after layer, where it lies in each weight."""
    found = []
    for *rows, out in layers(kind, model):
        for head in range(count):
            part = torch.arange(width).reshape(count, -1)[head]
            where = {f"{name}.weight": torch.zeros_like(model.get_parameter(f"{name}.weight")) for name in (*rows, out)}
            for i, name in enumerate(rows):
                where[f"{name}.weight"][part + (i * width if rows[0] == rows[1] else 0)] = 1
            where[f"{out}.weight"][:, part] = 1
            found.append({name: at.bool() for name, at in where.items()})
    return found


def summed(values, where):
    """Of what each weight holds, what lies in a head."""
    return torch.stack([values[name][at].sum() for name, at in where.items()]).sum()


def dropping(groups, gone):
    fates = torch.full((len(groups),), int(Fate.KEEP))
    fates[list(gone)] = int(Fate.DROP)
    return Plan.of(groups, fates)


def batches(example, classes=3):
    """Two batches of different sizes and lengths."""
    targets = torch.tensor([2, 0, 1, 1, 0]) % classes
    if isinstance(example, torch.Tensor) or "input_ids" not in example:
        halves = [tree_map(lambda t, of=of: t[of].flip(-1), example) for of in ([0, 1, 2], [1, 0])]
        return list(zip(halves, targets.split((3, 2)), strict=True))
    ids = torch.randint(5, 30, (2, 6), generator=seeded(2))
    keep = (torch.arange(6) < torch.tensor([[3], [6]])).long()
    return [(example, targets[:3]), ({"input_ids": ids, "attention_mask": keep}, targets[3:])]


def score(method, model, groups, batches, seed=0):
    return method(model, CrossEntropy(call=call), batches, groups, rng=seeded(seed))


# groups


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", HEADED)
def test_a_group_holds_the_rows_of_query_key_and_value_and_the_columns_of_the_output_and_nothing_else(
    kind, attention, how
):
    """By random values for every parameter, so that a slice in excess or amiss would show."""
    model, _, groups = setting(kind, attention, how)
    assert len(groups) == LAYERS * HEADS
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.dim() > 1}
    assert groups.reduce(ones).tolist() == [4 * WIDTH * HEAD] * len(groups)
    values = {name: torch.randn(p.shape, dtype=p.dtype, generator=seeded(3)) for name, p in model.named_parameters()}
    weights = {name: value for name, value in values.items() if value.dim() > 1}
    where = places(kind, model)
    expected = torch.stack([summed(weights, head) for head in where])
    torch.testing.assert_close(groups.reduce(weights), expected, rtol=1e-12, atol=1e-12)
    for i, head in enumerate(where):  # where biases are given, those of whole rows count too
        for name, at in head.items():
            expected[i] += values[name.replace("weight", "bias")][at.all(1)].sum()
    torch.testing.assert_close(groups.reduce(values), expected, rtol=1e-12, atol=1e-12)
    names = list(dict.fromkeys(f"{name}.weight" for layer in layers(kind, model) for name in layer))
    assert sorted(groups.weights()) == sorted(names)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "attention"])
def test_a_model_without_attention_is_refused_in_one_line(name):
    model, example = build(SMALL, name)
    for how in ("tied", "union"):
        groups = couple(model, trace(model, example), how)
        with pytest.raises(HapError, match=r"^heads: a model with attention expected, found no group .*$") as refusal:
            heads(groups)
        assert "\n" not in str(refusal.value)


def test_gated_neurons_are_no_heads():
    """The halves of a gated linear unit meet in one slot, as queries and keys do, but in one alone."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.both, self.last = nn.Linear(4, 6), nn.Linear(6, 10), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(F.glu(self.both(F.relu(self.stem(x)))))

    for how in ("tied", "union"):
        groups = couple(Gated(), trace(Gated().eval(), torch.randn(2, 4)), how)
        assert len(groups) == 6 + 5
        with pytest.raises(HapError, match="a model with attention expected"):
            heads(groups)


def test_only_heads_are_found_beside_gated_neurons():
    pytest.importorskip("timm")
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": LAYERS, "num_classes": 3}
    model = VisionTransformer(img_size=8, patch_size=4, mlp_layer=SwiGLUPacked, **sizes).eval()
    groups = heads(couple(model, trace(model, torch.randn(1, 3, 8, 8, generator=seeded()))))
    assert len(groups) == LAYERS * HEADS
    assert all(".attn." in name for name in groups.weights())


def test_a_stranger_s_attention_has_heads_too():
    model, example = build(SMALL, "attention")
    groups = heads(couple(model, trace(model, example), "union"))
    weights = {f"{name}.weight": torch.ones_like(model.get_parameter(f"{name}.weight")) for name in "q k v out".split()}
    assert groups.weights() == list(weights)
    assert groups.reduce(weights).tolist() == [4 * 8 * 4] * 2


# surgery


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", HEADED)
def test_heads_that_are_removed_are_heads_that_are_masked(kind, attention, how):
    """Some of each layer, all of one, all of both: the layers are narrower, and modules that count heads count right.

    The mask zeroes rows and columns of the dense model; that these are the right ones is the business of the slices.
    """
    model, example, groups = setting(kind, attention, how)
    dense = logits(model, example)
    for gone in ({1, 4, 6}, {0, 1, 2, 3, 7}, {4, 5, 6, 7}, {*range(8)}):
        chosen = dropping(groups, gone)
        small = apply(model, groups, chosen)
        found = logits(small, example)
        torch.testing.assert_close(found, logits(mask(model, groups, chosen), example), rtol=1e-11, atol=1e-11)
        assert float((found - dense).abs().max()) > 1e-2  # a head mask that nothing reads would change nothing
        assert params(small) == cost(groups, chosen.fates(groups)).params == params(model) - removed(len(gone))
        for layer, names in enumerate(layers(kind, model)):
            left = HEADS - len(gone & {*range(HEADS * layer, HEADS * (layer + 1))})
            wide = 3 if kind == "timm" else 1
            assert [small.get_submodule(n).out_features for n in names] == [*[wide * HEAD * left] * 3, WIDTH]
            assert small.get_submodule(names[3]).in_features == HEAD * left
            around = small.get_submodule(names[0].rpartition(".")[0])
            assert {n: getattr(around, n) for n in COUNTS[kind]} == {n: k * left for n, k in COUNTS[kind].items()}
        assert {type(m) for m in small.modules()} == {type(m) for m in model.modules()}


def removed(count):
    """How many parameters so many heads have, the biases of query, key and value included."""
    return count * (4 * WIDTH * HEAD + 3 * HEAD)


@pytest.mark.parametrize("kind", [kind for kind in HEADED if kind != "timm"])
def test_a_pruned_model_computes_the_same_with_either_attention(kind):
    found = []
    for attention in ("eager", "sdpa"):
        model, example, groups = setting(kind, attention)
        found += [logits(apply(model, groups, dropping(groups, gone)), example) for gone in ({1, 4, 6}, {0, 1, 2, 3})]
    error = 1e-5 if kind == "vit" else 1e-10  # its plain softmax is in float32
    torch.testing.assert_close(found[0], found[2], rtol=error, atol=error)
    torch.testing.assert_close(found[1], found[3], rtol=error, atol=error)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", TEXTS)
def test_padding_is_still_not_looked_at_and_other_lengths_still_run(kind, attention):
    model, example, groups = setting(kind, attention)
    chosen = dropping(groups, {0, 1, 2, 3, 5})
    small = apply(model, groups, chosen)
    ids = example["input_ids"]
    others = torch.where(example["attention_mask"] == 1, ids, (ids + 7) % 25 + 5)
    assert not torch.equal(others, ids)
    torch.testing.assert_close(logits(small, {**example, "input_ids": others}), logits(small, example))
    (_, _), (longer, _) = batches(example)
    torch.testing.assert_close(logits(small, longer), logits(mask(model, groups, chosen), longer))


@pytest.mark.parametrize("kind", HEADED)
def test_the_kit_passes_on_heads(kind):
    model, example, groups = setting(kind, "sdpa", "union")
    check_groups(model, example, groups, trials=3, tolerance=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_surgery_is_masking_for_random_plans_and_lengths(data):
    attention, how = data.draw(st.sampled_from(["eager", "sdpa"])), data.draw(st.sampled_from(["tied", "union"]))
    model, _, groups = setting("bert", attention, how)
    chosen = dropping(groups, data.draw(st.sets(st.integers(0, len(groups) - 1), min_size=1)))
    size, longest = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, longest), min_size=size, max_size=size)))
    ids = torch.randint(5, 30, (size, longest), generator=seeded(data.draw(st.integers(0, 99))))
    example = {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
    small = apply(model, groups, chosen)
    expected = logits(mask(model, groups, chosen), example)
    torch.testing.assert_close(logits(small, example), expected, rtol=1e-11, atol=1e-11)
    assert params(small) == cost(groups, chosen.fates(groups)).params


def test_a_model_whose_heads_were_pruned_is_pruned_again():
    model, example, _ = setting("bert")
    for gone in ({0, 5}, {0, 1}):
        groups = heads(couple(model, trace(model, example)))
        chosen = dropping(groups, gone)
        small = apply(model, groups, chosen)
        torch.testing.assert_close(logits(small, example), logits(mask(model, groups, chosen), example))
        model = small
    assert [model.get_submodule(q).out_features for q, *_ in layers("bert", model)] == [HEAD, 3 * HEAD]


# scores


def gauss_newton(model, batches, names):
    """The diagonal of the mean of J^T (diag(p) - p p^T) J, with J the dense Jacobian of the logits by each weight."""
    found, count = dict.fromkeys(names, 0.0), sum(len(y) for _, y in batches)
    weights = tuple(model.get_parameter(name).detach() for name in names)
    for inputs, _ in batches:

        def outputs(*values, inputs=inputs):
            return functional_call(model, dict(zip(names, values, strict=True)), (), inputs).logits

        p = outputs(*weights).detach().softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        for name, j in zip(names, torch.autograd.functional.jacobian(outputs, weights), strict=True):
            found[name] += torch.einsum("nc...,ncd,nd...->...", j, inner, j) / count
    return found


def scores_of(diagonal, model, where):
    """Trace of the diagonal over each head, by its mean, times half the squared norm."""
    squares = {name: model.get_parameter(name).detach() ** 2 for name in diagonal}
    size = [sum(int(at.sum()) for at in each.values()) for each in where]
    return torch.stack(
        [summed(diagonal, each) / (2 * p) * summed(squares, each) for each, p in zip(where, size, strict=True)]
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_hessian_score_of_heads_is_that_of_a_dense_jacobian(attention):
    """The oracle is the Gauss-Newton matrix itself, so it cannot see how far that is from the Hessian."""
    model, example, groups = setting("bert", attention, **TINY)
    where, data = places("bert", model, 8, 2), batches(example)
    expected = scores_of(gauss_newton(model, data, groups.weights()), model, where)
    assert len(expected) == 4
    torch.testing.assert_close(score(hessian_trace, model, groups, data), expected, rtol=1e-8, atol=0)


def hessian_diagonal(model, batches, names):
    """The diagonal of the Hessian of the mean loss, from whole rows of it for each weight."""
    weights = [model.get_parameter(name) for name in names]
    total = sum(F.cross_entropy(call(model, x), y, reduction="sum") for x, y in batches)
    slopes = torch.autograd.grad(total / sum(len(y) for _, y in batches), weights, create_graph=True)
    found = {}
    for name, weight, slope in zip(names, weights, slopes, strict=True):
        unit = torch.eye(weight.numel(), dtype=weight.dtype).reshape(-1, *weight.shape)
        (rows,) = torch.autograd.grad(slope, weight, unit, retain_graph=True, is_grads_batched=True)
        found[name] = rows.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)
    return {name: diagonal.detach() for name, diagonal in found.items()}


def test_probes_estimate_the_trace_of_the_true_hessian_over_each_head_within_their_error():
    """And are sure enough to tell it from the Gauss-Newton trace, which is not the same."""
    model, example, groups = setting("bert", **TINY)
    where, data, names = places("bert", model, 8, 2), batches(example), groups.weights()
    dense = hessian_diagonal(model, data, names)
    expected = torch.stack([summed(dense, each) for each in where])
    found = hutchinson(model, CrossEntropy(call=call), data, groups, probes=300, rng=seeded(1), names=names)
    z = (found.trace - expected) / found.trace_stderr
    assert float(z.abs().max()) < 3.5
    assert 0.1 < float(z.square().mean()) < 3
    other = gauss_newton(model, data, names)
    other = torch.stack([summed(other, each) for each in where])
    assert float(((found.trace - other) / found.trace_stderr).abs().min()) > 5


def test_the_score_by_probes_is_their_trace_scaled_with_either_attention():
    """Both attentions see the same probes, and plain kernels, which alone have second derivatives."""
    model, example, groups = setting("bert", **TINY)
    where, data, names = places("bert", model, 8, 2), batches(example), groups.weights()
    trace = hutchinson(model, CrossEntropy(call=call), data, groups, probes=4, rng=seeded(1), names=names).trace
    squares = {name: model.get_parameter(name).detach() ** 2 for name in names}
    norms = torch.stack([summed(squares, each) for each in where])
    by_probes = partial(hessian_trace, curvature="hutchinson", probes=4)
    for attention in ("eager", "sdpa"):
        model, _, groups = setting("bert", attention, **TINY)
        found = score(by_probes, model, groups, data, seed=1)
        torch.testing.assert_close(found, trace * norms / (2 * 4 * 8 * 4), rtol=1e-8, atol=0)


def test_a_drawn_column_is_unbiased_for_heads_within_the_error_it_states():
    model, example, groups = setting("bert", labels=5, **TINY)
    # each sample several times, and drawn for anew
    data = [tree_map(lambda t: t.repeat(6, *[1] * (t.dim() - 1)), batch) for batch in batches(example, 5)]
    how = {"of": groups.weights(), "per": "weight"}
    whole = exact(model, CrossEntropy(call=call), data, groups, **how).trace
    rng, draws = seeded(5), []
    for _ in range(25):
        draws.append(exact(model, CrossEntropy(call=call), data, groups, columns=1, rng=rng, **how))
    traces, stated = (torch.stack([getattr(d, name) for d in draws]) for name in ("trace", "trace_stderr"))
    z = (traces.mean(0) - whole) / (traces.std(0) / len(draws) ** 0.5)
    assert float(z.abs().max()) < 3.5
    spread = (traces - whole).square().mean(0).sqrt() / stated.square().mean(0).sqrt()
    assert bool((spread > 0.1).all())  # it is drawn, and the bound is no idle one
    assert bool((spread < 1.1).all())


def michel_by_hand(model, batches, normalise):
    """The published code's loop: hooks on what attention writes, the gradient of the summed loss by it, layer by layer.

    As there, tokens that are not padding count, and in the last layer sentences; and heads come from a reshape.
    """
    model = copy.deepcopy(model)
    attention = [layer.attention.self for layer in model.bert.encoder.layer]
    importance = torch.zeros(len(attention), HEADS, dtype=torch.float64)
    tokens = sentences = 0
    for inputs, targets in batches:
        contexts = []

        def keep(module, args, output, contexts=contexts):
            output[0].retain_grad()
            contexts.append(output[0])

        handles = [module.register_forward_hook(keep) for module in attention]
        F.cross_entropy(model(**inputs).logits, targets, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for layer, context in enumerate(contexts):
            c, slope = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (context.detach(), context.grad))
            importance[layer] += torch.einsum("bhli,bhli->bhl", c, slope).abs().sum(-1).sum(0)
        tokens, sentences = tokens + int(inputs["attention_mask"].sum()), sentences + len(targets)
    importance[:-1] /= tokens
    importance[-1] /= sentences
    if normalise:
        importance /= importance.square().sum(-1, keepdim=True).sqrt() + 1e-20
    return importance.flatten()


@pytest.mark.parametrize("normalise", [True, False])
def test_michels_score_is_that_of_the_published_loop(normalise):
    """With padding and batches of unequal size and length; on the fused kernel too, where the loop is on plain ops."""
    model, example, _ = setting("bert")
    expected = michel_by_hand(model, batches(example), normalise)
    for attention in ("eager", "sdpa"):
        model, _, groups = setting("bert", attention)
        found = score(partial(michel, normalise=normalise), model, groups, batches(example))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    with torch.no_grad():  # the caller's mode does not matter
        again = score(partial(michel, normalise=normalise), model, groups, batches(example))
    assert torch.equal(found, again)


def test_michels_score_needs_batches_and_groups_that_are_read_alone():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(F.relu(self.a(x) + self.b(x)))

    model, _, groups = setting("bert")
    with pytest.raises(HapError, match="michel: calibration batches expected"):
        score(michel, model, groups, [])
    model, x = Sum(), torch.randn(2, 4, generator=seeded())
    data = [(x, torch.tensor([0, 1]))]
    with pytest.raises(HapError, match="a group that is read alone, found none"):
        score(michel, model, couple(model, trace(model, x), "union"), data)
    assert score(michel, model, couple(model, trace(model, x), "tied"), data).shape == (6,)


@pytest.mark.parametrize("kind", ["bert", "vit", "timm"])
def test_ablation_is_the_loss_that_removing_a_head_adds(kind):
    model, example, groups = setting(kind, "sdpa")
    data = batches(example)

    def mean(model):
        losses = [F.cross_entropy(logits(model, x), y, reduction="sum") for x, y in data]
        return sum(losses) / sum(len(y) for _, y in data)

    expected = torch.stack([mean(apply(model, groups, dropping(groups, {h}))) - mean(model) for h in range(8)])
    assert float(expected.abs().min()) > 1e-6  # each head matters
    torch.testing.assert_close(score(ablation, model, groups, data).double(), expected, rtol=1e-6, atol=1e-9)
    assert hooks(model) == 0


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_ablation_and_michel_leave_no_hooks_behind_when_a_pass_fails():
    model, example, groups = setting("bert")
    left = iter(range(3))

    def failing(model, inputs):
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return call(model, inputs)

    for method in (ablation, michel):
        with pytest.raises(RuntimeError, match="out of memory"):
            method(model, CrossEntropy(call=failing), batches(example), groups, rng=seeded())
        assert hooks(model) == 0
    with pytest.raises(HapError, match="ablation: calibration batches expected, found none"):
        score(ablation, model, groups, [])


SCORES = {
    "exact": hessian_trace,
    "michel": michel,
    "raw michel": partial(michel, normalise=False),
    "ablation": ablation,
    "L1": magnitude,
    "taylor": taylor,
}


@pytest.mark.parametrize("kind", ["bert", "timm"])
@pytest.mark.parametrize("method", SCORES)
def test_each_score_passes_the_kit_on_heads(method, kind):
    model, example, groups = setting(kind, "sdpa")
    model = copy.deepcopy(model).train()  # the kit looks at modes too
    check_score(SCORES[method], model, CrossEntropy(call=call), batches(example), groups)


@pytest.mark.parametrize("method", SCORES)
def test_permuting_heads_permutes_scores(method):
    """In the first layer; the second stays as it is."""
    model, example, groups = setting("bert")
    before = score(SCORES[method], model, groups, batches(example))
    model, order = copy.deepcopy(model), torch.tensor([2, 0, 3, 1])
    channels = torch.arange(WIDTH).reshape(HEADS, -1)[order].flatten()
    *rows, out = layers("bert", model)[0]
    with torch.no_grad():
        for name in rows:
            for own in model.get_submodule(name).parameters():
                own.copy_(own[channels])
        weight = model.get_parameter(f"{out}.weight")
        weight.copy_(weight[:, channels])
    after = score(SCORES[method], model, groups, batches(example))
    assert not torch.allclose(before[:4], after[:4], rtol=1e-3)
    torch.testing.assert_close(after, torch.cat([before[:4][order], before[4:]]), rtol=1e-5, atol=1e-8)


# budgets


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9])
def test_a_share_of_what_can_be_pruned_is_that_share_of_the_heads_rounded_up(share):
    model, _, groups = setting("bert")
    scores = torch.rand(len(groups), generator=seeded(1))
    chosen = plan(groups, scores, Budget(prunable=share, layer_limit=1.0))
    fates, count = chosen.fates(groups), math.ceil(share * len(groups) - 1e-9)
    assert (fates == Fate.DROP).nonzero()[:, 0].tolist() == sorted(scores.argsort()[:count].tolist())
    assert int((fates == Fate.KEEP).sum()) == len(groups) - count
    assert chosen.removed["params"] == pytest.approx(removed(count) / params(model))


def test_a_layer_loses_its_last_head_only_where_the_limit_says_so():
    model, example, groups = setting("bert")
    scores = torch.arange(8.0)  # the first layer first
    fates = plan(groups, scores, Budget(prunable=0.5)).fates(groups)
    assert (fates == Fate.KEEP).nonzero()[:, 0].tolist() == [3, 5, 6, 7]
    chosen = plan(groups, scores, Budget(prunable=0.5, layer_limit=1.0))
    assert (chosen.fates(groups) == Fate.KEEP).nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    assert logits(apply(model, groups, chosen), example).isfinite().all()
    with pytest.raises(HapError, match=r"budget.prunable: 0.9 cannot be removed, at most 0.7500 within layer_limit"):
        plan(groups, scores, Budget(prunable=0.9))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prunable": 0.0}, "budget.prunable: a fraction between 0 and 1 to remove expected, found 0.0"),
        ({"prunable": 1.0}, "budget.prunable: a fraction between 0 and 1 to remove expected, found 1.0"),
        ({"prunable": 0.5, "params": 0.5}, r"exactly one of .* expected, found \['params', 'prunable'\]"),
        ({"prunable": 0.5, "rank": 1}, "budget.rank: a number of at least 0, with implants expected, found 1"),
        ({"prunable": 0.5, "implant": 0.5, "rank": -1}, "budget.rank: a number of at least 0, .* found -1"),
    ],
)
def test_a_bad_budget_of_heads_is_refused_in_one_line(wrong, says):
    with pytest.raises(HapError, match=says) as refusal:
        Budget(**wrong)
    assert "\n" not in str(refusal.value)


def test_a_rank_for_groups_that_are_no_heads_is_refused_in_one_line():
    model, example, _ = setting("bert")
    groups = couple(model, trace(model, example))
    budget = Budget(prunable=0.5, implant=0.5, rank=1)
    with pytest.raises(HapError, match="heads expected for implants of rank 1, found groups of rows; see") as refusal:
        plan(groups, torch.rand(len(groups)), budget)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("curvature", ["exact", "hutchinson"])
def test_the_hessian_score_within_layers_has_norm_one_in_each_and_the_same_order(curvature):
    model, example, groups = setting()
    options = {"curvature": curvature, "probes": 4}
    plain, within = (
        score(partial(hessian_trace, normalise=normalise, **options), model, groups, batches(example))
        for normalise in (False, True)
    )
    for one, other in zip(plain.view(2, -1), within.view(2, -1), strict=True):  # two layers
        assert float(other.norm()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(other * one.norm(), one)


def test_what_is_pruned_by_halves_is_asked_with_normalised_scores():
    model, example, groups = setting()
    asked, halves = [], []
    for offered in ({"pruned": lambda found: asked.append(found) or found > found.median()}, {"halves": halves.append}):
        method = partial(hessian_trace, curvature="hutchinson", probes=4, normalise=True, **offered)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            score(method, model, groups, batches(example))
    assert torch.equal(torch.stack(asked), halves[0])
    assert halves[0].view(2, 2, -1).norm(dim=-1).flatten().tolist() == pytest.approx([1] * 4, rel=1e-5)
