"""The kit finds what is planted: a stranger's score, implant, groups or surgery that breaks one rule each."""

import pytest
import torch
from cases import SMALL, build
from torch import nn

from hap import CrossEntropy, HapError, couple, declare, testing, trace, updates
from hap.implants import centre_tap, low_rank, mean, zero
from hap.methods import magnitude
from hap.plan import Fate
from hap.testing import check_groups, check_head_implant, check_implant, check_score, check_update, random_plan


def setting(name="residual", how="union"):
    model, x = build(SMALL, name)
    batches = [(x, torch.tensor([0, 1]))]
    return model, batches, couple(model, trace(model, x), how)


def from_the_global_generator(model, loss, batches, groups, *, rng):
    return torch.rand(len(groups))


def changing_weights(model, loss, batches, groups, *, rng):
    with torch.no_grad():
        model.stem.weight.add_(1e-3)
    return torch.rand(len(groups), generator=rng)


def changing_statistics(model, loss, batches, groups, *, rng):
    model.train()
    for x, _ in batches:
        model(x)
    model.eval()
    return torch.rand(len(groups), generator=rng)


def changing_modes(model, loss, batches, groups, *, rng):
    model.bn0.train()
    return torch.rand(len(groups), generator=rng)


def freezing(model, loss, batches, groups, *, rng):
    model.fc.weight.requires_grad_(False)
    return torch.rand(len(groups), generator=rng)


def leaving_gradients(model, loss, batches, groups, *, rng):
    sum(loss(model, batch) for batch in batches).backward()
    return torch.rand(len(groups), generator=rng)


def not_finite(model, loss, batches, groups, *, rng):
    return torch.rand(len(groups), generator=rng).index_fill(0, torch.tensor(1), torch.nan)


def too_long(model, loss, batches, groups, *, rng):
    return torch.rand(len(groups) + 1, generator=rng)


def by_row(model, loss, batches, groups, *, rng):
    return torch.rand(len(groups), 1, generator=rng)


def with_gradient(model, loss, batches, groups, *, rng):
    return torch.rand(len(groups), generator=rng) + model.fc.bias.sum()


FAULTS = {
    from_the_global_generator: "two runs with the same seed differ",
    changing_weights: r"the model was left changed \(stem.weight\)",
    changing_statistics: r"the model was left changed \(bn0.running_mean\)",
    changing_modes: r"the model was left changed \(its modes\)",
    freezing: "the model was left changed",
    leaving_gradients: "gradients were left on the parameters",
    not_finite: "finite numbers expected",
    too_long: "finite numbers expected",
    by_row: "finite numbers expected",
    with_gradient: "the scores carry a gradient",
}


@pytest.mark.parametrize(("fault", "says"), FAULTS.items(), ids=[f.__name__ for f in FAULTS])
def test_a_faulty_score_is_found(fault, says):
    model, batches, groups = setting()
    with pytest.raises(HapError, match=f"^check_score: .*{says}"):
        check_score(fault, model, CrossEntropy(), batches, groups)


def test_a_sound_score_passes_on_batches_that_can_be_read_once():
    model, batches, groups = setting()
    check_score(magnitude, model, CrossEntropy(), iter(batches), groups)


def too_wide(module, rows, inputs):
    return centre_tap(module, torch.arange(module.out_channels), inputs)


def too_small(module, rows, inputs):
    return nn.Sequential(centre_tap(module, rows, inputs), nn.MaxPool2d(2))


def reading_everything(module, rows, inputs):
    return nn.Conv2d(module.in_channels, len(rows), 1)


def changing_the_module(module, rows, inputs):
    made = centre_tap(module, rows, inputs)
    nn.init.zeros_(module.weight)
    return made


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (too_wide, "output of shape"),
        (too_small, "output of shape"),
        (reading_everything, "check_implant: it does not run"),
        (changing_the_module, "the module was changed"),
    ],
)
def test_a_faulty_implant_is_found(fault, says):
    with pytest.raises(HapError, match=says):
        check_implant(fault, nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 6))


