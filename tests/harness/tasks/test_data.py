import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hap import HapError
from hap.harness.processes import ranks
from hap.harness.task import MissingData
from hap.harness.tasks.data import (
    CIFAR10_MD5,
    Images,
    Normalise,
    calibration,
    checkpoint,
    cifar10,
    device,
    epoch,
    load_weights,
    measure,
    roots,
)
from hap.harness.train.loop import generator

PLAIN = Normalise((0.0,), (1.0,), white=1.0)
PIXELS = np.arange(10000 * 3072, dtype=np.uint32).astype(np.uint8).reshape(10000, 3072)
LABELS = [i % 10 for i in range(10000)]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "cifar-10-batches-py"
    made.mkdir()
    return made


def fill(folder: Path, content: bytes) -> None:
    (folder / "data_batch_1").write_bytes(content)
    for name in list(CIFAR10_MD5)[1:]:
        (folder / name).symlink_to("data_batch_1")


def python3(**changes) -> bytes:
    return pickle.dumps({b"data": PIXELS, b"labels": LABELS, **{k.encode(): v for k, v in changes.items()}}, protocol=2)


def python2() -> bytes:
    """What Python 2 and the numpy of 2009 wrote, opcode by opcode."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(M\x10'M\x00\x0ct"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    array += b"T" + struct.pack("<i", PIXELS.size) + PIXELS.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u."


@pytest.mark.parametrize("content", [python2, python3, lambda: python3(batch_label=b"training batch 1 of 5")])
def test_both_spellings_of_the_pickles_are_read(folder, content):
    fill(folder, content())
    train, test, data = cifar10(folder.parent)
    assert train.pixels.shape == (50000, 3, 32, 32)
    assert train.pixels.dtype == torch.uint8
    assert test.pixels.shape == (10000, 3, 32, 32)
    assert torch.equal(test.pixels[7].flatten(), torch.from_numpy(PIXELS[7]))
    assert test.labels.tolist() == LABELS
    assert (data.name, data.official) == ("cifar10", False)
    assert data.note.startswith("unofficial copy: md5 of data_batch_1, ")


def test_the_copy_is_official_when_all_six_sums_are(folder, monkeypatch):
    fill(folder, python3())
    monkeypatch.setattr("hap.harness.tasks.data.md5", lambda content: Fixed())
    monkeypatch.setattr("hap.harness.tasks.data.CIFAR10_MD5", dict.fromkeys(CIFAR10_MD5, "same"))
    data = cifar10(folder.parent)[2]
    assert (data.official, data.note) == (True, "official copy")


class Fixed:
    def hexdigest(self):
        return "same"


def test_the_sums_are_those_of_torchvision():
    from torchvision.datasets import CIFAR10

    assert dict(CIFAR10.train_list + CIFAR10.test_list) == CIFAR10_MD5


class Payload:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda: pickle.dumps({b"data": Payload()}, protocol=2), r"the global __builtin__\.print"),
        (lambda: pickle.dumps({b"data": Payload()}, protocol=4), r"the global builtins\.print"),
        (lambda: python3()[:-1000], "numbers from 0 to 9 .found .*Error"),
        (lambda: python3()[:1000], "numbers from 0 to 9 .found .*Error"),
        (lambda: b"", "numbers from 0 to 9 .found .*EOFError"),
        (lambda: b"<html>404</html>", "numbers from 0 to 9 .found .*Error"),
        (lambda: pickle.dumps([1], protocol=2), "numbers from 0 to 9 .found .*TypeError"),
        (lambda: pickle.dumps({b"labels": LABELS}, protocol=2), "numbers from 0 to 9 .found .*KeyError"),
        (lambda: python3(data=PIXELS[:9]), r"data of type uint8 and shape \(9, 3072\)"),
        (lambda: python3(data=PIXELS.astype(np.int16)), "data of type int16"),
        (lambda: python3(labels=LABELS[:-1]), r"\(9999,\) labels"),
        (lambda: python3(labels=[*LABELS[:-1], 10]), r"not from 0 to 9: \[10\]"),
        (lambda: python3(labels=[*LABELS[:-1], "cat"]), r"not from 0 to 9: \['0', '1'"),
    ],
)
def test_a_damaged_file_is_named_with_what_was_found(folder, content, found, capsys):
    fill(folder, content())
    with pytest.raises(HapError, match=rf"data_batch_1: must be .*{found}") as caught:
        cifar10(folder.parent)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, MissingData)
    assert capsys.readouterr().out == ""


def test_a_folder_with_a_file_missing_is_damaged_not_absent(folder):
    fill(folder, b"")
    (folder / "data_batch_4").unlink()
    with pytest.raises(HapError, match=r"data_batch_4: must be readable .found No such file") as caught:
        cifar10(folder.parent)
    assert not isinstance(caught.value, MissingData)


def test_missing_data_says_what_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DATA", str(tmp_path / "a"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingData) as caught:
        cifar10()
    for part in ("cifar-10-batches-py", tmp_path / "a", tmp_path / "data", tmp_path / "home" / "data", "download=True"):
        assert str(part) in str(caught.value)
    with pytest.raises(MissingData, match=r"checkpoints/cifar10/resnet20\.th in .*akamaster"):
        checkpoint("resnet20.th")


def test_the_first_root_that_has_the_data_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DATA", str(tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    assert roots()[:2] == [tmp_path / "a", Path("data")]
    assert roots("x") == [Path("x")]
    nested = tmp_path / "data" / "cifar10" / "cifar-10-batches-py"
    nested.mkdir(parents=True)
    fill(nested, b"")
    with pytest.raises(HapError, match=str(nested)):
        cifar10()
    monkeypatch.delenv("HAP_DATA")
    assert roots()[0] == Path("data")


def test_a_checkpoint_loses_its_prefix_and_keeps_its_sum(tmp_path):
    file = tmp_path / "checkpoints" / "cifar10" / "net.th"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": {"module.weight": torch.ones(2, 3), "module.bias": torch.zeros(2)}}, file)
    state, found, sha = checkpoint("net.th", tmp_path)
    assert found == file
    assert len(sha) == 64
    model = load_weights(nn.Linear(3, 2), state, file)
    assert model.weight.sum() == 6
    with pytest.raises(HapError, match=r"net\.th: must be the weights of this network .found .*size mismatch"):
        load_weights(nn.Linear(4, 2), state, file)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"state_dict": {"a": Payload()}}, protocol=2)])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    file = tmp_path / "checkpoints" / "cifar10" / "net.th"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(HapError, match=r"net\.th: must be a checkpoint with a state_dict") as caught:
        checkpoint("net.th", tmp_path)
    assert "\n" not in str(caught.value)


def numbered(n=50, size=5):
    pixels = torch.arange(n * size * size).reshape(n, 1, size, size).remainder(251).to(torch.uint8)
    return Images(pixels, torch.arange(n))


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own():
    images, rng = numbered(), generator(0)
    first, second = (
        torch.cat([labels for _, labels in epoch(images, 16, rng, normalise=PLAIN, pad=0, flip=False)])
        for _ in range(2)
    )
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert first.tolist() != second.tolist()
    for pixels, labels in epoch(images, 16, rng, normalise=PLAIN, pad=0, flip=False):
        assert torch.equal(pixels, images.pixels[labels].float())
    few = [labels for _, labels in epoch(images, 16, rng, normalise=PLAIN, pad=0, flip=False, limit=20)]
    assert [len(labels) for labels in few] == [16, 4]


def test_a_shifted_image_is_a_window_of_the_padded_one_and_all_windows_come_up():
    """The oracle pads and slices each image by itself; it cannot see whether the draw is uniform."""
    images, seen = numbered(400), set()
    for pixels, labels in epoch(images, 128, generator(0), normalise=PLAIN, pad=1, flip=True):
        for shown, label in zip(pixels, labels, strict=True):
            padded = nn.functional.pad(images.pixels[label].float(), (1, 1, 1, 1))
            windows = {
                (top, left, mirrored): window.flip(-1) if mirrored else window
                for top in range(3)
                for left in range(3)
                for mirrored in (False, True)
                for window in [padded[:, top : top + 5, left : left + 5]]
            }
            matches = [place for place, window in windows.items() if torch.equal(window, shown)]
            assert matches
            seen.update(matches)
    assert len(seen) == 18


def test_normalising_is_that_of_torchvision():
    from torchvision.transforms import v2

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.randint(256, (4, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    expected = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(pixels))
    torch.testing.assert_close(Normalise(mean, std)(pixels), expected)


def test_measuring_is_exact_whatever_the_batches():
    images = Images(torch.randint(9, (30, 1, 2, 2), generator=generator(0), dtype=torch.uint8), torch.arange(30) % 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).train()
    logits = model(images.pixels.float()).detach()
    for batch_size in (7, 1000):
        found = measure(model, lambda model, inputs: model(inputs), images, PLAIN, batch_size)
        assert found["accuracy"] == pytest.approx(100 * float((logits.argmax(1) == images.labels).double().mean()))
        assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, images.labels)), rel=1e-5)
    assert not model.training


def test_calibration_draws_without_repeats_and_refuses_nothing():
    batches = calibration(numbered(), PLAIN, 20, 8, generator(0))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert len(torch.cat([labels for _, labels in batches]).unique()) == 20
    with pytest.raises(HapError, match="images must be at least 1, found 0"):
        calibration(numbered(), PLAIN, 0, 8, generator(0))


def test_the_device_is_what_there_is_unless_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("HAP_DEVICE", raising=False)
    assert device().type == "cpu"
    monkeypatch.setenv("HAP_DEVICE", "meta")
    assert device().type == "meta"


@pytest.mark.parametrize(
    ("given", "ranks_there", "expected"),
    [("cuda:0", 2, "cuda:1"), ("cuda", 2, "cuda:1"), ("cuda:3", 1, "cuda:3"), ("cpu", 2, "cpu")],
)
def test_each_rank_has_the_gpu_of_its_place_whatever_number_is_set_for_all(monkeypatch, given, ranks_there, expected):
    """The machine is a fake one: what is asked for is looked at, and nothing is put on a GPU."""
    assert ranks.placed(given) == given  # no ranks
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": ranks_there}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HAP_DEVICE", given)
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or torch.tensor(0))
    device()
    assert asked == [expected]
