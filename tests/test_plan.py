"""Plans: the budget is met and not overshot, layers keep their best rows, and JSON says it all."""

import json
import math

import pytest
import torch
from cases import SMALL, build
from hypothesis import given, settings
from hypothesis import strategies as st

from hap import Budget, Fate, HapError, Plan, apply, couple, trace
from hap.cost import macs, params
from hap.harness.tasks import nets
from hap.implants import zero
from hap.plan import LETTER, cost, plan
from hap.structure.heads import heads


def grouped(name="preresnet", how="union"):
    model, example = build(SMALL, name)
    return couple(model, trace(model, example), how)


GROUPS = {(name, how): grouped(name, how) for name in ("preresnet", "plain", "gated") for how in ("tied", "union")}


@settings(deadline=None)
@given(
    key=st.sampled_from(sorted(GROUPS)),
    unit=st.sampled_from(["params", "macs", "groups"]),
    target=st.floats(0.02, 0.75),
    implant=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_the_budget_is_met_by_the_last_group_and_not_before(key, unit, target, implant, seed):
    groups = GROUPS[key]
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed))
    try:
        chosen = plan(groups, scores, Budget(**{unit: target}, implant=implant))
    except HapError as error:
        assert "at most" in str(error)  # noqa: PT017 (a budget that implants cannot meet)
        return
    assert chosen.removed[unit] >= target - 1e-12  # 1 - 0.8 is less than 0.2
    fates = chosen.fates(groups)
    pruned = (fates != Fate.KEEP).nonzero()[:, 0]
    best = pruned[scores[pruned].argmax()]
    dropped = pruned[scores[pruned].argsort()]
    # one group fewer: the best pruned group is kept, and the shares of drop and implant are those of the rest
    fewer = torch.full_like(fates, int(Fate.KEEP))
    border = math.ceil((1 - implant) * (len(pruned) - 1) - 1e-9)
    fewer[dropped[:-1][:border]] = int(Fate.DROP)
    fewer[dropped[:-1][border:]] = int(Fate.IMPLANT)
    assert fewer[best] == Fate.KEEP
    whole = getattr(cost(groups, torch.full_like(fates, int(Fate.KEEP))), unit)
    assert 1 - getattr(cost(groups, fewer), unit) / whole < target


@pytest.mark.parametrize("limit", [0.5, 0.95, 1.0])
def test_each_layer_keeps_its_most_sensitive_rows(limit):
    groups = GROUPS["preresnet", "union"]
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(3))
    chosen = plan(groups, scores, Budget(groups=0.45 if limit == 0.5 else 0.8, layer_limit=limit))
    for name, line in chosen.rows.items():
        shape = groups.shapes[name]
        of = groups.row_group[shape.first_row : shape.first_row + shape.rows]
        if (of < 0).any():
            continue
        kept = [i for i, letter in enumerate(line) if letter == "#"]
        assert len(kept) >= max(1, shape.rows - int(limit * shape.rows))
        order = scores[of].argsort(descending=True)[: len(kept)]
        assert sorted(order.tolist()) == kept


def test_implants_are_the_best_of_the_pruned():
    groups = GROUPS["preresnet", "union"]
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(0))
    fates = plan(groups, scores, Budget(groups=0.5, implant=0.25)).fates(groups)
    assert int((fates == Fate.KEEP).sum()) == 32
    assert int((fates == Fate.IMPLANT).sum()) == 8
    assert scores[fates == Fate.DROP].max() < scores[fates == Fate.IMPLANT].min()
    assert scores[fates == Fate.IMPLANT].max() < scores[fates == Fate.KEEP].min()


