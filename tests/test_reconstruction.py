"""Orders of removal and selection against brute force, which solves each regression anew."""

import pytest
import torch
import torch.nn.functional as F
from cases import SMALL, build
from torch import nn

from hap import CrossEntropy, Fate, HapError, couple, trace
from hap.methods import cap, obs, uniform
from hap.plan import Budget, plan
from hap.reconstruction import Sweep, in_streams, order, ranks
from hap.structure.heads import heads
from hap.structure.layers import forward
from hap.surgery.moments import Sums


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(channels=6, width=4, rows=3, seed=0):
    """A covariance of correlated columns, `width` of them a channel, and weights."""
    rng = seeded(seed)
    mix = torch.randn(channels * width, channels * width, dtype=torch.float64, generator=rng)
    return mix @ mix.T / len(mix), torch.randn(rows, channels * width, dtype=torch.float64, generator=rng)


def left(s, w, kept):
    """What is lost when the columns `kept` are regressed on: tr(W S W') - tr(B' A^-1 B)."""
    b = s[kept] @ w.T
    return float((w @ s @ w.T).trace() - (b.T @ torch.linalg.solve(s[kept][:, kept], b)).trace())


def sweeps(s, w, how, width=4):
    blocks = torch.arange(len(s)).reshape(-1, width)
    m, r = (torch.linalg.inv(s), w.clone()) if how == "removal" else (s.clone(), w @ s)
    return Sweep(m, r, torch.arange(len(blocks)), blocks, 1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("channels", [2, 4, 6])
def test_greedy_removal_is_that_of_brute_force(channels, seed):
    s, w = problem(channels, seed=seed)
    blocks, kept, expected = torch.arange(len(s)).reshape(channels, -1), list(range(channels)), []
    while len(kept) > 1:
        losses = [left(s, w, blocks[[k for k in kept if k != out]].flatten()) for out in kept]
        expected.append(kept.pop(losses.index(min(losses))))
    assert order([sweeps(s, w, "removal")], list(range(channels)), "removal") == expected + kept


@pytest.mark.parametrize("seed", range(3))
def test_greedy_selection_is_that_of_brute_force(seed):
    s, w = problem(seed=seed)
    blocks, chosen = torch.arange(len(s)).reshape(6, -1), []
    while len(chosen) < 6:
        losses = {k: left(s, w, blocks[[*chosen, k]].flatten()) for k in range(6) if k not in chosen}
        chosen.append(min(losses, key=losses.get))
    assert order([sweeps(s, w, "selection")], list(range(6)), "selection") == chosen[::-1]


def test_the_rises_add_up_to_what_is_lost():
    """After each removal the weights are the best of those left, so the losses are the sums of the rises."""
    s, w = problem()
    sweep, lost, kept = sweeps(s, w, "removal"), 0.0, list(range(6))
    for out in (3, 0, 5):
        lost += float(sweep.rises()[sweep.members == out])
        sweep.forget(torch.tensor([out]))
        kept.remove(out)
        assert lost == pytest.approx(left(s, w, torch.arange(24).reshape(6, 4)[kept].flatten()), rel=1e-8)


def test_of_many_several_go_at_a_time_and_little_more_is_lost(monkeypatch):
    s, w = problem(channels=160, width=1, seed=3)
    several = order([sweeps(s, w, "removal", width=1)], list(range(160)), "removal")
    monkeypatch.setattr("hap.reconstruction.EXACT", 10**6)
    single = order([sweeps(s, w, "removal", width=1)], list(range(160)), "removal")
    assert sorted(several) == sorted(single) == list(range(160))
    assert several != single
    halves = [left(s, w, torch.tensor(each[80:])) for each in (several, single)]
    assert halves[0] < 1.1 * halves[1]


def test_of_two_copies_one_goes_first_and_costs_nothing():
    """The other is then worth as much as both: it goes last."""
    s, w = problem(4, 1, seed=1)
    twice = torch.tensor([0, 1, 2, 3, 2])
    s, w = s[twice][:, twice] + 1e-10 * torch.eye(5, dtype=torch.float64), w[:, twice]
    sweep = sweeps(s, w, "removal", width=1)
    assert float(sweep.rises()[[2, 4]].max()) < 1e-8 < float(sweep.rises()[[0, 1, 3]].min())
    assert order([sweep], list(range(5)), "removal")[0] in (2, 4)


def drawn(name, how="tied"):
    model, example = build(SMALL, name)
    batches = [torch.randn(32, *example.shape[1:], generator=seeded(i)) for i in range(3)]
    return model, couple(model, trace(model, example), how), batches


@pytest.mark.parametrize("score", [obs, cap])
@pytest.mark.parametrize("allocation", ["uniform", "trace", "magnitude"])
def test_an_allocation_says_how_much_and_the_order_which(score, allocation):
    model, groups, batches = drawn("plain")
    pairs = [(x, torch.arange(32) % 5) for x in batches]
    scores = score(model, CrossEntropy(), pairs, groups, rng=seeded(), allocation=allocation)
    if allocation == "uniform":
        assert torch.equal(scores.sort().values, uniform(model, CrossEntropy(), [], groups, rng=seeded()).sort().values)
    place = ranks(model, groups, batches, forward, how="removal" if score is obs else "selection", ridge=1e-3)
    for name in ("0", "3", "6"):
        layer = groups.row_group[groups.shapes[name].rows_at]
        assert torch.equal(scores[layer].argsort(), place[layer].argsort())


def test_an_unknown_allocation_is_refused():
    model, groups, batches = drawn("plain")
    with pytest.raises(HapError, match="obs: allocation 'uniform', 'trace' or 'magnitude' expected, found 'even'"):
        obs(model, CrossEntropy(), [(x, None) for x in batches], groups, rng=seeded(), allocation="even")


def test_without_batches_it_is_refused():
    model, groups, _ = drawn("plain")
    with pytest.raises(HapError, match="calibration batches expected, found none"):
        ranks(model, groups, [], forward, how="removal", ridge=1e-3)


@pytest.mark.parametrize(("name", "how"), [(n, how) for n in SMALL for how in ("tied", "union")])
def test_every_small_case_is_ranked(name, how):
    """A group that no reader can make up for has no place, the others of a layer one each."""
    model, groups, batches = drawn(name, how)
    place = ranks(model, groups, batches, forward, how="removal", ridge=1e-3)
    assert place.isfinite().all()
    assert (place >= 0).any()
    for s in groups.shapes.values():
        of = torch.unique(groups.row_group[s.rows_at])
        found = place[of[of >= 0]]
        assert len(torch.unique(found[found >= 0])) == int((found >= 0).sum())


def test_portions_change_nothing_but_memory():
    model, groups, batches = drawn("option-b")
    whole, portions = (ranks(model, groups, batches, forward, how="removal", ridge=1e-3, memory=m) for m in (2**30, 1))
    assert torch.equal(whole, portions)


def test_a_reader_too_wide_is_ranked_in_parts(monkeypatch):
    """One column each: as if nothing else were there, so a channel is worth what its weights and variance are."""
    monkeypatch.setattr("hap.reconstruction.WIDEST", 1)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(64, 4, generator=seeded())
    groups = couple(model, trace(model, x))
    place = ranks(model, groups, [x], forward, how="removal", ridge=0.0)
    with torch.no_grad():
        worth = model[1](model[0](x)).var(0) * model[2].weight.square().sum(0)
    assert torch.equal(place[groups.row_group[:6]].argsort(), worth.argsort())


def test_what_goes_costs_less_than_what_magnitude_takes():
    """Three quarters of the first layer, on correlated channels, the second made up for by hand; over five networks."""
    lost = torch.zeros(2)
    for seed in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 4)).double()
        x = torch.randn(256, 3, dtype=torch.float64, generator=seeded())
        groups = couple(model, trace(model, x))
        scores = obs(model, CrossEntropy(), [(x, None)], groups, rng=seeded())
        sums = Sums(model[2])
        with torch.no_grad():
            sums.add(model[1](model[0](x)), None)
        s, w = sums.result().centred.xx[0] + 1e-9 * torch.eye(12, dtype=torch.float64), model[2].weight.detach()
        for i, each in enumerate((scores, uniform(model, CrossEntropy(), [], groups, rng=seeded()))):
            fates = plan(groups, each, Budget(groups=0.75)).fates(groups)
            kept = (fates[groups.row_group[:12]] == Fate.KEEP).nonzero()[:, 0]
            lost[i] += left(s, w, kept)
    assert lost[0] < lost[1] / 2


