"""Coupling: components against scipy, sums against loops, and what each rule ties together."""

import pytest
import torch
from cases import SMALL, build
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hap import HapError, couple, trace
from hap.structure.groups import components


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_components_are_those_of_scipy(n, links):
    links = [(a % n, b % n) for a, b in links]
    a, b = torch.tensor([*zip(*links, strict=True)] or [[], []], dtype=torch.long)
    label = components(n, a, b)
    _, expected = connected_components(coo_matrix(([1] * len(links), (a.tolist(), b.tolist())), shape=(n, n)), False)
    for i in range(n):
        assert label[i] == min(j for j in range(n) if expected[j] == expected[i])


def test_a_long_chain_is_one_component():
    chain = torch.arange(999)
    assert (components(1000, chain, chain + 1) == 0).all()
    assert (components(1000, 999 - chain, 998 - chain) == 0).all()


def rows_of(groups, name):
    shape = groups.shapes[name]
    return groups.row_group[shape.first_row : shape.first_row + shape.rows].tolist()


def test_tied_makes_one_decision_for_all_producers_of_a_stream():
    model, example = build(SMALL, "option-b")
    feeds = trace(model, example)
    tied, union = couple(model, feeds, "tied"), couple(model, feeds, "union")
    assert rows_of(tied, "conv1") == rows_of(tied, "layer1.0.conv2")
    assert set(rows_of(tied, "conv1")).isdisjoint(rows_of(tied, "layer1.0.conv1"))
    assert set(rows_of(union, "conv1")).isdisjoint(rows_of(union, "layer1.0.conv2"))


@pytest.mark.parametrize("how", ["tied", "union"])
def test_a_depthwise_row_goes_with_the_row_that_feeds_it(how):
    model, example = build(SMALL, "depthwise")
    groups = couple(model, trace(model, example), how)
    assert rows_of(groups, "0.0") == rows_of(groups, "1.0")


@pytest.mark.parametrize("how", ["tied", "union"])
def test_the_rows_and_inputs_of_a_convolution_group_are_one_group(how):
    model, example = build(SMALL, "residual")
    groups = couple(model, trace(model, example), how)
    assert rows_of(groups, "grouped") == [rows_of(groups, "grouped")[0]] * 2 + [rows_of(groups, "grouped")[2]] * 2
    assert rows_of(groups, "stem") == rows_of(groups, "grouped")


def test_a_head_is_one_group_under_union_too():
    model, example = build(SMALL, "attention")
    groups = couple(model, trace(model, example), "union")
    assert rows_of(groups, "q") == rows_of(groups, "k") == rows_of(groups, "v")
    assert len(set(rows_of(groups, "q"))) == 2


def test_a_gate_is_decided_alone_under_union_and_with_its_channel_when_tied():
    model, example = build(SMALL, "gated")
    feeds = trace(model, example)
    tied, union = couple(model, feeds, "tied"), couple(model, feeds, "union")
    assert rows_of(tied, "up") == rows_of(tied, "conv")
    assert set(rows_of(union, "up")).isdisjoint(rows_of(union, "conv"))


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", SMALL)
def test_reduce_sums_over_the_rows_of_each_group(name, how):
    model, example = build(SMALL, name)
    groups = couple(model, trace(model, example), how)
    values = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    expected = torch.zeros(len(groups))
    for module, shape in groups.shapes.items():
        for i, group in enumerate(rows_of(groups, module) if shape.mixing else []):
            if group >= 0:
                expected[group] += values[f"{module}.weight"][i].sum()
                expected[group] += values[f"{module}.bias"][i] if f"{module}.bias" in values else 0
    assert torch.allclose(groups.reduce(values), expected, atol=1e-5)


def test_reduce_keeps_double_precision_and_counts_what_is_missing_as_zero():
    model, example = build(SMALL, "mlp")
    groups = couple(model, trace(model, example))
    total = groups.reduce({"0.weight": torch.ones(8, 6, dtype=torch.float64)})
    assert total.dtype == torch.float64
    assert total.tolist() == [6.0] * 8 + [0.0] * 7


def test_another_coupling_is_refused(unchecked):
    model, example = build(SMALL, "mlp")
    with pytest.raises(HapError, match="'tied' or 'union' expected, found 'loose'"):
        couple(model, trace(model, example), "loose")
