"""The published planning against a slow transcription of it: lists, loops and the indices as the code has them."""

import copy
import math
from functools import cache, partial

import fakes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hap import Budget, CrossEntropy, Fate, HapError, Plan, couple, hutchinson, mask, trace
from hap.cost import macs, params
from hap.harness.spec.spec import load_spec
from hap.harness.task import Data, Task
from hap.harness.tasks.nets import preresnet, resnet
from hap.harness.train.loop import generator
from hap.harness.upstream import first, published, steps
from hap.surgery.patch import Patch


def vgg(widths=(24, 20, 33), bias=False):
    """Convolutions in a row, wide enough for 5 % of a layer to be a channel or two."""
    layers, inputs = [], 3
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 5))


NETS = {
    "resnet": lambda: resnet(8, (4, 8, 16), "B", rng=generator(0)),
    "preresnet": lambda: preresnet(11, (4, 8, 16), rng=generator(0)),
    "vgg": vgg,
    "biased": partial(vgg, (4, 4), bias=True),
    "two": partial(vgg, (4, 4)),
    "lone": partial(vgg, (20,)),
}


@cache
def workload(name):
    """A task around a net whose running statistics are those of some data, and its groups."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = NETS[name](), (torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))
        for _ in range(3):
            model.train()(torch.randn(16, 3, 8, 8))
    task = Task(
        name=name,
        model=model.eval(),
        loss=CrossEntropy(),
        batches=[batch],
        train=lambda batch_size, rng: iter([batch]),
        train_size=6,
        evaluate=lambda model, split: {"accuracy": 0.0, "loss": 0.0},
        example=batch[0][:1],
        data=Data("noise", "0" * 64, True, ""),
    )
    return task, couple(task.model, trace(task.model, task.example), "union")


def prune(name, budget, seed=0, score="fakes:by_row", **options):
    task, groups = workload(name)
    return published(task, groups, budget, rng=generator(seed), score=score, **options)


def kept(values, cut, floor_first=True):
    found = [i for i, value in enumerate(values) if value > cut]
    if len(found) <= 1:
        found = [0] if floor_first else [values.index(max(values))]
    return found


def three(values, high, low, floor_first=True):
    """Kept, implanted, dropped."""
    keep = [i for i, value in enumerate(values) if value > high]
    small = [i for i, value in enumerate(values) if low < value <= high]
    if len(keep) <= 1:
        keep = [0] if floor_first else [values.index(max(values))]
        small = [i for i in small if i not in keep]
    return keep, small, [i for i in range(len(values)) if i not in keep + small]


def transcribed(layers, ratio, ni, limit, inverted_guard=True, sorted_guard=True, floor_first=True):
    """Fates as letters by layer; `layers`: name -> is it a convolution, scores, the last of them the output."""
    if ni:
        return _with_implants(layers, ratio, ni, limit, inverted_guard, sorted_guard, floor_first)
    pool = sorted(value for _, values in layers.values() for value in values)
    threshold, lines = pool[int(ratio * len(pool))], {}
    for name, (_, values) in layers.items():
        found = kept(values, threshold, floor_first)
        if 1 - len(found) / len(values) > limit:
            own = sorted(values)[int(len(values) * limit)]
            found = kept(values, own, floor_first)
        if name == list(layers)[-1]:
            found = range(len(values))
        lines[name] = "".join("#" if i in found else "-" for i in range(len(values)))
    return lines


def _with_implants(layers, ratio, ni, limit, inverted_guard, sorted_guard, floor_first):
    pool = sorted(value for convolution, values in layers.values() if convolution for value in values)
    high, low = pool[int(ratio * len(pool))], pool[int((1 - ni) * ratio * len(pool))]
    lines = {}
    for name, (convolution, values) in layers.items():
        if not convolution:
            lines[name] = "#" * len(values)
            continue
        keep, small, _ = three(values, high, low, floor_first)
        n, left = len(values), (len(keep) + len(small)) / len(values)
        if inverted_guard and left > limit:
            own = sorted(values)
            own_high, own_low = own[int(limit * n)], own[int((1 - ni) * ratio * n)]
            keep, small, _ = three(own if sorted_guard else values, own_high, own_low, floor_first)
        if not inverted_guard and 1 - left > limit:
            own = sorted(values)
            keep, small, _ = three(values, own[int(limit * n)], own[int((1 - ni) * limit * n)], floor_first)
        lines[name] = "".join("#" if i in keep else "o" if i in small else "-" for i in range(n))
    return lines


def scored(name, seed):
    model = workload(name)[0].model
    found = fakes.row_scores(model, generator(seed))
    return {layer: (isinstance(model.get_submodule(layer), nn.Conv2d), s.tolist()) for layer, s in found.items()}


@settings(max_examples=60)
@given(
    name=st.sampled_from(["resnet", "preresnet", "vgg"]),
    seed=st.integers(0, 10**6),
    ratio=st.floats(0.01, 0.99),
    ni=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    limit=st.sampled_from([0.5, 0.75, 0.9, 0.95]),
    slips=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["inverted_guard", "sorted_guard", "floor_first"], st.just(False))
    ),
)
def test_the_fates_are_those_of_the_transcription(name, seed, ratio, ni, limit, slips):
    """The transcription shares the reading of the published code, not a line with what it checks."""
    expected = transcribed(scored(name, seed), ratio, ni, limit, **slips)
    small, chosen = prune(name, Budget(groups=ratio, implant=ni, layer_limit=limit), seed, **slips)
    assert chosen.rows == expected
    task = workload(name)[0]
    assert chosen.removed["params"] == pytest.approx(1 - params(small) / params(task.model), abs=1e-12)
    assert chosen.budget["ratio"] == ratio


def brute(name, seed, unit, target, ni, **slips):
    """The least ratio in steps of one channel whose transcribed plan removes enough; None where none does."""
    groups = workload(name)[1]
    layers = scored(name, seed)
    n = sum(len(values) for convolution, values in layers.values() if convolution or not ni)
    for count in range(n):
        ratio = count / n
        while int(ratio * n) < count:
            ratio = math.nextafter(ratio, 1)
        chosen = Plan(transcribed(layers, ratio, ni, 0.95, **slips))
        if Plan.of(groups, chosen.fates(groups)).removed[unit] + 1e-12 >= target:
            return ratio
    return None


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("ni", [0.0, 0.1])
@pytest.mark.parametrize(("name", "target"), [("resnet", 0.3), ("preresnet", 0.55), ("vgg", 0.7), ("vgg", 0.95)])
def test_the_ratio_found_is_the_least_that_meets_the_budget(name, target, ni, unit):
    expected = brute(name, 3, unit, target, ni)
    small, chosen = prune(name, Budget(**{unit: target}, implant=ni), 3)
    assert chosen.budget["ratio"] == expected
    assert chosen.removed[unit] >= target - 1e-12
    task = workload(name)[0]
    assert params(small) == round(params(task.model) * (1 - chosen.removed["params"]))


def test_the_inverted_guard_meets_a_budget_at_ratio_zero_and_a_search_may_begin_above():
    """At ratio 0 nothing should go, but every layer is almost whole, so every layer is cut."""
    _, chosen = prune("vgg", Budget(params=0.5, implant=0.1))
    assert chosen.budget["ratio"] == 0
    assert chosen.removed["params"] > 0.5
    _, higher = prune("vgg", Budget(params=0.5, implant=0.1), from_ratio=0.3)
    assert higher.budget["ratio"] > 0.3
    assert higher.removed["params"] < 0.6
    _, meant = prune("vgg", Budget(params=0.5, implant=0.1), inverted_guard=False)
    assert meant.budget["ratio"] == brute("vgg", 0, "params", 0.5, 0.1, inverted_guard=False) > 0.3


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_a_budget_met_exactly_is_met(unit):
    _, chosen = prune("vgg", Budget(**{unit: 0.4}), 1)
    _, again = prune("vgg", Budget(**{unit: chosen.removed[unit]}), 1)
    assert again.budget["ratio"] == chosen.budget["ratio"]


def test_a_budget_that_no_ratio_meets_is_refused():
    with pytest.raises(HapError, match=r"budget.params: 0.99\d* is removed at no ratio by the rules of the published"):
        prune("resnet", Budget(params=0.9999))


def test_the_ratios_of_n_channels_count_from_none_to_all_but_one():
    for n in (1, 7, 49, 698, 4106):
        ratios = steps(n).tolist()
        assert [int(ratio * n) for ratio in ratios] == list(range(n))
        assert all(abs(ratio - count / n) <= math.ulp(ratio) for count, ratio in enumerate(ratios))


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=9), st.integers(0, 7))
def test_the_first_line_that_is_enough_is_found_in_any_order(lines, least):
    def enough(fates):
        return int((2 - fates.long()).sum()) >= least

    table = torch.tensor(lines, dtype=torch.int8).reshape(-1, 3)
    assert first(table, enough) == next((i for i, line in enumerate(table) if enough(line)), None)


def by_hand(monkeypatch, name, ratio, ni=0.0, limit=0.95, *, scores, **options):
    monkeypatch.setattr(fakes, "GIVEN", scores)
    return prune(name, Budget(groups=ratio, implant=ni, layer_limit=limit), score="fakes:given", **options)


OUT = [100.0, 101.0, 102.0, 103.0, 104.0]  # scores of the five outputs


def test_only_what_is_above_the_threshold_is_kept_and_outputs_count(monkeypatch):
    """Of 13 rows a quarter is 3: the threshold is the fourth score, and four go; negative scores first."""
    scores = {"0": [-1.0, 5.0, 1.0, 6.0], "3": [3.0, -2.0, 7.0, 8.0], "8": OUT}
    _, chosen = by_hand(monkeypatch, "two", 0.25, scores=scores)
    assert chosen.rows == {"0": "-#-#", "3": "--##", "8": "#####"}
    # with implants the outputs do not count: of 8 rows 3, threshold 3; (1 - 0.5) of it 1, threshold -1
    _, chosen = by_hand(monkeypatch, "two", 0.375, 0.5, scores=scores)
    assert chosen.rows == {"0": "-#o#", "3": "o-##", "8": "#####"}


def test_outputs_that_score_least_are_kept_all_the_same(monkeypatch):
    scores = {"0": [1.0, 5.0, 2.0, 6.0], "3": [3.0, 4.0, 7.0, 8.0], "8": [-5.0, -4.0, -3.0, -2.0, -1.0]}
    _, chosen = by_hand(monkeypatch, "two", 0.4, scores=scores)  # the sixth of 13 is 1
    assert chosen.rows == {"0": "-###", "3": "####", "8": "#####"}


def test_the_floor_is_channel_zero_or_the_most_sensitive(monkeypatch):
    scores = {"0": [1.0, 2.0, 9.0, 3.0], "3": [10.0, 11.0, 12.0, 13.0], "8": OUT}
    _, chosen = by_hand(monkeypatch, "two", 0.25, scores=scores)  # the fourth is 9: none of the first layer is above
    assert chosen.rows["0"] == "#---"
    _, chosen = by_hand(monkeypatch, "two", 0.25, scores=scores, floor_first=False)
    assert chosen.rows["0"] == "--#-"
    _, chosen = by_hand(monkeypatch, "two", 0.2, scores=scores)  # the third is 3: one is above, and goes
    assert chosen.rows["0"] == "#---"
    _, chosen = by_hand(monkeypatch, "two", 0.2, scores=scores, floor_first=False)
    assert chosen.rows["0"] == "--#-"
    # with implants, of 8: 3 is the threshold and 2 the lower one; the one above is lost, the implant stays
    _, chosen = by_hand(monkeypatch, "two", 0.25, 0.5, scores=scores, inverted_guard=False)
    assert chosen.rows["0"] == "#--o"
    _, chosen = by_hand(monkeypatch, "two", 0.25, 0.5, scores=scores, inverted_guard=False, floor_first=False)
    assert chosen.rows["0"] == "--#o"


def test_a_layer_over_its_limit_is_cut_at_its_own_percentile(monkeypatch):
    """All 20 of the layer are below the outputs; at 0.75 the threshold is its sixteenth score, and four stay."""
    values = [float(19 - i) for i in range(20)]
    _, chosen = by_hand(monkeypatch, "lone", 0.8, limit=0.75, scores={"0": values, "5": OUT})
    assert chosen.rows["0"] == "#" * 4 + "-" * 16
    # at 0.95 its own percentile is its highest score, so none is above
    _, chosen = by_hand(monkeypatch, "lone", 0.8, limit=0.9499, scores={"0": values[::-1], "5": OUT})
    assert chosen.rows["0"] == "#" + "-" * 19


def test_the_limit_is_compared_in_the_arithmetic_of_the_published_code(monkeypatch):
    """In floats of 64 bits 1 - 14 / 20 is above 0.3, in those of 32 it is not; so 14 of 20 left are too few."""
    values = [float(i) for i in range(20)]
    _, chosen = by_hand(monkeypatch, "lone", 0.22, limit=0.3, scores={"0": values, "5": OUT})
    assert chosen.rows["0"] == "-" * 7 + "#" * 13
    _, chosen = by_hand(monkeypatch, "lone", 0.22, limit=0.31, scores={"0": values, "5": OUT})
    assert chosen.rows["0"] == "-" * 6 + "#" * 14


def test_the_inverted_guard_cuts_the_layer_that_is_almost_whole(monkeypatch):
    """Thresholds are the third and second of 20: 17 kept and an implant are 0.9 of the layer.

    Cut at 0.85, the eighteenth score, two are above; the lower threshold is again the second: 16 implants.
    """
    values = [float(7 * i % 20) for i in range(20)]
    cut = partial(by_hand, monkeypatch, "lone", 0.1, 0.5, scores={"0": values, "5": OUT})
    plain = "".join("-" if v <= 1 else "o" if v <= 2 else "#" for v in values)
    assert cut(limit=0.9)[1].rows["0"] == plain
    assert cut(limit=0.85)[1].rows["0"] == "--" + "o" * 16 + "##"  # by place among the sorted
    by_score = "".join("-" if v <= 1 else "o" if v <= 17 else "#" for v in values)
    assert cut(limit=0.85, sorted_guard=False)[1].rows["0"] == by_score
    assert cut(limit=0.85, inverted_guard=False)[1].rows["0"] == plain


def test_the_guard_that_was_meant_spares_the_layer_that_loses_too_much(monkeypatch):
    """All of the first layer are below both thresholds; its own are its third and second score."""
    scores = {"0": [-3.0, -4.0, -1.0, -2.0], "3": [4.0, 1.0, 3.0, 2.0], "8": OUT}
    cut = partial(by_hand, monkeypatch, "two", 0.49, 0.2, 0.5, scores=scores)
    meant = {"inverted_guard": False, "floor_first": False}
    assert cut(**meant)[1].rows == {"0": "--#o", "3": "####", "8": "#####"}
    assert cut(inverted_guard=True, floor_first=False)[1].rows["0"] == "--#-"
    assert by_hand(monkeypatch, "two", 0.49, 0.2, 0.75, scores=scores, **meant)[1].rows["0"] == "--#-"


def pointwise(task, chosen):
    return {
        name: torch.tensor([letter == "o" for letter in line])
        for name, line in chosen.rows.items()
        if getattr(task.model.get_submodule(name), "kernel_size", None) == (1, 1)
    }


@pytest.mark.parametrize("ni", [0.0, 0.5])
@pytest.mark.parametrize("name", ["resnet", "preresnet", "vgg"])
@pytest.mark.parametrize("reset", [False, True])
def test_the_model_computes_what_masking_does_and_resets_are_rows_of_zeros(name, ni, reset):
    """The oracle keeps every row of the dense model; where a 1x1 convolution is reset its own rows are zero in it."""
    task, groups = workload(name)
    small, chosen = prune(name, Budget(groups=0.6, implant=ni), 5, inverted_guard=False, reset_pointwise=reset)
    dense, before = copy.deepcopy(task.model), copy.deepcopy(task.model.state_dict())
    zeroed = pointwise(task, chosen)
    assert (sum(int(rows.sum()) for rows in zeroed.values()) > 0) == (ni > 0 and name != "vgg")
    for layer, rows in zeroed.items():
        if reset:
            dense.get_submodule(layer).weight.data[rows] = 0
    x = task.batches[0][0]
    assert torch.allclose(small(x), mask(dense, groups, chosen)(x), atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())
    fates = chosen.fates(groups)
    assert bool((fates == int(Fate.IMPLANT)).any()) == (ni > 0)
    removed = 1 - macs(small, task.example) / macs(task.model, task.example)
    assert chosen.removed["macs"] == pytest.approx(removed, abs=1e-12)


def test_a_reset_row_is_no_smaller_than_before():
    with_reset, chosen = prune("preresnet", Budget(groups=0.6, implant=0.5), 5)
    without, _ = prune("preresnet", Budget(groups=0.6, implant=0.5), 5, reset_pointwise=False)
    assert params(with_reset) == params(without)
    task = workload("preresnet")[0]
    for name, rows in pointwise(task, chosen).items():
        there = rows[torch.tensor([letter != "-" for letter in chosen.rows[name]])]
        for model, is_reset in ((with_reset, True), (without, False)):
            module = model.get_submodule(name)
            weight = (module.parts[0] if isinstance(module, Patch) else module).weight
            assert (weight[there].abs().sum() == 0) == (is_reset or not there.any())
            assert (weight[~there].abs().flatten(1).sum(1) > 0).all()


def test_implants_are_zeros_unless_another_is_named():
    budget = Budget(groups=0.5, implant=0.5)
    parts = {}
    for use in ("zero", "centre_tap"):
        small, chosen = prune("vgg", budget, inverted_guard=False, implant=f"hap.implants:{use}")
        patches = {name: m for name, m in small.named_modules() if isinstance(m, Patch) and len(m.parts) == 2}
        parts[use] = {name: m.parts[1].weight for name, m in patches.items()}
    assert parts["zero"].keys() == {name for name, line in chosen.rows.items() if "o" in line} != set()
    assert all((weight == 0).all() for weight in parts["zero"].values())
    assert all((weight != 0).any() for weight in parts["centre_tap"].values())


@pytest.mark.parametrize("ni", [0.0, 0.2])
def test_the_score_is_the_trace_by_three_probes_times_the_mean_square(ni):
    """Without implants the outputs are ranked too, and their trace is of the same probes."""
    task, groups = workload("preresnet")
    found = hutchinson(task.model, task.loss, task.batches, probes=3, rng=generator(2)).diagonal
    layers = {}
    for name, weight in found.items():
        w = task.model.get_parameter(name).detach()
        sums = weight.flatten(1).sum(1) * w.flatten(1).square().mean(1)
        layers[name.removesuffix(".weight")] = (w.dim() == 4, sums.tolist())
    assert any(value < 0 for _, values in layers.values() for value in values)
    _, chosen = published(task, groups, Budget(groups=0.4, implant=ni), rng=generator(2))
    assert chosen.rows == transcribed(layers, 0.4, ni, 0.95)


def test_options_of_the_score_reach_it_and_only_where_it_has_them():
    task, groups = workload("preresnet")
    plans = [
        published(task, groups, Budget(groups=0.5), rng=generator(0), **options)[1].rows
        for options in ({}, {"probes": 4}, {"curvature": "exact"}, {"score": "hap.methods:magnitude"})
    ]
    assert len({str(rows) for rows in plans}) == 4


def test_a_biased_convolution_has_no_implants_unless_asked_for():
    budget = Budget(groups=0.5, implant=0.5)
    with pytest.raises(HapError, match=r"convolutions without bias expected .* found one at 0; .* biased_implants"):
        prune("biased", budget)
    task, groups = workload("biased")
    small, chosen = prune("biased", budget, biased_implants=True, inverted_guard=False)
    x = task.batches[0][0]
    assert "o" in chosen.rows["0"] + chosen.rows["3"]
    assert torch.allclose(small(x), mask(task.model, groups, chosen)(x), atol=1e-5)
    prune("biased", Budget(groups=0.5))


def test_another_coupling_is_refused():
    task, _ = workload("resnet")
    tied = couple(task.model, trace(task.model, task.example), "tied")
    with pytest.raises(HapError, match=r"union coupling expected, a row a group, found \d+ groups of \d+ rows"):
        published(task, tied, Budget(groups=0.5), rng=generator(0))


@pytest.mark.parametrize(("found", "shown"), [("nan", "found 93 of 94"), ("short", "found 93 of 93")])
def test_scores_that_are_no_numbers_are_refused(monkeypatch, found, shown):
    def score(model, loss, batches, groups, *, rng):
        scores = torch.ones(len(groups))
        scores[0] = torch.nan
        return scores if found == "nan" else scores[1:]

    monkeypatch.setattr(fakes, "score", score)
    with pytest.raises(HapError, match=f"scores: 94 finite numbers expected, {shown}"):
        prune("resnet", Budget(groups=0.5), score="fakes:score")


SPEC = """
title = "The published planning"
paper = "[Yu22]"
tier = "quick"
seeds = [0]
task = "fakes:task"

