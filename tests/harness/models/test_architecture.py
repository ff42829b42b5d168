"""A pruned model as a record and back: the same outputs to the last bit, and nothing a stranger wrote is trusted."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import HEADED, REAL, SMALL, build, headed
from fakes import edited
from torch import nn

from hap import Budget, HapError, Plan, apply, couple, implants, trace
from hap.cost import params
from hap.harness.models import load_model, save_model
from hap.harness.models.architecture import describe, fill, rebuild, tensors
from hap.harness.tasks import nets
from hap.implants import centre_tap, least_squares, zero
from hap.plan import plan
from hap.structure.bypass import Borrower, Lender
from hap.structure.heads import heads
from hap.structure.layers import forward
from hap.surgery.patch import Patch
from hap.testing import random_plan

IMPLANTS = {"zero": zero, "centre_tap": centre_tap, "least_squares": least_squares}


def pruned(name, how="union", implant=zero, seed=0, table=SMALL):
    model, example = build(table, name)
    groups = couple(model, trace(model, example), how)
    chosen = random_plan(groups, torch.Generator().manual_seed(seed))
    return apply(model, groups, chosen, implant, batches=[example]), example


def fresh(name, table=SMALL):
    """What a person has: the class, with other weights."""
    torch.manual_seed(99)
    return table[name][0]()


def numbers(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def same(one, other):
    """Whether two models hold the same to the last bit, in the same layout and the same modes."""
    held = [dict(model.state_dict(keep_vars=True)) for model in (one, other)]
    assert list(held[0]) == list(held[1])
    for a, b in zip(*(each.values() for each in held), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride(), a.requires_grad, type(a)) == (b.dtype, b.stride(), b.requires_grad, type(b))
    modes = [{name: m.training for name, m in model.named_modules(remove_duplicate=False)} for model in (one, other)]
    assert modes[0] == modes[1]
    return True


@pytest.mark.parametrize("how", ["tied", "union"])
@pytest.mark.parametrize("name", SMALL)
def test_a_pruned_model_comes_back_to_the_last_bit(name, how, tmp_path):
    """All of the table, each with another implant; the outputs are compared too, for they depend on layouts."""
    implant = list(IMPLANTS.values())[list(SMALL).index(name) % 3]
    small, example = pruned(name, how, implant)
    save_model(small, fresh(name), tmp_path)
    again = load_model(tmp_path, partial(fresh, name))
    assert same(small, again)
    with torch.no_grad():
        assert torch.equal(numbers(forward(again, example)), numbers(forward(small, example)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("implant", IMPLANTS)
@pytest.mark.parametrize("name", ["preresnet", "option-a", "option-b", "branches"])
def test_each_implant_comes_back(name, implant, tmp_path):
    small, example = pruned(name, "union", IMPLANTS[implant], seed=3)
    assert any(isinstance(module, Patch) and len(module.parts) == 2 for module in small.modules())
    small = small.to(memory_format=torch.channels_last) if example.dim() == 4 else small
    again = load_model(save_model(small, fresh(name), tmp_path), partial(fresh, name))
    assert same(small, again)
    with torch.no_grad():
        assert torch.equal(again(example), small(example))


def test_a_network_of_a_task_comes_back_from_the_class_alone(tmp_path):
    """VGG16 with BatchNorm, nine tenths of its parameters pruned at random."""
    model, example = build(REAL, "vgg16_bn")
    groups = couple(model, trace(model, example), "tied")
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(0))
    small = apply(model, groups, plan(groups, scores, Budget(params=0.9)))
    again = load_model(save_model(small, model, tmp_path), partial(nets.vgg16, batch_norm=True))
    assert same(small, again)
    assert params(again) < 0.1 * params(model)


def test_a_model_with_a_dictionary_of_outputs_comes_back(tmp_path):
    small, example = pruned("bert", "union", table=REAL)
    again = load_model(save_model(small, fresh("bert", REAL), tmp_path), partial(fresh, "bert", REAL))
    assert same(small, again)
    with torch.no_grad():
        assert torch.equal(forward(again, example).logits, forward(small, example).logits)


def implanted(kind, rank=2):
    """A transformer with some heads gone and some stood in for, and an example."""
    if kind == "timm":
        pytest.importorskip("timm")
    model, example = headed(kind, "sdpa")
    groups = heads(couple(model, trace(model, example)))
    scores = torch.rand(len(groups), generator=torch.Generator().manual_seed(1))
    chosen = plan(groups, scores, Budget(groups=0.6, implant=0.5, rank=rank, layer_limit=1.0))
    return apply(model, groups, chosen, implants.low_rank, batches=[example]), example


def outputs(model, example):
    with torch.no_grad():
        return numbers(forward(model, example))


@pytest.mark.parametrize("kind", HEADED)
def test_a_transformer_without_heads_and_with_their_implants_comes_back(kind, tmp_path):
    small, example = implanted(kind)
    assert sum(isinstance(module, Borrower) for module in small.modules()) > 0
    again = load_model(save_model(small, headed(kind, "sdpa")[0], tmp_path), lambda: headed(kind, "sdpa")[0])
    assert same(small, again)
    assert torch.equal(outputs(again, example), outputs(small, example))
    ends = [{m.relay for m in again.modules() if isinstance(m, end)} for end in (Lender, Borrower)]
    assert ends[0] == ends[1]


def test_what_a_stranger_says_of_implants_and_counts_of_heads_is_checked(tmp_path):
    small, _ = implanted("bert")
    record = describe(small, headed("bert", "sdpa")[0])
    modules = record["modules"]
    reader = next(name for name, entry in modules.items() if entry["kind"] == "Borrower")
    source = next(name for name, entry in modules.items() if entry["kind"] == "Lender")
    counter = next(iter(record["counters"]))

    def says(text, **changes):
        with pytest.raises(HapError, match=text) as caught:
            rebuild(headed("bert", "sdpa")[0], {**record, **changes})
        assert "\n" not in str(caught.value)

    alone = {name: entry for name, entry in modules.items() if name != source}
    says(r"modules: must have one Lender for each Borrower \(found \[", modules=alone)
    twice = {**modules, reader: {**modules[reader], "kind": "Lender"}}
    twice[reader].pop("implant")
    says("modules: must have one Lender for each Borrower", modules=twice)
    wide = json.loads(json.dumps(modules))
    wide[reader]["implant"]["parts"][0]["in_features"] += 1
    says(r"implant: must read 16 and write 16 numbers \(found \[\(", modules=wide)
    says("counters.nowhere.num_heads: must be at most -1", counters={"nowhere.num_heads": 1})
    says(r"counters\..*: must be at most \d+, as in the original", counters={counter: 10**6})
    says("counters", counters={counter: -1})


def test_an_implant_of_unknown_modules_is_refused_by_its_place(tmp_path):
    small, _ = implanted("bert")
    name, borrower = next((n, m) for n, m in small.named_modules() if isinstance(m, Borrower))
    borrower.implant = nn.Sequential(borrower.implant[0], nn.GELU(), borrower.implant[1])
    with pytest.raises(HapError, match=rf"{name}\.implant\.1: must be as in the original or one of"):
        save_model(small, headed("bert", "sdpa")[0], tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "vit"])
def test_a_pruned_transformer_goes_through_save_pretrained(kind, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from hap.harness.models.huggingface import Pruned
    from hap.harness.tasks.encoder import quiet

    small, example = implanted(kind)
    with quiet():
        Pruned.of(small, headed(kind, "sdpa")[0]).save_pretrained(tmp_path)
        again = Pruned.from_pretrained(tmp_path).eval()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        assert torch.equal(outputs(again, example), outputs(small, example))
        assert again.config.num_labels == 3
        assert again.model.config._attn_implementation == "sdpa"
        if kind != "vit":
            found = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
            assert torch.equal(outputs(found, example), outputs(small, example))


def test_a_config_of_another_class_than_transformers_is_refused():
    from hap.harness.models.huggingface import Pruned, PrunedConfig

    with pytest.raises(HapError, match="config: original_class must be a model of transformers, found 'eval'"):
        Pruned(PrunedConfig({}, "eval", {}))


@pytest.mark.parametrize("full", ["model.safetensors", "model.json"])
def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, monkeypatch, full):
    """The disk is full at the first or the second file."""
    small, _ = pruned("mlp")
    before = load_model(save_model(small, fresh("mlp"), tmp_path), partial(fresh, "mlp"))
    opened = Path.open

    def no_space(self, *args, **kwargs):
        if full in self.name:
            raise OSError(28, "No space left on device")
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", no_space)
    other, _ = pruned("mlp", seed=3)
    with pytest.raises(HapError, match=rf"{full}: cannot be written \(No space left on device\)"):
        save_model(other, fresh("mlp"), tmp_path)
    monkeypatch.setattr(Path, "open", opened)
    assert same(before, load_model(tmp_path, partial(fresh, "mlp")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_model_that_was_pruned_twice_comes_back(tmp_path):
    model, example = build(SMALL, "preresnet")
    for seed in range(2):
        groups = couple(model, trace(model, example), "tied")
        model = apply(model, groups, random_plan(groups, torch.Generator().manual_seed(seed), 0.3, 0.0))
    again = load_model(save_model(model, fresh("preresnet"), tmp_path), partial(fresh, "preresnet"))
    assert same(model, again)


def test_a_model_that_was_not_pruned_comes_back_too(tmp_path):
    model, _ = build(SMALL, "gated")
    assert describe(model, fresh("gated"))["modules"] == {}
    assert same(model, load_model(save_model(model, fresh("gated"), tmp_path), partial(fresh, "gated")))


def test_layout_type_mode_and_frozen_parameters_come_back(tmp_path):
    small, _ = pruned("option-b", seed=3)
    small = small.half().to(memory_format=torch.channels_last)
    small.bn1.train()
    small.linear.weight.requires_grad_(False)
    again = load_model(save_model(small, fresh("option-b"), tmp_path), partial(fresh, "option-b"))
    assert same(small, again)
    assert again.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (again.conv1.weight.dtype, again.bn1.training, again.training) == (torch.float16, True, False)


def test_a_function_that_builds_channels_last_does_not_decide_the_layout(tmp_path):
    dense, _ = build(SMALL, "option-b")
    save_model(dense, fresh("option-b"), tmp_path)
    assert same(dense, load_model(tmp_path, lambda: fresh("option-b").to(memory_format=torch.channels_last).train()))


def test_a_parameter_with_gaps_comes_back_without(tmp_path):
    dense, example = build(SMALL, "option-b")
    dense.linear.weight = nn.Parameter(torch.randn(10, 32)[:, ::2])
    again = load_model(save_model(dense, fresh("option-b"), tmp_path), partial(fresh, "option-b"))
    assert torch.equal(again.linear.weight, dense.linear.weight)
    assert again.linear.weight.is_contiguous()
    assert torch.allclose(again(example), dense(example))


def test_a_block_that_was_taken_out_by_hand_stays_out(tmp_path):
    dense, example = build(SMALL, "option-b")
    dense.layer1 = nn.Identity()
    again = load_model(save_model(dense, fresh("option-b"), tmp_path), partial(fresh, "option-b"))
    assert same(dense, again)
    assert torch.equal(again(example), dense(example))


class Shared(nn.Module):
    """A module of two names, and two modules that share a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.d = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.c, self.fc, self.out = self.b, nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.fc.weight

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.out(self.fc(self.d(x).mean((2, 3))))


