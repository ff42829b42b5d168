import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hap import HapError
from hap.cost import macs, params
from hap.harness.tasks import cache, cifar10_resnet20, cifar10_resnet32, cifar10_resnet56, digits_bert, digits_preresnet
from hap.harness.tasks.nets import preresnet, resnet, vgg16
from hap.harness.train import loop as training
from hap.harness.train.loop import generator

NETS = {  # [HAP-code], counted: parameters, millions of MACs at 32x32
    "resnet20": (lambda: resnet(20), 269_722, 40.55),
    "resnet56B": (lambda: resnet(56, shortcut="B"), 855_770, 125.75),
    "wideresnet32": (lambda: resnet(32, (64, 128, 256), "B"), 7_427_914, 1100.68),
    "preresnet29": (lambda: preresnet(), 2_235_850, 360.39),
    "vgg16": (lambda: vgg16(), 14_719_818, 313.20),
    "vgg16bn": (lambda: vgg16(batch_norm=True), 14_728_266, 313.20),
}


@pytest.mark.parametrize("name", NETS)
def test_the_counts_are_those_of_the_published_code(name):
    build, numbers, millions = NETS[name]
    model = build().eval()
    assert params(model) == numbers
    assert macs(model, torch.zeros(1, 3, 32, 32)) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("build", [lambda: resnet(8), lambda: preresnet(11, (4, 8, 16))], ids=["resnet", "preresnet"])
def test_each_leaf_is_called_once_and_small_images_are_welcome(build):
    model, calls = build(), []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.zeros(2, 3, 8, 8)).sum().backward()
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == sum(not list(module.children()) for module in model.modules())


def test_the_zero_padded_shortcut_is_that_of_the_checkpoints():
    block = resnet(8, (4, 8, 16)).layer2[0]
    x = torch.randn(2, 4, 6, 6)
    expected = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(block.shortcut(x), expected)
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= resnet(
        20
    ).state_dict().keys()


def test_weights_come_from_the_generator_alone():
    for build in (lambda rng: resnet(8, rng=rng), lambda rng: preresnet(11, (4, 8, 16), rng=rng)):
        torch.manual_seed(0)
        first = build(generator(3)).state_dict()
        torch.manual_seed(1)
        assert all(torch.equal(first[name], value) for name, value in build(generator(3)).state_dict().items())
        assert not all(torch.equal(first[name], value) for name, value in build(generator(4)).state_dict().items())


def test_vgg16_starts_as_published():
    """Kaiming by fan-in, biases of zero: without BatchNorm, logits by fan-out would be 60 times as small."""
    model = vgg16(rng=generator(0))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
            assert not module.bias.any()


def test_the_preresnet_starts_as_published():
    model = preresnet(rng=generator(0))
    weight = model.layer3[1].conv2.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert all((module.weight == 0.5).all() for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("build", [lambda: resnet(21), lambda: resnet(2), lambda: preresnet(20 + 1)])
def test_an_impossible_depth_is_refused(build):
    with pytest.raises(HapError, match=r"the depth must be [69]n\+2 with n at least 1, found"):
        build()


def test_an_unknown_shortcut_is_refused():
    with pytest.raises(HapError, match=r"shortcut must be 'A' .* found 'C'"):
        resnet(20, shortcut="C")


@pytest.fixture
def digits(trained, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(trained))
    return digits_preresnet.task


def test_the_dense_digits_are_read_well(digits):
    task = digits(0)
    assert task.evaluate(task.model, "test")["accuracy"] >= 98
    assert not task.model.training
    assert task.data.official
    assert digits_preresnet.ready(images=64) == task.data


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
@pytest.mark.parametrize("which", [digits_preresnet, digits_bert])
def test_the_digits_go_to_the_device(which, monkeypatch):
    """The device is one that keeps shapes alone, for there may be no other; nothing is trained on it."""
    pytest.importorskip("transformers")
    seed = (0,) if which is digits_bert else (generator(0, "init"),)
    weights = which._network(*seed).state_dict()
    monkeypatch.setattr(which, "cached", lambda *_: cache.Trained(weights, []))
    monkeypatch.setenv("HAP_DEVICE", "meta")
    task = which.task(0)
    batch = next(task.train(8, generator(0)))
    leaves = tree_leaves([task.batches, task.example, batch, list(task.model.parameters())])
    assert {leaf.device.type for leaf in leaves} == {"meta"}


def test_digits_are_split_without_overlap_and_alike_for_every_seed(digits):
    splits = digits_preresnet.digits()[0]
    assert [len(images.labels) for images in splits.values()] == [1077, 270, 450]
    assert torch.cat([images.pixels for images in splits.values()]).flatten(1).unique(dim=0).shape[0] == 1797
    calibration = digits(0).batches
    shown = torch.cat([inputs for inputs, _ in calibration])
    among = (shown[:, None] == digits_preresnet.NORMALISE(splits["train"].pixels)).flatten(2).all(2).any(1)
    assert among.all()
    assert [len(labels) for _, labels in calibration] == [128] * 4


def test_trained_digits_are_read_back_and_damage_is_noticed(digits, trained, monkeypatch):
    for file in trained.iterdir():
        file.unlink()
    weights = digits(0).model.state_dict()
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained although the weights are there"))
    again = digits(0).model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.items())
    assert all(weights[name].stride() == value.stride() for name, value in again.items())  # or sums would round anew
    file = next(trained.glob("digits_preresnet-seed0-*.safetensors"))
    content = file.read_bytes()
    for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damage)
        with pytest.raises(pytest.fail.Exception, match="trained although"):
            digits(0)
    file.write_bytes(content)
    digits(0)


