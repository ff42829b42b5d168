"""Scores against loops over groups, and what must not change them."""

from functools import partial

import pytest
import torch
from cases import SMALL, build
from torch import nn
from torch.func import functional_call

from hap import Budget, CrossEntropy, HapError, couple, hutchinson, trace
from hap.methods import ablation, agree, hessian_trace, magnitude, random, taylor, uniform
from hap.plan import Fate, plan
from hap.testing import check_score

SCORES = {
    "exact": hessian_trace,
    "two columns": partial(hessian_trace, columns=2),
    "hutchinson": partial(hessian_trace, curvature="hutchinson", probes=3),
    "L1": magnitude,
    "L2": partial(magnitude, order=2),
    "taylor": taylor,
    "random": random,
    "uniform": uniform,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def setting(name, how="tied", parts=(3, 4)):
    """A small model in float64, batches and groups."""
    model, example = build(SMALL, name)
    model = model.double()
    x = torch.randn(sum(parts), *example.shape[1:], dtype=torch.float64, generator=seeded(3))
    y = torch.randint(0, model(x).shape[1], (len(x),), generator=seeded(4))
    batches = list(zip(x.split(parts), y.split(parts), strict=True))
    return model, batches, couple(model, trace(model, x), how)


def members(model, groups):
    """For each group its rows, as (weight, row) pairs."""
    found = [[] for _ in range(len(groups))]
    for name, s in groups.shapes.items():
        for i in range(s.rows if s.mixing else 0):
            if (group := int(groups.row_group[s.first_row + i])) >= 0:
                found[group].append((f"{name}.weight", i))
    return found


def score(method, model, batches, groups, seed=0):
    return method(model, CrossEntropy(), batches, groups, rng=seeded(seed))


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_the_hessian_score_is_the_mean_curvature_times_half_the_squared_norm(name, how):
    """From the dense Hessian of each weight, group by group: trace / (2 p) * ||w||^2."""
    model, batches, groups = setting(name, how)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    diagonal = {}
    for key in {key for rows in members(model, groups) for key, _ in rows}:
        weight = model.get_parameter(key).detach()

        def mean(value, key=key):
            return nn.functional.cross_entropy(functional_call(model, {key: value}, (x,)), y)

        hessian = torch.autograd.functional.hessian(mean, weight, vectorize=True)
        diagonal[key] = hessian.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)
    expected = []
    for rows in members(model, groups):
        h = torch.cat([diagonal[key][i].flatten() for key, i in rows])
        w = torch.cat([model.get_parameter(key).detach()[i].flatten() for key, i in rows])
        expected.append(h.sum() / (2 * len(w)) * w.square().sum())
    assert torch.allclose(score(hessian_trace, model, batches, groups), torch.stack(expected), rtol=1e-10, atol=1e-14)


def test_its_estimate_by_probes_is_that_of_the_same_seed():
    """That the estimate itself is right, the tests of curvature find out."""
    model, batches, groups = setting("mlp")
    estimate = hutchinson(model, CrossEntropy(), batches, groups, probes=3, rng=seeded(1)).trace
    expected = []
    for g, rows in enumerate(members(model, groups)):
        w = torch.cat([model.get_parameter(key).detach()[i].flatten() for key, i in rows])
        expected.append(estimate[g] / (2 * len(w)) * w.square().sum())
    assert torch.allclose(score(SCORES["hutchinson"], model, batches, groups, seed=1), torch.stack(expected))


@pytest.mark.parametrize("order", [1, 2])
def test_magnitude_is_the_power_mean_of_a_groups_weights(order):
    model, batches, groups = setting("residual")
    expected = []
    for rows in members(model, groups):
        w = torch.cat([model.get_parameter(key).detach()[i].flatten() for key, i in rows])
        expected.append(w.abs().mean() if order == 1 else w.square().mean().sqrt())
    assert torch.allclose(score(partial(magnitude, order=order), model, batches, groups), torch.stack(expected))