def test_groups_of_a_table_that_is_not_true_are_found():
    """Two rows are swapped; a plan that keeps both or drops both cannot tell, so it takes more than a few plans."""
    model, x = build(SMALL, "plain")
    rows = [(i, 4 * i + j) for i in range(6) for j in range(4)]
    wrong = [("0", "3", range(4), [1, 0, 2, 3]), ("3", "6", *zip(*rows, strict=True)), ("6", "8", range(7), range(7))]
    groups = couple(model, declare(model, x, wrong, frozen=["8"]))
    with pytest.raises(HapError, match="check_groups: surgery and masking differ by"):
        check_groups(model, x, groups, trials=12)


def test_groups_that_leave_a_reader_out_make_a_model_that_does_not_run():
    model, x = build(SMALL, "plain")
    groups = couple(model, declare(model, x, [("6", "8", range(7), range(7))], frozen=["0", "3", "8"]), "union")
    check_groups(model, x, groups)
    table = [("0", "3", range(4), range(4)), ("3", "6", range(6), range(6)), ("6", "8", range(7), range(7))]
    groups = couple(model, declare(model, x, table, frozen=["8"]))
    with pytest.raises(HapError, match=r"check_groups: the pruned model does not run \(.+\)$"):
        check_groups(model, x, groups)


def test_surgery_that_forgets_a_row_is_found(monkeypatch):
    def forgetful(model, groups, chosen, implant):
        fates = chosen.fates(groups)
        fates[(fates == Fate.KEEP).nonzero()[0]] = int(Fate.DROP)
        return testing.mask(model, groups, testing.Plan.of(groups, fates))

    model, batches, groups = setting("mlp")
    monkeypatch.setattr(testing, "apply", forgetful)
    with pytest.raises(HapError, match="surgery and masking differ by"):
        check_groups(model, batches[0][0], groups)


def test_surgery_that_removes_nothing_is_found_by_its_parameters(monkeypatch):
    model, batches, groups = setting("mlp")
    monkeypatch.setattr(testing, "apply", lambda model, groups, chosen, implant: testing.mask(model, groups, chosen))
    with pytest.raises(HapError, match=r"check_groups: \d+ parameters predicted, found \d+"):
        check_groups(model, batches[0][0], groups)


def test_outputs_that_are_not_numbers_are_found(monkeypatch):
    def broken(model, groups, chosen, implant):
        small = testing.mask(model, groups, chosen)
        nn.init.constant_(small[-1].bias, torch.nan)
        return small

    model, batches, groups = setting("mlp")
    monkeypatch.setattr(testing, "apply", broken)
    with pytest.raises(HapError, match="surgery and masking differ by nan"):
        check_groups(model, batches[0][0], groups)


def test_a_random_plan_keeps_a_row_of_every_layer_and_has_the_shares_asked_for():
    _, _, groups = setting("plain", "tied")
    for seed in range(20):
        fates = random_plan(groups, torch.Generator().manual_seed(seed), 0.9, 0.1).fates(groups)
        for s in groups.shapes.values():
            of = groups.row_group[s.first_row : s.first_row + s.rows]
            assert not (of >= 0).all() or (fates[of] == Fate.KEEP).any()
    untouched = random_plan(groups, torch.Generator(), 0.0, 0.0)
    assert set("".join(untouched.rows.values())) == {"#"}


def heads_of(implant, **changes):
    """Checks an implant of heads on a layer of four slots behind, and five numbers read before."""
    torch.manual_seed(0)
    check_head_implant(implant, nn.Linear(4, 3), torch.randn(20, 5), torch.randn(20, 4), **changes)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("implant", [zero, mean, low_rank])
def test_our_implants_of_heads_pass(implant, rank):
    heads_of(implant, rank=rank)


def through(out, rank=2):
    return lambda module, slots, inputs: nn.Sequential(nn.Linear(inputs.slots, rank), nn.Linear(rank, out))


def spoiling(module, slots, inputs):
    with torch.no_grad():
        module.weight.zero_()
    return zero(module, slots, inputs)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (through(4), r"\(20, 3\) numbers expected, found \(20, 4\)"),
        (through(3, 5), "at most the 16 weights of rank 2 expected, found 40"),
        (lambda module, slots, inputs: nn.Linear(4, 3), "check_head_implant: it does not run"),
        (spoiling, "the module was changed"),
    ],
)
def test_a_faulty_implant_of_heads_is_named(fault, says):
    with pytest.raises(HapError, match=says):
        heads_of(fault)