def test_what_decides_the_weights_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))
    made = []

    def train(folder):
        made.append(len(made))
        return cache.Trained({"weight": torch.full((2, 2), float(len(made))).T}, [f"note {len(made)}"])

    for seed, decides in [(0, ["a"]), (0, ["a"]), (1, ["a"]), (0, ["b"]), (0, ["a"])]:
        found = cache.cached("net", seed, decides, [training], train)
    assert made == [0, 1, 2]
    assert found.weights["weight"].tolist() == [[1, 1], [1, 1]]
    assert found.notes == ["note 1"]
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def cifar(hapdata, monkeypatch):
    monkeypatch.setenv("HAP_DATA", str(hapdata))
    return cifar10_resnet20.task


def test_the_pretrained_resnet20_has_its_published_accuracy(cifar):
    task = cifar(0)
    assert task.evaluate(task.model, "test")["accuracy"] == pytest.approx(91.73, abs=0.05)
    assert "resnet20-12fca82f.th sha256 12fca82f" in task.data.note
    assert task.data.official == ("unofficial" not in task.data.note)


@pytest.mark.slow
def test_the_pretrained_resnet32_has_its_published_accuracy(cifar):
    task = cifar10_resnet32.task(0)
    assert task.name == "cifar10_resnet32"
    assert task.evaluate(task.model, "test")["accuracy"] == pytest.approx(92.63, abs=0.05)
    assert "resnet32-d509ac18.th sha256 d509ac18" in task.data.note


@pytest.mark.slow
def test_the_pretrained_resnet56_has_its_published_accuracy(cifar):
    task = cifar10_resnet56.task(0)
    assert task.name == "cifar10_resnet56"
    assert task.evaluate(task.model, "test")["accuracy"] == pytest.approx(93.39, abs=0.05)
    assert "resnet56-4bfd9763.th sha256 4bfd9763" in task.data.note


def test_calibration_images_are_drawn_by_the_seed_or_are_the_last(cifar):
    first, second, third = (cifar(seed, images=200).batches for seed in (0, 0, 1))
    assert [len(labels) for _, labels in first] == [128, 72]
    assert torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], third[0][0])
    (last,) = cifar(0, last=336).batches
    assert last[0].shape == (336, 3, 32, 32)
    with pytest.raises(HapError, match="last must be at least 1, found 0"):
        cifar(0, last=0)


def test_an_epoch_can_be_limited_and_is_drawn_anew(cifar):
    task, rng = cifar(0, train_images=300), generator(0)
    assert task.train_size == 300
    first, second = ([labels for _, labels in task.train(128, rng)] for _ in range(2))
    assert [len(labels) for labels in first] == [128, 128, 44]
    assert not torch.equal(first[0], second[0])
    assert cifar(0).train_size == 45_000