def test_taylor_is_the_squared_first_order_change_averaged_over_batches():
    model, batches, groups = setting("residual")
    expected = torch.zeros(len(groups), dtype=torch.float64)
    for x, y in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for g, rows in enumerate(members(model, groups)):
            change = 0.0
            for key, i in rows:
                p = model.get_parameter(key)
                change += float((p.grad[i] * p.detach()[i]).sum())
            expected[g] += change**2 / len(batches)
    model.zero_grad()
    assert torch.allclose(score(taylor, model, batches, groups), expected, rtol=1e-10)


def test_random_repeats_under_a_seed_and_not_under_another():
    model, batches, groups = setting("mlp")
    assert torch.equal(score(random, model, batches, groups, 1), score(random, model, batches, groups, 1))
    assert not torch.equal(score(random, model, batches, groups, 1), score(random, model, batches, groups, 2))


def test_uniform_prunes_the_same_fraction_of_every_layer():
    """To one group a layer: layers of 12, 24 and 36 neurons, weights of very different size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 36), nn.Linear(36, 3)
    )
    model[2].weight.data *= 100
    groups = couple(model, trace(model, torch.randn(1, 4)))
    scores = score(uniform, model, [], groups)
    fates = plan(groups, scores, Budget(groups=0.5)).fates(groups)
    for layer, width in ((0, 12), (2, 24), (4, 36)):
        s = groups.shapes[str(layer)]
        of = groups.row_group[s.first_row : s.first_row + s.rows]
        assert abs(int((fates[of] == Fate.DROP).sum()) - width / 2) <= 1
        norms = model[layer].weight.abs().mean(1)
        assert torch.equal(scores[of].argsort(), norms.argsort())


def test_uniform_counts_a_stream_in_its_first_layer():
    model, batches, groups = setting("option-b")
    scores = score(uniform, model, batches, groups)
    s = groups.shapes["conv1"]
    of = groups.row_group[s.first_row : s.first_row + s.rows]
    assert sorted(scores[of].tolist()) == [0.125, 0.375, 0.625, 0.875]
    assert scores.min() > 0
    assert scores.max() < 1


@pytest.mark.parametrize("method", ["exact", "L1", "L2", "taylor", "uniform"])
def test_permuting_channels_permutes_scores(method):
    model, batches, groups = setting("plain")
    order = torch.tensor([2, 0, 3, 1])
    before = score(SCORES[method], model, batches, groups)
    with torch.no_grad():
        for own in (model[0].weight, model[0].bias):
            own.copy_(own[order])
        model[3].weight.copy_(model[3].weight[:, order])
    after = score(SCORES[method], model, batches, groups)
    of = groups.row_group[:4]
    assert torch.allclose(after[of], before[of][order], rtol=1e-10)
    rest = [g for g in range(len(groups)) if g not in of.tolist()]
    assert torch.allclose(after[rest], before[rest], rtol=1e-10)


@pytest.mark.parametrize("method", ["exact", "taylor"])
def test_scaling_a_channel_up_and_its_reader_down_leaves_curvature_and_gradient_scores(method):
    """Both are of second order in g w, or H w w, which a rectifier's rescaling does not change; magnitudes it does."""
    model, batches, groups = setting("mlp")
    before = score(SCORES[method], model, batches, groups)
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[0].bias.mul_(3)
        model[2].weight.div_(3)
    after = score(SCORES[method], model, batches, groups)
    assert torch.allclose(after, before, rtol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "residual"])
@pytest.mark.parametrize("method", SCORES)
def test_each_score_passes_the_kit(method, name):
    model, batches, groups = setting(name, "union")
    model.train()
    check_score(SCORES[method], model, CrossEntropy(), batches, groups)


