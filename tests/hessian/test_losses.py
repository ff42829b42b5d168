"""Losses: their columns against the dense Hessian in the outputs, by autograd; their means against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hap import CrossEntropy, HapError
from hap.hessian.losses import Loss, SquaredError

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)
LOSSES = {
    "plain": CrossEntropy(),
    "smoothed": CrossEntropy(label_smoothing=0.2),
    "weighted": CrossEntropy(weight=WEIGHT),
    "both": CrossEntropy(label_smoothing=0.1, weight=WEIGHT),
    "squared": SquaredError(),
}


def setting(name):
    rng = torch.Generator().manual_seed(0)
    outputs = 2 * torch.randn(6, 4, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, 4, (6,), generator=rng)
    return LOSSES[name], outputs, torch.randn_like(outputs) if name == "squared" else targets


def dense(loss, outputs, targets):
    """The Hessian of each sample's summed loss."""

    def one(output, target):
        return loss.total(output[None], target[None])

    return torch.stack(
        [torch.autograd.functional.hessian(lambda x, t=t: one(x, t), o) for o, t in zip(outputs, targets, strict=True)]
    )


@pytest.mark.parametrize("name", LOSSES)
def test_columns_are_a_root_of_the_hessian_in_the_outputs(name):
    loss, outputs, targets = setting(name)
    columns = loss.columns(outputs, targets, None, None).vectors
    assert len(columns) == (4 if name == "squared" else 3)
    assert torch.allclose(torch.einsum("cni,cnj->nij", columns, columns), dense(loss, outputs, targets), atol=1e-14)
    assert isinstance(loss, Loss)


@pytest.mark.parametrize(
    ("name", "k"), [("plain", 0), ("plain", 1), ("both", 0), ("both", 1), ("squared", 0), ("squared", 2)]
)
def test_some_columns_and_one_drawn_are_the_hessian_on_average(name, k):
    """Within five standard errors over 4,000 draws; a bias below a hundredth of the Hessian passes."""
    loss, outputs, targets = setting(name)
    rng, many = torch.Generator().manual_seed(k), 4000
    columns, drawn = loss.columns(outputs.repeat(many, 1), targets.repeat(many, *[1] * (targets.dim() - 1)), k, rng)
    assert len(columns) == k + 1
    assert drawn
    found = torch.einsum("cni,cnj->nij", columns, columns).reshape(many, 6, 4, 4)
    error = found.std(0) / many**0.5
    assert ((found.mean(0) - dense(loss, outputs, targets)).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize(("name", "k"), [("plain", 2), ("plain", 3), ("plain", 9), ("squared", 3), ("squared", 4)])
def test_nothing_is_drawn_when_two_classes_or_one_output_are_left(name, k):
    loss, outputs, targets = setting(name)
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    found = loss.columns(outputs, targets, k, rng)
    assert not found.drawn
    assert torch.equal(found.vectors, loss.columns(outputs, targets, None, None).vectors)
    assert torch.equal(before, rng.get_state())


def test_the_likeliest_classes_come_first_each_against_the_mean_of_those_that_follow():
    loss, outputs, targets = setting("plain")
    p = outputs.softmax(1)
    one, two = loss.columns(outputs, targets, None, None).vectors[:2]
    top = F.one_hot(p.argmax(1), 4)
    rest = p * (1 - top)
    left = rest.sum(1, keepdim=True)
    assert torch.allclose(one, (top - rest / left) * (p.amax(1, keepdim=True) * left).sqrt())
    assert ((two * top).abs() < 1e-15).all()


@pytest.mark.parametrize(("classes", "share"), [(10, 0.3), (10, 0.01), (100, 0.1)])
def test_enough_columns_leave_at_most_half_the_share_of_the_trace(classes, share):
    outputs = 3 * torch.randn(20, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.zeros(20, dtype=torch.long)
    vectors = CrossEntropy().columns(outputs, targets, None, None).vectors
    taken = vectors.square().sum((1, 2)).cumsum(0) / vectors.square().sum()
    k = CrossEntropy().enough(outputs, targets, share)
    assert taken[k - 1] >= 1 - share / 2 > taken[k - 2]
    assert SquaredError().enough(outputs, targets, share) == round(classes * (1 - share))


def test_a_sample_without_doubt_draws_nothing_that_is_not_finite():
    for k in (0, 1, None):
        columns = (
            CrossEntropy().columns(torch.tensor([[1e4, 0, 0, 0]]), torch.tensor([0]), k, torch.Generator()).vectors
        )
        assert columns.isfinite().all()
        assert columns.square().sum() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_that_of_torch(name):
    loss, outputs, targets = setting(name)
    peer = nn.MSELoss() if name == "squared" else nn.CrossEntropyLoss(loss.weight, label_smoothing=loss.label_smoothing)
    assert torch.isclose(loss(nn.Identity(), (outputs, targets)), peer(outputs, targets), rtol=1e-14)
    assert torch.isclose(loss.total(outputs, targets) / loss.mass(targets), peer(outputs, targets), rtol=1e-14)


def test_the_call_says_how_outputs_come_from_the_model():
    loss, outputs, targets = setting("plain")
    doubled = CrossEntropy(call=lambda model, x: 2 * model(x))
    assert torch.isclose(doubled(nn.Identity(), (outputs, targets)), loss(nn.Identity(), (2 * outputs, targets)))


@pytest.mark.parametrize(
    ("outputs", "targets", "k", "rng", "says"),
    [
        (torch.randn(2, 3), torch.tensor([0, 1]), -1, torch.Generator(), "found -1"),
        (torch.randn(2, 3), torch.tensor([0, 1]), 1, None, "a generator to draw with"),
        (torch.randn(2, 3), torch.rand(2, 3), None, None, "a class index for each of 2 samples expected"),
        (torch.randn(2, 3), torch.tensor([0]), None, None, "a class index for each of 2 samples expected"),
    ],
)
def test_columns_that_make_no_sense_are_refused(outputs, targets, k, rng, says):
    with pytest.raises(HapError, match=says):
        CrossEntropy().columns(outputs, targets, k, rng)


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_returns_no_logits_is_refused():
    with pytest.raises(HapError, match="found dict; pass call= that returns them"):
        CrossEntropy(call=lambda model, x: {"logits": x})(
            torch.nn.Identity(), (torch.randn(2, 3), torch.tensor([0, 1]))
        )


@pytest.mark.parametrize("classes", [5, 120])
@pytest.mark.parametrize("name", ["plain", "both"])
def test_ignored_targets_count_nowhere(name, classes):
    """Against torch's own loss; with 120 classes an index of -100 would be that of a class."""
    rng = torch.Generator().manual_seed(0)
    outputs, targets = (
        torch.randn(6, classes, generator=rng, dtype=torch.float64),
        torch.tensor([0, -100, 4, 1, -100, 3]),
    )
    weight = None if name == "plain" else torch.rand(classes, generator=rng, dtype=torch.float64)
    loss = CrossEntropy(label_smoothing=0.1 * (name == "both"), weight=weight)
    peer = nn.CrossEntropyLoss(weight, label_smoothing=loss.label_smoothing)
    assert torch.isclose(loss(nn.Identity(), (outputs, targets)), peer(outputs, targets), rtol=1e-14)
    assert torch.isclose(loss.total(outputs, targets) / loss.mass(targets), peer(outputs, targets), rtol=1e-14)
    columns = loss.columns(outputs, targets, None, None).vectors
    assert torch.allclose(torch.einsum("cni,cnj->nij", columns, columns), dense(loss, outputs, targets), atol=1e-14)
    some = loss.columns(outputs, targets, 1, rng).vectors
    assert (some[:, targets == -100] == 0).all()
    kept = targets >= 0
    assert loss.enough(outputs, targets, 0.3) == loss.enough(outputs[kept], targets[kept], 0.3)


def test_a_batch_of_ignored_targets_alone_has_no_loss_and_no_slope():
    outputs, targets = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    loss = CrossEntropy()
    value = loss(nn.Identity(), (outputs, targets))
    (slope,) = torch.autograd.grad(value, outputs)
    assert float(value.detach()) == float(slope.abs().max()) == float(loss.mass(targets)) == 0
    assert (loss.columns(outputs.detach(), targets, None, None).vectors == 0).all()
    assert loss.enough(outputs, targets, 0.1) == 0


@pytest.mark.parametrize("ignored", [255, 0])
def test_any_target_can_be_the_one_that_is_ignored(ignored):
    outputs, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, ignored, 2, ignored])
    loss = CrossEntropy(ignore_index=ignored)
    expected = F.cross_entropy(outputs, targets, ignore_index=ignored)
    assert torch.isclose(loss(nn.Identity(), (outputs, targets)), expected, rtol=1e-14)
    assert loss.mass(targets) == 2


