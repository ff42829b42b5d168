"""Tracing: relations written by hand for small models, counts that the published code gives, and every refusal."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from cases import SMALL, Attention, bert, build, plain, tokens
from torch import nn

from hap import CrossEntropy, HapError, apply, couple, declare, exact, hutchinson, mask, trace
from hap.harness.tasks import nets
from hap.implants import zero
from hap.structure.layers import starts
from hap.testing import check_groups, random_plan


def relation(feeds, writer, reader):
    """{(row, slot)} between two modules."""
    w, r = feeds.modules.index(writer), feeds.modules.index(reader)
    row0, row1 = starts(feeds.rows)[w : w + 2]
    slot0, slot1 = starts(feeds.slots)[r : r + 2]
    inside = [(int(a), int(b)) for a, b in feeds.edges.T]
    return {(a - row0, b - slot0) for a, b in inside if row0 <= a < row1 and slot0 <= b < slot1}


def test_flattening_feeds_a_block_of_inputs_from_each_channel():
    feeds = trace(*build(SMALL, "plain"))
    assert relation(feeds, "0", "3") == {(i, i) for i in range(4)}
    assert relation(feeds, "3", "6") == {(i, 4 * i + j) for i in range(6) for j in range(4)}
    assert feeds.frozen_rows[-5:].all()
    assert not feeds.frozen_rows[:-5].any()
    assert feeds.frozen_slots[:3].all()
    assert not feeds.frozen_slots[3:].any()


def test_concatenation_shifts_slots():
    feeds = trace(*build(SMALL, "dense"))
    assert relation(feeds, "a", "b") == {(i, 3 + i) for i in range(4)}
    assert relation(feeds, "a", "norm") == {(i, 3 + i) for i in range(4)}
    assert relation(feeds, "b", "norm") == {(i, 7 + i) for i in range(4)}


def test_a_query_feeds_its_head_and_a_value_feeds_one_channel():
    feeds = trace(*build(SMALL, "attention"))
    head = {(i, j) for h in range(2) for i in range(4 * h, 4 * h + 4) for j in range(4 * h, 4 * h + 4)}
    assert relation(feeds, "q", "out") == head
    assert relation(feeds, "k", "out") == head
    assert relation(feeds, "v", "out") == {(i, i) for i in range(8)}


def test_heads_of_a_hugging_face_bert_are_found_unaided():
    model, example = bert(), tokens()
    groups = couple(model, trace(model.eval(), example), "tied")
    heads = set()
    for name, shape in groups.shapes.items():
        if name.endswith(("query", "key", "value")):
            of = groups.row_group[shape.first_row : shape.first_row + shape.rows].reshape(4, 8)
            assert (of == of[:, :1]).all()
            heads |= {(name.rpartition(".")[0], *of[:, 0].tolist())}
    assert len(heads) == 2  # query, key and value of a layer agree on the groups of its four heads
    assert len(groups) == 2 * (4 + 64) + 32  # heads and neurons of both layers, and the pooler


@pytest.mark.parametrize(
    ("model", "size", "channels"),
    [
        (nets.preresnet(29), 16, 4096),
        (nets.resnet(56, shortcut="B"), 16, 2128),
        (nets.resnet(32, (64, 128, 256), "B"), 16, 4928),
        (nets.vgg16(), 32, 4224),
    ],
    ids=["preresnet29", "resnet56", "wideresnet32", "vgg16"],
)
def test_union_groups_are_the_output_channels_that_the_published_code_counts(model, size, channels):
    """The counts are those of the published models' convolutions; this cannot see which channel is which."""
    assert len(couple(model, trace(model, torch.randn(1, 3, size, size)), "union")) == channels


def test_zero_padded_shortcuts_pin_the_padded_channels():
    model, example = build(SMALL, "option-a")
    feeds = trace(model, example)
    first = starts(feeds.slots)[feeds.modules.index("layer2.0.conv2")]
    stream = starts(feeds.slots)[feeds.modules.index("layer3.0.conv1")]
    assert not feeds.padded_slots[first : first + 8].any()
    assert feeds.padded_slots[stream : stream + 8].tolist() == [True] * 2 + [False] * 4 + [True] * 2


def test_embeddings_positions_and_outputs_freeze_what_they_touch():
    model, example = bert(), tokens()
    feeds = trace(model.eval(), example)
    frozen = dict(zip(feeds.modules, feeds.frozen_rows.split(feeds.rows), strict=True))
    assert frozen["bert.encoder.layer.0.output.dense"].all()
    assert frozen["classifier"].all()
    assert not frozen["bert.encoder.layer.0.intermediate.dense"].any()