class Stubborn(nn.Module):
    """A forward pass that fails in its own way once its first layer is narrower."""

    def __init__(self, fail):
        super().__init__()
        self.first, self.last, self.fail = nn.Linear(4, 6), nn.Linear(6, 3), Failing(fail)

    def forward(self, x):
        return self.last(self.fail(self.first(x).relu()))


class Failing(nn.Module):
    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def forward(self, x):
        if x.shape[-1] != 6:
            self.fail(x)
        return x


def asserts(x):
    assert x.shape[-1] == 6


def looks_up(x):
    return {6: "six"}[0]


def reads(x):
    return x.no_such_attribute


def stops(x):
    raise StopIteration


@pytest.mark.parametrize("fail", [asserts, looks_up, reads, stops], ids=lambda fail: fail.__name__)
def test_any_failure_of_the_pruned_model_is_one_line_with_the_module_and_the_cause(fail):
    torch.manual_seed(0)
    model, x = Stubborn(fail).eval(), torch.randn(8, 4)
    groups = couple(model, trace(model, x))
    kind = {asserts: "AssertionError", looks_up: "KeyError: 0", reads: "AttributeError", stops: "StopIteration"}[fail]
    with pytest.raises(HapError) as caught:
        check_groups(model, x, groups)
    assert f"check_groups: the pruned model does not run (fail (Failing): {kind}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failure_of_the_masked_model_alone_is_one_line_too():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x)
            if (x == 0).all(0).any():
                raise LookupError("a channel is silent")
            return self.last(x)

    torch.manual_seed(0)
    model, x = Spread().eval(), torch.randn(8, 4)
    says = r"the masked model does not run \(the model \(Spread\): LookupError: a channel is silent\)"
    with pytest.raises(HapError, match=says):
        check_groups(model, x, couple(model, trace(model, x)))


def test_outputs_of_another_shape_are_said_with_both_shapes(monkeypatch):
    model, batches, groups = setting("mlp")
    monkeypatch.setattr(testing, "apply", lambda model, groups, chosen, implant: nn.Sequential(*model, nn.Flatten(0)))
    says = r"outputs of the masked model's shapes \[\(2, 5\)\] expected, found \[\(10,\)\]"
    with pytest.raises(HapError, match=says):
        check_groups(model, batches[0][0], groups)


def test_an_output_without_numbers_is_said():
    model, batches, groups = setting("mlp")
    with pytest.raises(HapError, match="a floating-point tensor in the output expected, found a Tensor; pass call="):
        check_groups(model, batches[0][0], groups, call=lambda model, x: model(x).argmax(1))


def test_an_implant_that_fails_in_its_own_way_is_found():
    def forgetful(module, rows, inputs):
        made = centre_tap(module, rows, inputs)
        made.forward = lambda x: {}["rows"]
        return made

    with pytest.raises(HapError, match=r"check_implant: it does not run \(the model \(Conv2d\): KeyError: 'rows'\)"):
        check_implant(forgetful, nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("update", [updates.least_squares, updates.mean, updates.rescale, updates.curvature_weighted])
@pytest.mark.parametrize("reader", [nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 1, bias=False)])
def test_the_updates_of_the_package_conform(update, reader):
    check_update(update, reader, torch.randn(16, 4, 6, 6))
    check_update(update, nn.Linear(6, 3), torch.randn(16, 6))


def changing(reader, kept, moments):
    with torch.no_grad():
        reader.weight.zero_()
    return reader.weight.clone(), moments.y.flatten()


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (lambda reader, kept, moments: (reader.weight.T, moments.y.flatten()), "a weight of shape .* expected, found"),
        (lambda reader, kept, moments: (reader.weight / 0, moments.y.flatten()), "finite weights expected"),
        (changing, "the reader was changed"),
    ],
)
def test_an_update_that_cannot_be_trusted_is_told_so(update, says):
    with pytest.raises(HapError, match=f"check_update: {says}"):
        check_update(update, nn.Linear(6, 2), torch.randn(16, 6))