[cases.upstream]
method = {use = "hap.harness.upstream:published", score = "fakes:by_row", sorted_guard = false}
budget = {groups = 0.5, implant = 0.1}
"""


def test_a_spec_can_name_it(tmp_path):
    case = load_spec(fakes.write_spec(tmp_path, SPEC)).cases["upstream"]
    _, chosen = case.method.load()(*workload("vgg"), case.budget, rng=generator(4), **case.method.options)
    assert chosen.rows == transcribed(scored("vgg", 4), 0.5, 0.1, 0.95, sorted_guard=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sorted_guard = false", "sorted_guard = 1", "method.sorted_guard: .* boolean"),
        ("sorted_guard = false", "guard = true", "method.guard: unknown option; known are score, curvature, probes"),
        ('"fakes:by_row"', '"by_row"', "method.score: .*pattern"),
    ],
)
def test_a_wrong_switch_is_found_when_the_spec_is_read(tmp_path, old, new, message):
    with pytest.raises(HapError, match=message):
        load_spec(fakes.write_spec(tmp_path, SPEC.replace(old, new)))


@pytest.mark.parametrize("option", ["score", "implant"])
def test_a_function_that_is_not_there_is_named(option):
    with pytest.raises(HapError, match=f"method.{option}: must name a function that exists .*nowhere"):
        prune("vgg", Budget(groups=0.5), **{option: "fakes:nowhere"})