def test_shared_weights_are_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    groups = couple(model, trace(model, torch.randn(1, 4)))
    assert len(groups) == 0


def test_a_module_that_is_called_twice_is_traced_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(F.relu(self.again(F.relu(self.again(F.relu(self.first(x)))))))

    model, x = Twice(), torch.randn(2, 4)
    groups = couple(model, trace(model, x))
    assert len(groups) == 6  # one decision for the hidden state
    check_groups(model, x, groups)


def test_the_model_is_left_as_it_was_found():
    model, example = build(SMALL, "residual")
    model.train()
    model.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, example)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model.bn1.training
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


class _Then(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.a, self.b, self.op = nn.Linear(4, 6), nn.Linear(6, 3), op

    def forward(self, x):
        return self.b(self.op(self.a(x)))


@pytest.mark.parametrize(
    "op",
    [
        torch.nan_to_num,
        lambda x: torch.where(x > 0, x, 0.1 * x.clamp(-1, 1).nan_to_num()),
        lambda x: (x > 0).float() * 2,
        lambda x: F.one_hot(x.argmax(-1), 6).float() + x.detach().nan_to_num(),
        torch.zeros_like,
    ],
    ids=["nan_to_num", "where", "comparison", "argmax", "dropped"],
)
def test_an_op_that_swallows_nan_is_refused_with_the_module_before_it(op):
    with pytest.raises(HapError, match=r"^a: .*declare\(\)"):
        trace(_Then(op), torch.randn(1, 4))


def relu_or_nothing(x):
    return x.relu() if x.mean() < 10 else torch.zeros_like(x)


def halved(x):
    steps = 0
    while not x.abs().max() < 1e-3 and steps < 9:
        x, steps = x / 2 if x.abs().max() < 100 else torch.zeros_like(x), steps + 1
    return x


@pytest.mark.parametrize("op", [relu_or_nothing, halved])
def test_a_data_dependent_branch_is_refused_as_what_it_is(op):
    says = r"^a: .* an `if`, a loop or item\(\) depends on its numbers in the model \(_Then\), test_tracing.py:\d+, "
    with pytest.raises(HapError, match=says + r".*opaque=\[...\], or .*declare\(\)") as caught:
        trace(_Then(op), torch.randn(1, 4))
    assert "swallows" not in str(caught.value)


@pytest.mark.parametrize("op", [F.dropout, lambda x: x + torch.randn_like(x)], ids=["dropout", "noise"])
def test_randomness_left_on_is_refused_as_what_it_is(op):
    says = r"^_Then: two passes over one example differ \((bernoulli|randn_like) draws random numbers in the model .*"
    with pytest.raises(HapError, match=says + r"test_tracing.py:\d+\); .*training=self.training") as caught:
        trace(_Then(op), torch.randn(1, 4))
    assert "swallows" not in str(caught.value)


def test_randomness_that_a_trace_cannot_see_is_named_by_check_groups():
    rng = torch.Generator().manual_seed(0)
    model, x = _Then(lambda x: x * (1 + float(torch.rand((), generator=rng)))), torch.randn(2, 4)
    with pytest.raises(HapError, match=r"two passes over one example differ \(rand draws random numbers in the model"):
        check_groups(model, x, couple(model, trace(model, x)))


def test_a_forward_that_fails_on_nan_is_said_to_and_can_be_left_whole():
    class Guard(nn.Module):
        def forward(self, x):
            assert x.isfinite().all(), "numbers\nonly"
            return x

    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), Guard(), nn.Linear(5, 3)), torch.randn(2, 4)
    says = (
        r"^trace: the model fails on NaN, by which rows are followed \(3 \(Guard\): AssertionError: numbers\); .*opaque"
    )
    with pytest.raises(HapError, match=says):
        trace(model, x)
    groups = couple(model, trace(model, x, opaque=["3"]))
    assert len(groups) == 6
    check_groups(model, x, groups)


def test_a_forward_of_a_fixed_batch_is_said_to_take_no_other():
    says = r"^trace: the model takes 1 sample but not 5 \(the model \(_Then\): RuntimeError: .*\); leave the batch free"
    with pytest.raises(HapError, match=says):
        trace(_Then(lambda x: x.reshape(1, 6)), torch.randn(1, 4))