@pytest.mark.parametrize(
    ("outputs", "targets", "says"),
    [
        (
            torch.randn(2, 3),
            torch.tensor([0, 3]),
            "for 3 logits targets from 0 to 2 expected, found 3; .*ignore_index=3",
        ),
        (torch.randn(2, 3), torch.tensor([-1, 0]), "targets from 0 to 2 expected, found -1"),
        (torch.randn(2, 1), torch.tensor([0, 0]), r"a logit for each of 2 or more classes expected, found 1; .*pad\("),
    ],
)
def test_targets_that_no_logit_stands_for_are_refused(outputs, targets, says):
    for measure in (lambda loss: loss.total(outputs, targets), lambda loss: loss.columns(outputs, targets, None, None)):
        with pytest.raises(HapError, match=f"^cross-entropy: .*{says}"):
            measure(CrossEntropy())


def test_the_mass_of_a_target_that_no_class_weight_stands_for_is_refused():
    with pytest.raises(HapError, match="for 4 logits targets from 0 to 3 expected, found -1"):
        CrossEntropy(weight=WEIGHT).mass(torch.tensor([0, -1]))


def test_what_the_message_of_a_single_logit_advises_is_the_binary_loss():
    outputs, targets = torch.randn(5, 1), torch.tensor([0, 1, 1, 0, 1])
    loss = CrossEntropy(call=lambda model, x: F.pad(model(x), (1, 0)))
    expected = F.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())
    assert torch.isclose(loss(nn.Identity(), (outputs, targets)), expected)


def test_squared_error_of_shapes_that_would_broadcast_is_refused():
    outputs, targets = torch.randn(4, 1), torch.randn(4)
    says = r"squared error: outputs and targets of one shape expected, found \(4, 1\) and \(4,\); reshape the targets"
    for measure in (
        lambda loss: loss(nn.Identity(), (outputs, targets)),
        lambda loss: loss.columns(outputs, targets, None, None),
    ):
        with pytest.raises(HapError, match=says):
            measure(SquaredError())
    assert SquaredError()(nn.Identity(), (outputs, targets[:, None])) > 0