@pytest.mark.parametrize("tenths", range(1, 10))
def test_a_budget_is_not_overshot_by_rounding(tenths):
    """1 - 0.9 is less than 0.1: ten neurons, a tenth of them, is one neuron."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 10), torch.nn.ReLU(), torch.nn.Linear(10, 2))
    groups = couple(model, trace(model, torch.randn(1, 3)))
    chosen = plan(groups, torch.rand(10), Budget(groups=tenths / 10))
    assert chosen.rows["0"].count("-") == tenths


def test_a_model_in_which_nothing_may_be_pruned_says_so():
    model = torch.nn.Linear(3, 2)
    groups = couple(model, trace(model, torch.randn(1, 3)))
    with pytest.raises(HapError, match="no group may be pruned"):
        plan(groups, torch.rand(0), Budget(groups=0.5))


def test_negative_scores_are_pruned_first():
    groups = GROUPS["plain", "union"]
    scores = torch.ones(len(groups)).index_fill_(0, torch.tensor([5]), -1.0)
    fates = plan(groups, scores, Budget(groups=0.05)).fates(groups)
    assert (fates == Fate.DROP).nonzero().tolist() == [[5]]


def test_a_plan_survives_json_and_reads_line_by_line():
    groups = GROUPS["preresnet", "tied"]
    chosen = plan(groups, torch.rand(len(groups)), Budget(params=0.5, implant=0.2))
    again = Plan.from_json(json.loads(json.dumps(chosen.to_json())))
    assert again == chosen
    assert torch.equal(again.fates(groups), chosen.fates(groups))
    assert set("".join(chosen.rows.values())) <= set(LETTER.values())
    assert len(chosen.rows["conv1"]) == groups.shapes["conv1"].rows


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"params": 0.5, "macs": 0.5},
            r"one of .*, ratios expected, found \['macs', 'params'\]",
        ),
        ({}, "exactly one .* found none"),
        ({"params": 0.0}, "budget.params: a fraction between 0 and 1 to remove expected, found 0.0"),
        ({"groups": 1.5}, "budget.groups: .* found 1.5"),
        ({"macs": 0.5, "implant": 1.0}, "budget.implant: .* found 1.0"),
        ({"macs": 0.5, "layer_limit": 0.0}, "budget.layer_limit: .* found 0.0"),
        ({"macs": 0.5, "multiple": 0}, "budget.multiple: a number of at least 1 expected, found 0"),
        ({"params": 0.5, "ratios": {"*": 0.5}}, r"found \['params', 'ratios'\]"),
        ({"ratios": {"*": 1.5}}, "budget.ratios: globs with shares .* found {'\\*': 1.5}"),
        ({"ratios": {"*": -0.1}}, "budget.ratios: globs"),
        ({"ratios": {}}, "budget.ratios: globs"),
        ({"params": 0.5, "rounding": "ceil"}, "budget.rounding: one of ceil, floor, nearest, with ratios"),
        ({"ratios": {"*": 0.5}, "rounding": "up"}, "budget.rounding: .*, found up"),
        ({"params": 0.5, "only": "*.conv1"}, "budget.only: a list of globs expected"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(HapError, match=says):
        Budget(**wrong)


def test_an_impossible_budget_says_how_much_is_possible():
    groups = GROUPS["preresnet", "union"]
    with pytest.raises(HapError, match=r"budget.params: 0.9 cannot be removed, at most 0\.\d+ within layer_limit"):
        plan(groups, torch.rand(len(groups)), Budget(params=0.9, layer_limit=0.3))


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (torch.rand(3), r"one number for each of 64 groups expected, found shape \[3\]"),
        (torch.full((64,), torch.nan), "finite numbers expected, found 64 that are not, the first that of row 0 of "),
    ],
)
def test_scores_that_are_not_one_finite_number_a_group_are_refused(scores, says):
    with pytest.raises(HapError, match=says):
        plan(GROUPS["preresnet", "union"], scores, Budget(params=0.5))


def test_plans_that_do_not_fit_are_refused():
    groups, other = GROUPS["preresnet", "tied"], GROUPS["plain", "tied"]
    chosen = plan(groups, torch.rand(len(groups)), Budget(params=0.3))
    with pytest.raises(HapError, match=r"plan: 0 with 4 rows expected, as in the model, found 0"):
        chosen.fates(other)
    stream = next(n for n, line in chosen.rows.items() if n == "conv1")
    torn = {**chosen.rows, stream: "-" + "#" * (len(chosen.rows[stream]) - 1), "layer1.0.conv3": "#" * 4}
    with pytest.raises(HapError, match="must share a fate"):
        Plan(torn).fates(groups)
    with pytest.raises(HapError, match="frozen row is pruned"):
        Plan({**chosen.rows, "fc": "-" + "#" * 9}).fates(groups)
    for rows in (None, {"conv1": "#x"}):
        with pytest.raises(HapError, match="plan: rows as a string"):
            Plan.from_json({"rows": rows})


WIDE = {
    **{key: GROUPS[key] for key in (("preresnet", "tied"), ("preresnet", "union"))},
    **{
        (name, how): grouped(name, how)
        for name in ("option-a", "depthwise", "dense", "mlp")
        for how in ("tied", "union")
    },
    ("residual", "tied"): grouped("residual", "tied"),
    ("attention", "union"): grouped("attention", "union"),
}
BUILT = {name: build(SMALL, name) for name in {key[0] for key in WIDE}}


def per_layer(chosen, letters):
    return {name: sum(line.count(letter) for letter in letters) for name, line in chosen.rows.items()}


@settings(deadline=None)
@given(
    key=st.sampled_from(sorted(WIDE)),
    unit=st.sampled_from(["params", "macs", "groups"]),
    target=st.floats(0.02, 0.6),
    implant=st.sampled_from([0.0, 0.3]),
    multiple=st.sampled_from([1, 2, 3, 4, 8]),
    seed=st.integers(0, 99),
)
def test_every_layer_keeps_a_multiple_or_all_and_the_budget_is_met(key, unit, target, implant, multiple, seed):
    """The cost is that of the model which surgery makes; it cannot see whether another plan would prune less."""
    groups, (model, example) = WIDE[key], BUILT[key[0]]
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed))
    budget = Budget(**{unit: target}, implant=implant, multiple=multiple)
    try:
        chosen = plan(groups, scores, budget)
    except HapError as error:
        assert f"within layer_limit and multiples of {multiple}" in str(error)  # noqa: PT017 (they are too few)
        return
    assert chosen.removed[unit] >= target - 1e-12  # 1 - 0.8 is less than 0.2
    for letters in ("#", "#o"):  # what is kept, and all that is left: so the implants are a multiple too
        for name, count in per_layer(chosen, letters).items():
            assert count % multiple == 0 or count == len(chosen.rows[name])
    small = apply(model, groups, chosen, zero)
    assert 1 - params(small) / params(model) == pytest.approx(chosen.removed["params"], abs=1e-12)
    one = example[:1]
    assert cost(groups, chosen.fates(groups)).macs == macs(small, one)
    assert 1 - macs(small, one) / macs(model, one) == pytest.approx(chosen.removed["macs"], abs=1e-12)


def rounded(groups, scores, budget):
    """By force: each number of groups pruned, and in each layer the best of them back until it is full."""
    whole = getattr(cost(groups, torch.full((len(groups),), int(Fate.KEEP))), budget.unit)
    layers = [groups.row_group[s.rows_at] for s in groups.shapes.values() if s.mixing]
    layers = [of for of in layers if (of >= 0).all()]
    for pruned in range(1, len(groups) + 1):
        lowest = torch.zeros(len(groups), dtype=torch.bool).index_fill_(0, scores.argsort()[:pruned], True)
        for of in layers:
            order = of[scores[of].argsort(descending=True)]
            kept = max(1, int((~lowest[of]).sum()))
            lowest[order[: min(len(of), math.ceil(kept / budget.multiple) * budget.multiple)]] = False
        fates = torch.where(lowest, int(Fate.DROP), int(Fate.KEEP))
        if 1 - getattr(cost(groups, fates), budget.unit) / whole >= budget.target - 1e-12:
            return fates
    return None


@pytest.mark.parametrize("multiple", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_the_pruned_come_back_and_no_more_go_than_the_budget_asks(seed, multiple):
    """Where each row is a group of its own, the rounding is found by force; it cannot see groups of several layers."""
    model, example = nets.preresnet(11, (8, 12, 16)), torch.randn(1, 3, 8, 8)
    groups = couple(model, trace(model, example), "union")
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed))
    budget = Budget(params=0.4, multiple=multiple, layer_limit=1.0)
    expected = rounded(groups, scores, budget)
    assert expected is not None
    chosen = plan(groups, scores, budget)
    assert torch.equal(chosen.fates(groups), expected)
    assert chosen.rows != plan(groups, scores, Budget(params=0.4, layer_limit=1.0)).rows


@pytest.mark.parametrize(("name", "how"), WIDE)
def test_groups_of_several_layers_are_rounded_too(name, how):
    """Half can go in each coupling, which needs groups that go together although their layers differ."""
    groups = WIDE[name, how]
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(1))
    chosen = plan(groups, scores, Budget(params=0.3, multiple=2))
    assert any("-" in line for line in chosen.rows.values())
    assert all(line.count("#") % 2 == 0 or line.count("#") == len(line) for line in chosen.rows.values())


def test_a_width_that_is_no_multiple_is_kept_whole_or_cut_to_one():
    model = torch.nn.Sequential(torch.nn.Linear(3, 11), torch.nn.ReLU(), torch.nn.Linear(11, 2))
    groups = couple(model, trace(model, torch.randn(1, 3)))
    scores = torch.arange(11.0)
    assert plan(groups, scores, Budget(groups=0.05, multiple=4)).rows["0"] == "---########"
    assert plan(groups, scores, Budget(groups=0.3, multiple=4)).rows["0"] == "-------####"
    with pytest.raises(HapError, match=r"0.7 cannot be removed, at most 0.6364 within layer_limit and multiples of 4"):
        plan(groups, scores, Budget(groups=0.7, multiple=4))
    with pytest.raises(HapError, match=r"at most 0.0000 within layer_limit and multiples of 16"):
        plan(groups, scores, Budget(groups=0.1, multiple=16))


def test_implants_are_a_multiple_beside_the_rows_that_are_kept():
    groups = grouped("option-b", "union")
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(0))
    chosen = plan(groups, scores, Budget(groups=0.6, implant=0.5, multiple=2))
    implants = per_layer(chosen, "o")
    assert sum(implants.values()) > 0
    assert all(count % 2 == 0 for count in implants.values())


def test_a_budget_without_a_multiple_is_written_as_it_always_was():
    groups = GROUPS["preresnet", "union"]
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(0))
    assert list(plan(groups, scores, Budget(params=0.3)).budget) == ["params", "implant", "layer_limit"]
    assert plan(groups, scores, Budget(params=0.3, multiple=2)).to_json()["budget"]["multiple"] == 2
    assert plan(groups, scores, Budget(params=0.3, multiple=1)).rows == plan(groups, scores, Budget(params=0.3)).rows


class Nested(torch.nn.Module):
    """A wide stream that begins with a narrow one: some groups have rows of both layers, some of the wide one alone."""

    def __init__(self, narrow, wide):
        super().__init__()
        self.narrow, self.wide, self.fc = narrow, wide, torch.nn.Linear(16, 2)
        self.add_module(narrow, torch.nn.Conv2d(3, 8, 3, padding=1))
        self.add_module(wide, torch.nn.Conv2d(8, 16, 3, padding=1))

    def forward(self, x):
        x = self.get_submodule(self.narrow)(x).relu()
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 8)) + self.get_submodule(self.wide)(x)
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("seed", range(4))
def test_layers_of_which_one_is_part_of_the_other_go_down_to_one_multiple_each(names, seed):
    """Whatever the scores and the names: taking the wrong groups along would leave others waiting for ever."""
    model = Nested(*names).eval()
    groups = couple(model, trace(model, torch.randn(1, 3, 8, 8)), "tied")
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed))
    chosen = plan(groups, scores, Budget(groups=0.75, multiple=4, layer_limit=1.0))
    assert [chosen.rows[name].count("#") for name in names] == [4, 4]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_groups_go_with_those_of_the_same_layers(names):
    """Three of the wide layer alone score lowest and wait: four of both layers can go at once, without them."""
    model = Nested(*names).eval()
    groups = couple(model, trace(model, torch.randn(1, 3, 8, 8)), "tied")
    both = groups.row_group[groups.shapes[names[0]].rows_at]
    scores = torch.ones(16).index_fill_(0, both[:4], 0.5)
    alone = [group for group in range(16) if group not in both.tolist()]
    scores[alone[:3]] = 0.0
    chosen = plan(groups, scores, Budget(groups=0.25, multiple=4))
    assert (chosen.fates(groups) == Fate.DROP).nonzero()[:, 0].tolist() == sorted(both[:4].tolist())


@pytest.fixture(scope="module")
def resnet56():
    model = nets.resnet(depth=56)
    example = torch.randn(1, 3, 32, 32)
    return couple(model, trace(model, example), "tied"), params(model), macs(model, example)


@pytest.mark.parametrize(
    ("ratios", "gone", "faster"),
    [
        ({"layer*.conv1": 0.5}, 49.82, 1.99),
        ({"layer*.conv1": 0.7}, 70.58, 3.59),
        ({"layer1.*.conv1": 0.75, "layer2.*.conv1": 0.75, "layer3.*.conv1": 0.32}, None, 2.55),
    ],
)
def test_ratios_alone_give_the_published_sizes_of_greg(resnet56, ratios, gone, faster):
    """ICLR 2021, tables 1 and 2, github.com/MingSun-Tse/Regularization-Pruning; 70.57 % is printed for 70.58.

    Its ratio of a layer is of filters, rounded up. Which rows go the sizes do not tell.
    """
    groups, weights, work = resnet56
    assert (weights, work) == (853_018, 125_485_696)
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(0))
    chosen = plan(groups, scores, Budget(ratios=ratios))
    assert gone is None or round(100 * chosen.removed["params"], 2) == gone
    assert round(1 / (1 - chosen.removed["macs"]), 2) == faster


@pytest.mark.parametrize(("rounding", "pruned"), [(None, 3), ("ceil", 3), ("floor", 2), ("nearest", 3)])
def test_a_ratio_is_rounded_as_asked(rounding, pruned):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    groups = couple(model, trace(model, torch.randn(1, 3)))
    chosen = plan(groups, torch.arange(5.0), Budget(ratios={"0": 0.5}, rounding=rounding))
    assert chosen.rows["0"] == "-" * pruned + "#" * (5 - pruned)


def test_a_ratio_of_one_leaves_a_row_and_a_ratio_of_zero_all():
    groups = GROUPS["plain", "tied"]
    chosen = plan(groups, torch.rand(len(groups)), Budget(ratios={"0": 1.0, "3": 0.0}))
    assert (chosen.rows["0"].count("#"), chosen.rows["3"].count("-")) == (1, 0)


def test_a_ratio_counts_whole_heads():
    model, example = build(SMALL, "attention")
    groups = heads(couple(model, trace(model, example)))
    chosen = plan(groups, torch.arange(2.0), Budget(ratios={"[qkv]": 0.5}))
    assert [chosen.rows[name] for name in "qkv"] == ["----####"] * 3


def test_a_ratio_of_a_convolution_takes_the_depthwise_one_along():
    model, example = build(SMALL, "depthwise")
    groups = couple(model, trace(model, example))
    chosen = plan(groups, torch.arange(float(len(groups))), Budget(ratios={"0.0": 0.5}))
    assert (chosen.rows["0.0"], chosen.rows["1.0"]) == ("---###", "---###")


def test_only_and_except_say_which_layers_are_pruned():
    groups, scores = GROUPS["preresnet", "union"], torch.rand(len(GROUPS["preresnet", "union"]))

    def cut(**filters):
        rows = plan(groups, scores, Budget(groups=0.05, **filters)).rows
        return {name for name, line in rows.items() if "-" in line}

    assert {name.rpartition(".")[2] for name in cut(only=["*.conv1"])} == {"conv1"}
    assert not {name for name in cut(except_=["*.conv1"]) if name.endswith(".conv1")}
    assert not cut(only=["*.conv1", "*.conv2"], except_=["*.conv2", "layer1.*"]) & {"layer1.0.conv1"}


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"ratios": {"layer9.*": 0.5}}, r"budget.ratios: a glob of layers .* expected, found 'layer9.\*'"),
        ({"ratios": {"linear": 0.5}}, "budget.ratios: a glob of layers whose rows may be pruned expected"),
        ({"groups": 0.1, "only": ["nothing"]}, "budget.only: a glob of layers .* found 'nothing'"),
        ({"groups": 0.1, "except_": ["nothing"]}, "budget.except: a glob of layers .* found 'nothing'"),
        ({"ratios": {"layer*.conv1": 0.5, "layer1.0.*": 0.4}}, "layer1.0.conv1: one ratio expected, found 0.5 and 0.4"),
        (
            {"ratios": {"conv1": 0.5, "layer1.0.conv2": 0.25}},
            "one ratio for layers whose rows go together expected, found .* 0.25 for layer1.0.conv2 and 0.5 for conv1",
        ),
        ({"ratios": {"conv1": 0.5}}, "found none for layer.* and 0.5 for conv1"),
        ({"params": 0.9, "only": ["layer*.conv1"], "layer_limit": 0.5}, "at most .* within layer_limit and only"),
    ],
)
def test_globs_and_ratios_that_no_plan_can_meet_are_refused_in_a_line(budget, says):
    groups = grouped("option-a", "tied")
    with pytest.raises(HapError, match=says) as caught:
        plan(groups, torch.rand(len(groups)), Budget(**budget))
    assert "\n" not in str(caught.value)


def test_a_ratio_that_asks_for_frozen_rows_is_refused():
    groups = grouped("plain", "tied")
    groups.row_group[groups.shapes["0"].rows_at][:2] = -1
    with pytest.raises(HapError, match=r"budget.ratios: 0: 3 rows to prune, found 2 that may be"):
        plan(groups, torch.rand(len(groups)), Budget(ratios={"0": 0.75}))