def hidden():
    """Models that hide their layers, and what is said of each."""
    x, net = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    scripted = torch.jit.script(net)
    wide = nn.DataParallel(net)
    wide.device_ids = [0, 1]
    return {
        "scripted": (
            scripted,
            r"^the model \(RecursiveScriptModule\): TorchScript hides its layers; use the nn.Module",
        ),
        "frozen": (torch.jit.freeze(scripted), r"TorchScript hides its layers"),
        "recorded": (torch.jit.trace(net, x), r"^the model \(TopLevelTracedModule\): TorchScript hides its layers"),
        "in part": (nn.Sequential(nn.Linear(4, 4), scripted), r"^1 \(RecursiveScriptModule\): .*opaque=\['1'\]"),
        "exported": (torch.export.export(net, (x,)).module(), r"^GraphModule: a model of nn.Linear and convolutions"),
        "recurrent": (nn.LSTM(4, 6), r"^LSTM: a model of nn.Linear and convolutions expected"),
        "on several devices": (wide, r"^the model \(DataParallel\): .* pass its .module instead"),
        "compiled by itself": (nn.Sequential(torch.compile(net[0]), net[2]), r"^0 \(OptimizedModule\): "),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is (deprecated|not supported):FutureWarning")
@pytest.mark.filterwarnings("ignore:.*DataParallel.*:UserWarning")
def test_models_that_hide_their_layers_are_refused_with_what_to_do():
    for model, says in hidden().values():
        with pytest.raises(HapError, match=says):
            trace(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is (deprecated|not supported):FutureWarning")
def test_a_scripted_part_is_left_whole_and_a_scripted_model_is_not_measured():
    model, x = hidden()["in part"][0], torch.randn(2, 4)
    with pytest.raises(HapError, match=r"put nn.Sequential around it and pass opaque=\['1'\]"):
        trace(model, x, opaque=["1"])
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Sequential(model[1]))
    groups = couple(model, trace(model, x, opaque=["2"]))
    assert len(groups) == 6
    check_groups(model, x, groups)
    for measure in (exact, partial(hutchinson, probes=1, rng=torch.Generator())):
        with pytest.raises(HapError, match="TorchScript hides its layers"):
            measure(hidden()["scripted"][0], CrossEntropy(), [(x, torch.tensor([0, 1]))])


@pytest.mark.parametrize("wrap", [torch.fx.symbolic_trace, nn.DataParallel, partial(torch.compile, backend="eager")])
def test_wrapped_models_are_traced_and_measured_like_what_they_wrap(wrap):
    """Without check_groups, for its checks of types cannot be compiled."""
    model, x = build(SMALL, "plain")
    wrapped, batches = wrap(model).eval(), [(x, torch.tensor([0, 1]))]
    groups, expected = (couple(each, trace(each, x)) for each in (wrapped, model))
    assert len(groups) == len(expected)
    traces = [exact(w, CrossEntropy(), batches, g).trace for w, g in ((wrapped, groups), (model, expected))]
    assert torch.allclose(*traces)
    chosen = random_plan(groups, torch.Generator().manual_seed(0))
    small, masked = apply(wrapped, groups, chosen, zero), mask(wrapped, groups, chosen)
    assert torch.allclose(small(x), masked(x), atol=1e-5)


def test_a_trace_under_inference_mode_is_that_outside():
    model, x = build(SMALL, "residual")
    expected = couple(model, trace(model, x))
    with torch.inference_mode():
        found = couple(model, trace(model, x.clone()))
    assert torch.equal(found.row_group, expected.row_group)
    check_groups(model, x, found, trials=1)


def test_a_swallowing_branch_is_found_though_the_other_branch_keeps_the_nan():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.c(x.nan_to_num())

    with pytest.raises(HapError, match=r"^a: its output changes c "):
        trace(Fork(), torch.randn(1, 4))


def test_multihead_attention_is_refused_unless_left_whole():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with pytest.raises(HapError, match=r"self_attn: nn.MultiheadAttention .*opaque=\['self_attn'\]"):
        trace(model, x)
    groups = couple(model, trace(model, x, opaque=["self_attn"]))
    assert len(groups) == 16  # the neurons of the feed-forward part
    assert torch.backends.mha.get_fastpath_enabled()
    check_groups(model, x, groups)


def test_an_unused_module_is_refused_by_name():
    model = plain()
    model.aux = nn.Linear(3, 3)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    with pytest.raises(HapError, match=r"^aux \(Linear\): not called by the model"):
        trace(model, torch.randn(1, 3, 8, 8))


def test_a_parametrized_weight_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(HapError, match="remove_parametrizations"):
        trace(model, torch.randn(1, 4))


def test_a_batch_that_does_not_lead_is_refused():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x.transpose(0, 1))).mean(0)

    with pytest.raises(HapError, match=r"^a: the batch must be the first axis"):
        trace(SequenceFirst(), torch.randn(2, 5, 4))
    with pytest.raises(HapError, match="the output: the batch must be the first axis"):
        trace(nn.Linear(4, 5), torch.randn(1, 4), call=lambda model, x: model(x).T)