def test_heads_are_blocks_and_no_stream():
    model, groups, batches = drawn("attention")
    only = heads(groups)
    place = ranks(model, only, batches, forward, how="removal", ridge=1e-3)
    assert sorted(place.tolist()) == [0, 1]
    assert not in_streams(only).any()


def test_streams_are_what_is_written_together_or_read_by_several():
    _, groups, _ = drawn("option-b")
    streams = in_streams(groups)
    of = {name: groups.row_group[s.rows_at] for name, s in groups.shapes.items() if s.mixing}
    assert streams[of["conv1"]].all()
    assert streams[of["layer2.0.conv2"]].all()
    assert not streams[of["layer2.0.conv1"]].any()


@pytest.mark.parametrize(
    "shape", [(nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 37, 30)), (nn.Conv1d(4, 2, 3), (4, 19))]
)
@pytest.mark.parametrize("k", [2, 4])
def test_pixels_that_are_left_out_take_turns(shape, k, monkeypatch):
    """As many batches as there are places to begin at see every position once."""
    layer, size = shape
    monkeypatch.setattr("hap.surgery.moments.THIN", (k,))
    layer, x = layer.double(), torch.randn(3, *size, dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        y = layer(x)
    weights = torch.rand(3, y[0, 0].numel(), generator=seeded(1), dtype=torch.float64)
    whole, thin = Sums(layer), Sums(layer, batches=10**6)
    whole.add(x, y, weights)
    for _ in range(k ** (len(size) - 1)):
        thin.add(x, y, weights)
    for name, value in vars(whole.result()).items():
        assert torch.allclose(torch.as_tensor(value), torch.as_tensor(getattr(thin.result(), name)), rtol=1e-10)


def test_a_weight_far_from_any_pixel_is_no_reason_to_leave_some_out():
    layer = nn.Conv2d(2, 3, 3)
    sums = Sums(layer, batches=1)
    sums.add(torch.randn(2, 2, 8, 8), None)
    assert sums.count == 2 * 36
    assert F.relu(sums.result().xx.diagonal(dim1=1, dim2=2)).min() > 0
