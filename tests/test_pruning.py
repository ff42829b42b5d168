"""The whole path in one call, on what people have: tensors, tuples, dicts, with a loss and without."""

import pytest
import torch
from cases import SMALL, bert, build, tokens
from torch import nn

from hap import Budget, CrossEntropy, HapError, prune
from hap.cost import params
from hap.structure.layers import forward


def drawn(name, times=4):
    model, example = build(SMALL, name)
    batches = [torch.randn(32, *example.shape[1:], generator=torch.Generator().manual_seed(i)) for i in range(times)]
    return model, batches


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("conv1d", "gated")])
def test_a_model_is_pruned_by_half_of_its_groups(name):
    model, batches = drawn(name)
    before = [p.clone() for p in model.parameters()]
    small, plan = prune(model, batches, Budget(groups=0.5))
    assert forward(small, batches[0]).shape == forward(model, batches[0]).shape
    assert params(small) == plan.sizes["parameters"][1] < params(model) == plan.sizes["parameters"][0]
    assert params(small) == round((1 - plan.removed["params"]) * params(model)) + sum(plan.added.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_share_is_of_the_parameters_and_a_loss_lets_the_curvature_choose():
    model, batches = drawn("option-b")
    pairs = [(x, torch.arange(32) % 10) for x in batches]
    plain, curved = prune(model, batches, 0.3).plan, prune(model, pairs, 0.3, loss=CrossEntropy()).plan
    assert plain.removed["params"] >= 0.3 <= curved.removed["params"]
    assert plain.rows != curved.rows


def test_channels_inside_blocks_go_before_those_of_a_stream():
    model, batches = drawn("option-b")
    rows = prune(model, batches, 0.3).plan.rows
    assert {name.rpartition(".")[2] for name, line in rows.items() if "-" in line} == {"conv1"}


def test_a_tuple_and_a_dict_are_what_forward_takes():
    model, batches = drawn("mlp")
    one, other = prune(model, [(x,) for x in batches], 0.3), prune(model, batches, 0.3)
    assert one.plan.rows == other.plan.rows
    sentences = [{**tokens(), "input_ids": torch.randint(1, 50, (2, 8))} for _ in range(8)]
    small, plan = prune(bert().eval(), sentences, Budget(prunable=0.3))
    assert small(**tokens()).logits.shape == (2, 3)
    assert plan.removed["prunable"] >= 0.3


def test_the_plan_prints_what_it_costs_and_where_it_cuts():
    model, batches = drawn("plain")
    small, plan = prune(model, batches, Budget(ratios={"0": 0.5}))
    lines = str(plan).splitlines()
    assert lines[0].split() == ["before", "after", "left"]
    assert [line.split()[0] for line in lines[1:4]] == ["parameters", "MACs", "seconds"]
    assert lines[1].split()[1:3] == [f"{params(model):,d}", f"{params(small):,d}"]
    assert lines[4] == "1 of 4 layers lose rows:"
    assert lines[5].split() == ["0", "2", "of", "4"]
    assert "#" not in str(plan)


def test_without_batches_it_is_refused():
    with pytest.raises(HapError, match="prune: calibration batches expected, found none"):
        prune(nn.Linear(2, 2), [], 0.5)