@pytest.mark.parametrize("score", [taylor, hessian_trace, ablation], ids=["taylor", "hessian_trace", "ablation"])
def test_a_batch_of_ignored_targets_changes_no_score(score):
    model, batches, groups = setting("mlp")
    ignored = (batches[0][0], torch.full_like(batches[0][1], -100))
    found, expected = (
        score(model, CrossEntropy(), b, groups, rng=torch.Generator().manual_seed(0))
        for b in ([ignored, *batches], batches)
    )
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "score", [magnitude, uniform, taylor, hessian_trace, ablation], ids=lambda score: score.__name__
)
def test_a_weight_that_is_not_finite_is_refused_by_each_score_with_its_name(score):
    model, batches, groups = setting("mlp")
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(HapError, match=r"finite numbers expected, found 1 of 56 in 2.weight that are not"):
        score(model, CrossEntropy(), batches, groups, rng=torch.Generator())


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (taylor, "taylor, gradient: finite numbers expected, found 48 of 48 in 0.weight that are not"),
        (ablation, "ablation: a finite loss of the model as it is expected, found nan"),
    ],
)
def test_a_slope_or_a_loss_that_is_not_finite_is_refused_by_name(score, says):
    model, [(x, y), *_], groups = setting("mlp")
    with pytest.raises(HapError, match=f"^{says}"):
        score(model, CrossEntropy(), [(x * torch.nan, y)], groups, rng=torch.Generator())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("score", [taylor, ablation])
def test_a_loss_of_torch_is_refused_by_the_scores_that_need_more(score):
    model, batches, groups = setting("mlp")
    with pytest.raises(HapError, match=f"^{score.__name__}: a loss with .*mass expected"):
        score(model, torch.nn.CrossEntropyLoss(), batches, groups, rng=torch.Generator())


def test_a_score_under_inference_mode_is_that_outside():
    model, batches, groups = setting("mlp")
    expected = taylor(model, CrossEntropy(), batches, groups, rng=torch.Generator())
    with torch.inference_mode():
        found = taylor(model, CrossEntropy(), [(x.clone(), y) for x, y in batches], groups, rng=torch.Generator())
    assert torch.equal(found, expected)


def test_wrong_options_are_refused(unchecked):
    model, batches, groups = setting("mlp")
    with pytest.raises(HapError, match="curvature 'exact' or 'hutchinson' expected, found 'fisher'"):
        score(partial(hessian_trace, curvature="fisher"), model, batches, groups)
    with pytest.raises(HapError, match="order 1 or 2 expected, found 3"):
        score(partial(magnitude, order=3), model, batches, groups)
    with pytest.raises(HapError, match="taylor: calibration batches expected, found none"):
        score(taylor, model, [], groups)
    with pytest.raises(HapError, match="probes of at least 1 expected"):
        score(partial(hessian_trace, curvature="hutchinson", probes=0), model, batches, groups)


def halved(groups, part=0.5):
    """What a budget of groups would prune."""
    return lambda scores: scores <= scores.sort().values[int(part * len(groups))]


def test_probes_that_do_not_determine_what_is_pruned_are_warned_of():
    model, batches, groups = setting("residual")
    noisy = partial(hessian_trace, curvature="hutchinson", probes=2, pruned=halved(groups))
    with pytest.warns(UserWarning, match=r"2 probes do not determine what is pruned: their halves agree on \d+% of it"):
        score(noisy, model, batches, groups)
    found = []
    score(partial(noisy, halves=found.append), model, batches, groups)  # the caller judges
    assert found[0].shape == (2, len(groups))


def test_probes_stop_once_their_halves_agree():
    model, batches, groups = setting("residual")
    asked = []

    def pruned(scores):
        asked.append(scores)
        return halved(groups)(scores)

    given = {"curvature": "hutchinson", "block": True, "probes": 5000, "confidence": 0.8}
    found = score(partial(hessian_trace, **given, pruned=pruned), model, batches, groups)
    assert 2 <= len(asked) < 1000
    assert agree(halved(groups)(asked[-1]), halved(groups)(asked[-2])) >= 0.8
    exact = score(SCORES["exact"], model, batches, groups)
    assert agree(halved(groups)(found), halved(groups)(exact)) >= 0.6
    for wrong in ({"confidence": 1.5}, {"pruned": None}):
        with pytest.raises(HapError, match="confidence in 0 to 1 and what is pruned expected"):
            score(partial(hessian_trace, **{**given, "pruned": pruned, **wrong}), model, batches, groups)


def test_two_sets_agree_by_the_share_of_the_larger():
    one, other = torch.tensor([True, True, False, True]), torch.tensor([True, False, False, False])
    assert agree(one, other) == agree(other, one) == pytest.approx(1 / 3)
    assert agree(one, one) == 1
