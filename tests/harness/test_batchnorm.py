"""Folding and recalibration, against the network itself."""

import pytest
import torch
from test_methods import members, score, seeded, setting
from torch import nn

from hap.harness.batchnorm import folded, folded_trace, recalibrate
from hap.methods import hessian_trace
from hap.structure.layers import forward


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "option-a", "option-b", "branches", "preresnet"])
def test_folding_keeps_the_function_and_the_score_of_groups_of_one_layer(name, how):
    """Rows of w times s have curvature over s^2; across layers the scales differ, so tied groups may change."""
    model, batches, groups = setting(name, how)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -2, 2, generator=seeded(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = folded(model, groups)
    for x, _ in batches:
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    moved = [key for key, value in small.state_dict().items() if not torch.equal(value, before[key])]
    if name != "branches":  # there a BatchNorm reads several layers at once
        assert any(key.endswith("weight") and before[key].dim() == 4 for key in moved)
    plain, fold = (score(each, model, batches, groups) for each in (hessian_trace, folded_trace))
    alone = torch.tensor([len({key for key, _ in rows}) == 1 for rows in members(model, groups)])
    torch.testing.assert_close(fold[alone], plain[alone], rtol=1e-7, atol=1e-12)
    if how == "tied" and name in ("option-a", "option-b"):
        assert not torch.allclose(fold[~alone], plain[~alone], rtol=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_recalibrated_statistics_are_those_of_the_batches_and_nothing_else_changes(training):
    """The oracle is the mean and the unbiased variance of what flows into the first BatchNorm, batch by batch."""
    model, batches, _ = setting("option-b", parts=(3, 4))
    model.train(training)
    model.bn1.momentum = 0.3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate(model, batches, forward)
    seen = [model.conv1(x).transpose(0, 1).flatten(1) for x, _ in batches]
    torch.testing.assert_close(model.bn1.running_mean, torch.stack([y.mean(1) for y in seen]).mean(0))
    torch.testing.assert_close(model.bn1.running_var, torch.stack([y.var(1) for y in seen]).mean(0))
    assert model.training is training
    assert model.bn1.training is training
    assert model.bn1.momentum == 0.3
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("running" not in key and "tracked" not in key)


def test_batchnorm_without_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    recalibrate(model, [(torch.randn(2, 1, 4, 4), torch.zeros(2))], forward)
    assert model[1].running_mean is None