def test_shared_modules_and_parameters_are_written_once_and_shared_again(tmp_path):
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 3, 6, 6)
    groups = couple(model, trace(model, x), "union")
    small = apply(model, groups, random_plan(groups, torch.Generator().manual_seed(0), 0.5, 0.2), zero)
    assert {"b", "c"} & describe(small, Shared())["modules"].keys() == {"b"}
    again = load_model(save_model(small, Shared(), tmp_path), Shared)
    assert same(small, again)
    assert again.b is again.c
    assert again.out.weight is again.fc.weight
    assert "out.weight" not in tensors(again)
    assert not any(name.startswith("c.") for name in tensors(again))
    assert torch.equal(again(x), small(x))


def test_parameters_that_were_tied_after_pruning_stay_tied(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    again = load_model(
        save_model(model, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tmp_path),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
    )
    assert again[1].weight is again[0].weight
    assert same(model, again)


class Scaled(nn.Conv2d):
    """A convolution of a class of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_a_layer_stays_of_its_class(tmp_path):
    def net():
        first, second = Scaled(3, 6, 3, padding=1, padding_mode="circular"), Scaled(6, 4, 3)
        return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(64, 2))

    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(2, 3, 6, 6)
    groups = couple(model, trace(model, x), "union")
    small = apply(model, groups, Plan({"0": "#oo###", "2": "#-##", "4": "##"}), centre_tap)
    assert [part.padding for part in small[0].parts] == [(1, 1), (0, 0)]
    again = load_model(save_model(small, net(), tmp_path), net)
    assert same(small, again)
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
    for one, other in zip(small[0].parts, again[0].parts, strict=True):
        assert {k: v for k, v in vars(one).items() if k[:1] != "_"} == {
            k: v for k, v in vars(other).items() if k[:1] != "_"
        }
        assert [*one._reversed_padding_repeated_twice] == [*other._reversed_padding_repeated_twice]
    assert torch.equal(again(x), small(x))


def low_rank(module, rows, inputs):
    """A stranger's implant: through half as many channels."""
    return nn.Sequential(
        nn.Conv2d(len(inputs.slots), 1, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(1, len(rows), 1, stride=module.stride, bias=module.bias is not None),
    )


def test_the_implant_of_a_stranger_comes_back_where_its_classes_are_known(tmp_path):
    model, x = build(SMALL, "plain")
    groups = couple(model, trace(model, x), "union")
    small = apply(model, groups, Plan({"0": "#o-#", "3": "######", "6": "#" * 7, "8": "#" * 5}), low_rank)
    assert isinstance(small[0].parts[1], nn.Sequential)
    again = load_model(save_model(small, fresh("plain"), tmp_path), partial(fresh, "plain"))
    assert same(small, again)
    assert torch.equal(again(x), small(x))


def test_what_is_more_than_surgery_is_refused_when_it_is_saved(tmp_path):
    def says(model, original, text):
        with pytest.raises(HapError, match=text) as caught:
            save_model(model, original, tmp_path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors'}: the model cannot be saved: ")

    small, _ = pruned("plain")
    strange = copy.deepcopy(small)
    strange[1] = nn.GELU()
    says(strange, fresh("plain"), r"1: must be as in the original or one of Patch, Lender, .* \(found 'torch\.nn")
    says(small, fresh("mlp"), "must be as in the original|must be in the pruned model|must follow from")
    wide = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2))
    says(wide, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "modules: must have at most the 26 parameters")
    more = copy.deepcopy(small)
    more.register_buffer("extra", torch.zeros(3))
    says(more, fresh("plain"), r"extra: must follow from the modules, which make its shape None \(found \(3,\)\)")
    says(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "1: must be in the pruned model")
    nested, _ = pruned("option-b", seed=3)
    nested.layer2[0].conv2.parts[0] = copy.deepcopy(nested.layer2[0].conv2)
    says(nested, fresh("option-b"), r"layer2\.0\.conv2\.parts\.0: must not be a Patch within another module")
    norm = nn.Sequential(nn.LayerNorm(3))
    says(norm, nn.Sequential(nn.LayerNorm(4)), r"0.bias: must follow .* shape \(4,\) \(found \(3,\)\)")

    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {}

        def set_extra_state(self, state):
            pass

    says(Stateful(2, 2), Stateful(2, 2), "_extra_state: must be a tensor to be saved")


def test_a_record_is_json_that_a_person_can_read():
    small, _ = pruned("option-b")
    record = describe(small, fresh("option-b"))
    assert json.loads(json.dumps(record)) == record
    patches = {name: entry for name, entry in record["modules"].items() if entry["kind"] == "Patch"}
    name, entry = next(iter(patches.items()))
    module = small.get_submodule(name)
    assert entry["width"] == module.width
    assert entry["parts"][0]["kind"] == type(module.parts[0]).__name__
    assert record["types"]["layer1.0.conv1"] == "Conv2d"


CONV, PATCH = "layer2.0.shortcut.0", "layer2.0.conv2"
HOSTILE = {
    "negative": ([CONV, "in_channels"], -1, "in_channels: Input should be greater than or equal to 1"),
    "huge": ([CONV, "in_channels"], 2**40, "in_channels: Input should be less than"),
    "as large as can be": ([CONV, "out_channels"], 2**31 - 1, "modules: must have at most the .* parameters"),
    "no class of ours": ([CONV, "kind"], "os.system", r"modules\.layer2\.0\.shortcut\.0"),
    "a class of torch": ([CONV, "kind"], "Transformer", r"modules\.layer2\.0\.shortcut\.0"),
    "a subclass by name": (
        [CONV, "like"],
        "os.system",
        r"like: must be torch\.nn\.modules\.conv\.Conv2d, the class of",
    ),
    "a string for a number": ([CONV, "out_channels"], "4", "out_channels: Input should be a valid integer"),
    "sizes of another dimension": ([CONV, "kernel_size"], [3], "must have 2 numbers for each size, as a Conv2d has"),
    "groups that do not divide": ([CONV, "groups"], 3, "must have the sizes of a Conv2d"),
    "padding that cannot be": ([CONV, "padding"], "most", "padding"),
    "an unknown field": ([CONV, "colour"], 1, "colour: unknown field"),
    "a Patch without parts": ([PATCH, "parts"], [], "parts"),
    "a Patch in a Patch": ([PATCH, "parts"], [{"kind": "Patch"}], "parts"),
    "more places than rows": ([PATCH, "width"], 1, r"modules\.layer2\.0\.conv2\.places: must be at most 1"),
    "more rows than the original": ([PATCH, "width"], 9999, r"width: must be at most 8"),
    "more inputs than the original": ([PATCH, "given"], 9999, r"given: must be at most 8"),
    "more taken than given": ([PATCH, "take"], 9999, r"take: must be at most"),
    "inputs that parts do not read": ([PATCH, "take"], 1, r"parts: must write .* rows and read 1 inputs"),
    "places that parts do not write": ([PATCH, "places"], 1, r"parts: must write 1 rows and read"),
    "another axis": ([PATCH, "axis"], -1, "along the axis of its channels"),
    "no axis": ([PATCH, "axis"], 0, "axis: Input should be 1 or -1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_module_is_refused_by_rule(name):
    steps, value, says = HOSTILE[name]
    small, _ = pruned("option-b", "union", zero, 3)
    record = describe(small, fresh("option-b"))
    assert record["modules"][CONV]["kind"] == "Conv2d"
    assert record["modules"][PATCH]["kind"] == "Patch"
    with pytest.raises(HapError, match=says) as caught:
        rebuild(fresh("option-b"), edited(record, "modules", *steps, to=value))
    assert "\n" not in str(caught.value)


FLAGS = {
    "a module that is not there": ("modules", {"nowhere": {"kind": "ReLU"}}, "modules: must name what is in the model"),
    "the model itself": ("modules", {"": {"kind": "ReLU"}}, "modules: must name what is in the model"),
    "a path": ("modules", {"../../etc": {"kind": "ReLU"}}, "modules: must name what is in the model"),
    "nothing but names": ("modules", [], "modules: Input should be"),
    "types of another class": ("types", {"": "VGG"}, "must be VGG, as when it was saved|must be absent"),
    "shared with nothing": ("shared", {"linear.bias": "nowhere"}, "shared: must name what is in the model"),
    "shared with another shape": ("shared", {"linear.bias": "linear.weight"}, "must be like linear.weight"),
    "strides of nothing": ("strides", {"nowhere": [1]}, "strides: must name what is in the model"),
    "strides that overlap": ("strides", {"linear.bias": [0]}, "must lay out .* without gap or overlap"),
    "strides with gaps": ("strides", {"linear.bias": [2**20]}, "must lay out .* without gap or overlap"),
    "too many strides": ("strides", {"linear.bias": [1, 1]}, "must lay out .* without gap or overlap"),
    "negative strides": ("strides", {"linear.bias": [-1]}, "strides.linear.bias"),
    "frozen what is not there": ("frozen", ["nowhere"], "frozen: must name what is in the model"),
    "switched what is not there": ("switched", ["nowhere"], "switched: must name what is in the model"),
    "a mode that is none": ("training", "yes", "training: Input should be a valid boolean"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_hostile_flag_is_refused_by_rule(name):
    field, value, says = FLAGS[name]
    small, _ = pruned("option-b")
    record = describe(small, fresh("option-b"))
    with pytest.raises(HapError, match=says) as caught:
        rebuild(fresh("option-b"), edited(record, field, to=value))
    assert "\n" not in str(caught.value)
    with pytest.raises(HapError, match=f"{field}: is required"):
        rebuild(fresh("option-b"), {key: part for key, part in record.items() if key != field})


def test_a_patch_in_the_place_of_what_is_no_layer_is_refused():
    small, _ = pruned("option-b", "union", zero, 3)
    record = describe(small, fresh("option-b"))
    assert record["types"]["layer1.0.shortcut"] == "Identity"
    with pytest.raises(HapError, match="must stand for a layer"):
        rebuild(
            fresh("option-b"), edited(record, "modules", "layer1.0.shortcut", to=record["modules"][PATCH] | {"axis": 1})
        )


def test_parts_within_parts_without_end_are_refused():
    deep = {"kind": "Sequential", "parts": []}
    for _ in range(300):
        deep = {"kind": "Sequential", "parts": [deep]}
    record = describe(build(SMALL, "plain")[0], fresh("plain"))
    with pytest.raises(HapError, match=r"recursion|depth"):
        rebuild(fresh("plain"), edited(record, "modules", to={"1": deep}))


def test_no_memory_is_taken_for_what_is_refused():
    """Sizes of 2**62 weights would not fit anywhere."""
    small, _ = pruned("option-b", "union", zero, 3)
    record = describe(small, fresh("option-b"))
    huge = record["modules"][CONV] | {"in_channels": 2**30, "out_channels": 2**30, "groups": 1}
    with pytest.raises(HapError, match="must have"):
        rebuild(fresh("option-b"), edited(record, "modules", CONV, to=huge))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("linear.bias", None, "linear.bias: must be there"),
        ("colour", torch.zeros(1), "colour: must not be there"),
        ("linear.bias", torch.zeros(11), r"linear.bias: must be of shape \(10,\) \(found \(11,\)\)"),
        ("linear.bias", torch.zeros(10, dtype=torch.long), r"linear.bias: must be torch.float32 \(found torch.int64\)"),
        (f"{PATCH}.places", "twice", r"layer2.0.conv2.places: must be different numbers from 0 to"),
        (f"{PATCH}.places", "outside", r"layer2.0.conv2.places: must be different numbers from 0 to"),
        (f"{PATCH}.places", "below", r"layer2.0.conv2.places: must be different numbers from 0 to"),
    ],
)
def test_values_that_do_not_fit_are_refused(name, value, says):
    small, _ = pruned("option-b", "union", zero, 3)
    values = dict(tensors(small))
    changes = {"twice": lambda t: torch.zeros_like(t), "outside": lambda t: t + 99, "below": lambda t: t - 99}
    if isinstance(value, str):
        value = changes[value](values[name])
    values = {k: v for k, v in values.items() if k != name} | ({} if value is None else {name: value})
    with pytest.raises(HapError, match=says):
        fill(rebuild(fresh("option-b"), describe(small, fresh("option-b"))), values)