def test_an_unknown_opaque_module_is_refused():
    with pytest.raises(HapError, match="no module nothing in Attention"):
        trace(Attention(), torch.randn(1, 5, 4), opaque=["nothing"])


def test_a_declared_table_says_the_same_as_the_trace():
    model, example = build(SMALL, "plain")
    traced = trace(model, example)
    blocks = [(i, 4 * i + j) for i in range(6) for j in range(4)]
    table = [
        ("0", "3", range(4), range(4)),
        ("3", "6", [i for i, _ in blocks], [j for _, j in blocks]),
        ("6", "8", range(7), range(7)),
    ]
    declared = declare(model, example, table, frozen=["8"])
    assert {tuple(e) for e in declared.edges.T.tolist()} == {tuple(e) for e in traced.edges.T.tolist()}
    assert torch.equal(declared.frozen_rows, traced.frozen_rows)
    assert torch.equal(declared.frozen_slots, traced.frozen_slots)
    assert declared.positions == traced.positions


@pytest.mark.parametrize(
    ("table", "frozen", "says"),
    [
        ([("0", "nine", [0], [0])], [], "nine is not a convolution"),
        ([], ["ten"], "ten is not a convolution"),
        ([("0", "3", [4], [0])], [], "0 -> 3: found row 4 of 4"),
        ([("0", "3", [0], [9])], [], "0 -> 3: found slot 9 of 4"),
        ([("0", "3", [0, 1], [0])], [], "found 2 rows for 1 slots"),
    ],
)
def test_a_wrong_table_is_refused(table, frozen, says):
    model, example = build(SMALL, "plain")
    with pytest.raises(HapError, match=says):
        declare(model, example, table, frozen=frozen)


def test_a_table_that_is_not_true_is_found_by_check_groups():
    model, example = build(SMALL, "residual")
    feeds = trace(model, example)
    same = [
        ("stem", "bn0", range(4), range(4)), ("bn0", "grouped", range(4), range(4)),
        ("grouped", "bn1", range(4), range(4)), ("bn1", "point", range(4), range(4)),
        ("point", "fc", range(6), range(6)),
    ]  # fmt: skip
    true = declare(model, example, [*same, ("bn0", "point", range(4), range(4))], frozen=["fc"])
    assert {tuple(e) for e in true.edges.T.tolist()} == {tuple(e) for e in feeds.edges.T.tolist()}
    swapped = declare(model, example, [*same[:-1], ("point", "fc", range(6), [1, 0, 2, 3, 4, 5])], frozen=["fc"])
    with pytest.raises(HapError, match="surgery and masking differ"):
        check_groups(model, example, couple(model, swapped, "union"))


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "prune"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_computed_weight_is_refused(wrap):
    layer = nn.Linear(4, 4)
    if wrap == "prune":
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    else:
        getattr(nn.utils, wrap)(layer)
    with pytest.raises(HapError, match=r"0: Linear with a parameter weight_[a-z]+ cannot be sliced"):
        trace(nn.Sequential(layer, nn.Linear(4, 2)), torch.randn(1, 4))


def test_a_model_that_mixes_samples_or_gives_nan_is_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x - x.mean(0))

    broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    broken[0].weight.data[0, 0] = torch.nan
    for model in (Centred(), broken):
        with pytest.raises(HapError, match="gives NaN for the example as it is, or lets one sample change another"):
            trace(model, torch.randn(1, 4))


def test_an_embedding_that_shares_its_weight_freezes_what_it_touches():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            x = x + self.inner(x)
            return self.out(x + self.down(F.relu(self.up(x))))

    model, ids = Tied(), torch.randint(9, (2, 5))
    groups = couple(model, trace(model, ids))
    assert len(groups) == 6  # the neurons of `up`
    check_groups(model, ids, groups)


def test_a_forward_of_the_instance_survives():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    mine = model[0].forward
    model[0].forward = lambda x: 2 * mine(x)
    x = torch.randn(3, 4)
    before = model(x)
    trace(model, x)
    assert torch.equal(model(x), before)


def test_an_output_without_numbers_and_a_string_of_names_are_refused():
    with pytest.raises(HapError, match="no floating-point tensor in the output, a int"):
        trace(nn.Linear(4, 2), torch.randn(1, 4), call=lambda model, x: len(model(x)))
    with pytest.raises(HapError, match="a list of module names expected, found the string '0'"):
        trace(nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4), opaque="0")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_without_rows_is_refused():
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    with pytest.raises(HapError, match="0: Linear without rows or inputs"):
        trace(model, torch.randn(1, 4))
