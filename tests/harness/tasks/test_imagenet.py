"""ImageNet in small: which copy, which splits, which weights; the workloads on made-up pictures and the real sample."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from torchvision.models import squeezenet1_0

from hap import HapError
from hap.harness.cli import doctor
from hap.harness.spec.functions import Ref, resolve
from hap.harness.task import MissingData
from hap.harness.tasks import imagenet, imagenet_resnet50, imagenet_squeezenet
from hap.harness.tasks.imagefolder import listed
from hap.harness.tasks.imagenet import HELD_OUT, SMOKE, few, split, weights, wnids
from hap.harness.train.loop import generator

RESNET50, SQUEEZENET = "hap.harness.tasks.imagenet_resnet50:task", "hap.harness.tasks.imagenet_squeezenet:task"
NAME = "net.pt"


@pytest.fixture
def home(imagenets, tmp_path, monkeypatch):
    """The made-up ImageNet, no weights, and a hub that is away."""
    monkeypatch.setenv("HAP_IMAGENET", str(imagenets / "imagenet"))
    monkeypatch.setenv("HAP_DATA", str(imagenets))
    monkeypatch.setenv("HAP_DEVICE", "cpu")
    monkeypatch.delenv("HAP_WORKERS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def away(url, file, **_):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", away)
    return imagenets


def names(images):
    return {str(images.file(i)) for i in range(len(images.labels))}


def test_the_classes_are_those_of_the_thousand():
    """The oracle is timm's list; it cannot see the order of the outputs, which the accuracy of the sample does."""
    timm = pytest.importorskip("timm")
    known = (Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    assert wnids() == sorted(wnids()) == known
    assert len(set(wnids())) == 1000


def test_a_split_holds_out_images_of_each_class_and_tests_on_val(home):
    splits, data = split(1)
    assert {name: len(part.labels) for name, part in splits.items()} == {
        "train": 1000,
        "validation": 1000,
        "test": 1000,
    }
    assert not names(splits["train"]) & names(splits["validation"])
    assert {Path(file).parts[-3] for file in names(splits["test"])} == {"val"}
    assert torch.equal(splits["validation"].labels, torch.arange(1000))
    assert data.name == "imagenet"
    assert not data.official
    told = "2,000 images in train, 1,000 images in val, not those of ILSVRC 2012; sha256 of names and sizes, the bytes"
    assert data.note == f"{told} were not read"
    whole, _ = split(0, smoke=True)
    assert names(whole["validation"]) <= names(split(0)[0]["train"])
    small, _ = split(HELD_OUT, smoke=True)
    assert [len(part.labels) for part in small.values()] == [SMOKE[name] for name in small]
    assert len(set(small["train"].labels.tolist())) == SMOKE["train"]
    assert not names(small["train"]) & names(small["validation"])


@pytest.mark.parametrize("held_out", [-1, 2, 10])
def test_an_impossible_share_is_refused(home, held_out):
    with pytest.raises(
        HapError, match=f"held_out must be at least 0 and below 2, the images of a class, found {held_out}"
    ):
        split(held_out)


def test_the_official_copy_is_known_by_its_numbers(home, monkeypatch):
    monkeypatch.setattr(imagenet, "SIZES", {"train": 2000, "val": 1000})
    imagenet._imagenet.cache_clear()
    data = split(1)[1]
    imagenet._imagenet.cache_clear()
    assert data.official
    assert data.note.startswith("2,000 images in train, 1,000 images in val; sha256 of")


def test_what_is_missing_is_told_with_where_and_how(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_IMAGENET", str(tmp_path / "nowhere"))
    with pytest.raises(
        MissingData, match=r"ImageNet not found: looked for \S*nowhere; HAP_IMAGENET names .*ILSVRC 2012"
    ):
        imagenet_resnet50.task(0)
    monkeypatch.delenv("HAP_IMAGENET")
    monkeypatch.setenv("HAP_DATA", str(tmp_path))
    monkeypatch.setattr(imagenet, "roots", lambda: [tmp_path])
    with pytest.raises(MissingData, match=rf"looked for {tmp_path}/imagenet;"):
        imagenet_resnet50.task(0)
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    with pytest.raises(
        HapError, match=r"imagenet/train: must have a folder for each of the 1000 classes \(found none; 0"
    ):
        imagenet_resnet50.ready()


def test_a_class_that_is_missing_is_named(home, tmp_path, monkeypatch):
    for part in ("train", "val"):
        for name in wnids()[: 999 if part == "val" else 1000]:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "a.JPEG").symlink_to(
                home / "imagenet" / "val" / wnids()[0] / f"{wnids()[0]}_0.JPEG"
            )
    monkeypatch.setenv("HAP_IMAGENET", str(tmp_path))
    with pytest.raises(
        HapError, match=r"val: must have .* 1000 classes and no other \(n15075141 is missing; 999 folders\)"
    ):
        imagenet_resnet50.ready()


def test_weights_are_found_checked_and_never_unpickled(tmp_path):
    def absent(folder):
        raise OSError("no network\nat all")

    state = {"a": torch.arange(3.0)}
    file = tmp_path / "one" / NAME
    file.parent.mkdir()
    torch.save(state, file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    found, where, told = weights(NAME, [tmp_path / "none", file.parent], sha[:8], absent)
    assert (found.keys(), where, told) == (state.keys(), file, sha)
    with pytest.raises(
        HapError, match=rf"net\.pt: must be the file whose sha256 begins with 00000000 \(found {sha[:16]}\)"
    ):
        weights(NAME, [file.parent], "00000000", absent)
    with pytest.raises(
        MissingData, match=r"weights net\.pt not found: looked for .*none/net\.pt; OSError: no network$"
    ):
        weights(NAME, [tmp_path / "none"], sha, absent)
    torch.save({"a": os.system}, file)
    with pytest.raises(HapError, match=r"net\.pt: must be weights by name \(found UnpicklingError: .*\); delete it"):
        weights(NAME, [file.parent], "", absent)
    file.write_bytes(pickle.dumps({"a": 1}, protocol=0)[:-1])
    with pytest.raises(HapError, match=r"net\.pt: must be weights by name"):
        weights(NAME, [file.parent], "", absent)
    file.unlink()
    file.mkdir()
    with pytest.raises(MissingData, match="not found"):
        weights(NAME, [file.parent], "", absent)


def test_weights_that_are_nowhere_are_put_into_the_last_folder(tmp_path):
    def get(folder):
        folder.mkdir()
        torch.save({"a": torch.ones(1)}, folder / NAME)

    found, where, _ = weights(NAME, [tmp_path / "one", tmp_path / "two"], "", get)
    assert where == tmp_path / "two" / NAME
    assert found["a"] == 1


def test_the_v1_weights_are_downloaded_with_their_sum_checked(home, tmp_path, monkeypatch):
    asked = []

    def download(url, file, hash_prefix, progress):
        asked.append((url, hash_prefix, progress))
        Path(file).write_bytes(b"half of it")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(HapError, match=r"resnet50-0676ba61\.pth: must be the file whose sha256 begins with 0676ba61 "):
        imagenet_resnet50.task(0, held_out=1)
    assert asked == [("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61", False)]
    assert (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").is_file()


def test_without_weights_a_run_is_refused_and_a_rehearsal_takes_random_ones_and_says_so(home):
    with pytest.raises(
        MissingData, match=r"weights resnet50-0676ba61\.pth not found: .*hub/checkpoints.*OSError: the net"
    ):
        imagenet_resnet50.task(0, held_out=1)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    made, again = (imagenet_resnet50.task(0, smoke=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in made.model.state_dict().items())
    assert made.notes == (imagenet_resnet50.RANDOM,)
    assert imagenet_resnet50.RANDOM in made.data.note
    assert not made.model.training
    assert made.example.shape == (1, 3, SMOKE["size"], SMOKE["size"])
    assert made.model(made.example).std() < 100  # its statistics are those of some images
    assert [len(y) for _, y in made.batches] == [SMOKE["calibration"]]
    assert made.train_size == SMOKE["train"] == sum(len(y) for _, y in made.train(10, generator(0)))
    found = made.evaluate(made.model, "validation")
    assert 0 <= found["accuracy"] <= 100
    assert found["loss"] > 0


def test_normalisation_is_right_by_default_and_wrong_as_published_where_asked_for(home):
    right, wrong = (imagenet_resnet50.task(0, smoke=True, normalise=each) for each in ("imagenet", "tiny-imagenet"))
    pixels = (
        right.example * torch.tensor((0.229, 0.224, 0.225))[:, None, None]
        + torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    )
    mean = torch.tensor((0.4802457, 0.4480721, 0.3975477))[:, None, None]
    std = torch.tensor((0.2769864, 0.2690644, 0.2820819))[:, None, None]
    torch.testing.assert_close(wrong.example, (pixels - mean) / std, rtol=1e-4, atol=1e-4)
    assert torch.allclose((pixels * 255).round(), pixels * 255, atol=1e-3)
    with pytest.raises(HapError, match="normalise"):
        resolve("task", "task", Ref(use=RESNET50, options={"normalise": "cifar"}))


def test_the_records_of_right_and_wrong_say_which(home, monkeypatch):
    """With weights that are there; here those of the network itself, under the name."""
    monkeypatch.setattr(
        imagenet_resnet50, "weights", lambda *_: (imagenet_resnet50.resnet50().state_dict(), Path("x"), "f" * 64)
    )
    right, wrong = (imagenet_resnet50.task(0, held_out=1, normalise=each, images=4) for each in imagenet.NORMALISE)
    assert right.notes == (imagenet_resnet50.SEEN,)
    assert wrong.notes == (imagenet_resnet50.SEEN, imagenet_resnet50.WRONG)
    assert right.data.note.endswith(f"weights resnet50-0676ba61.pth sha256 {'f' * 64}")
    assert right.example.shape == (1, 3, 224, 224)


@pytest.mark.parametrize("options", [{"images": 0}, {"batch": 0}, {"train_images": 0}])
def test_counts_below_one_are_refused(home, options):
    (name,) = options
    with pytest.raises(HapError, match=f"task: {name} must be at least 1, found 0"):
        imagenet_resnet50.task(0, smoke=True, **options)


def test_the_doctor_looks_at_the_folders_without_the_network(home, monkeypatch):
    monkeypatch.setattr(imagenet_resnet50, "resnet50", lambda: pytest.fail("built"))
    monkeypatch.setattr(imagenet_squeezenet, "squeezenet1_0", lambda: pytest.fail("built"))
    assert doctor.ready(Ref(use=RESNET50, options={"images": 3}), 0).name == "imagenet"
    assert doctor.ready(Ref(use=SQUEEZENET, options={"whole": True}), 0).name == "imagenet-sample"


def test_few_images_are_of_all_classes(home):
    images = listed(home / "imagenet" / "val", wnids())
    assert few(images, 5).labels.tolist() == [0, 249, 499, 749, 999]
    assert len(few(images, 5000).labels) == 1000


def test_the_squeezenet_is_shown_reds_where_it_was_trained_on_blues(home):
    """The oracle is torchvision's network, padded as Caffe's, on bytes in the order BGR less the mean."""
    made = imagenet_squeezenet.task(0, images=4, batch=3)
    state = torch.load(home / "checkpoints" / "imagenet" / imagenet_squeezenet.FILE, weights_only=True)
    oracle = squeezenet1_0()
    oracle.load_state_dict(state)
    oracle.classifier[1].padding = (1, 1)
    splits, _ = imagenet_squeezenet.split(imagenet_squeezenet._sample(imagenet_squeezenet._folder())[0]), None
    pixels = imagenet.decoded(splits["train"].file(0), imagenet_squeezenet.VIEW, None)
    bgr = pixels.permute(2, 0, 1).flip(0).float() - torch.tensor((104.0, 117.0, 123.0))[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(made.model(made.example), oracle.eval()(bgr[None]), rtol=1e-3, atol=1e-3)
    assert [len(y) for _, y in made.batches] == [3, 1]
    assert made.data.note.startswith("1,000 images, probably trained on; sha256 of names")
    assert not made.data.official


def test_the_sample_is_split_without_overlap_unless_all_of_it_is_shown(home):
    sample = imagenet_squeezenet._sample(imagenet_squeezenet._folder())[0]
    parts = imagenet_squeezenet.split(sample)
    assert {name: len(part.labels) for name, part in parts.items()} == imagenet_squeezenet.SPLITS
    assert len(set.union(*map(names, parts.values()))) == sum(imagenet_squeezenet.SPLITS.values())
    whole = imagenet_squeezenet.task(0, whole=True, images=2)
    assert whole.train_size == 1000
    assert whole.notes == (imagenet_squeezenet.SAME,)
    assert imagenet_squeezenet.task(0, images=2).notes == ()
    with pytest.raises(HapError, match="must have 448 images, found 9"):
        imagenet_squeezenet.split(sample.part(slice(9)))


def test_what_the_sample_lacks_is_told(home, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet_squeezenet, "roots", lambda: [tmp_path])
    with pytest.raises(
        MissingData, match=rf"sample of ImageNet not found: looked for {tmp_path}/imagenet-sample/val; an"
    ):
        imagenet_squeezenet.ready()
    (tmp_path / "imagenet-sample").symlink_to(home / "imagenet-sample")
    with pytest.raises(
        MissingData, match=r"weights squeezenet1_0_\S+ not found: looked for .*it is songhan/SqueezeNet"
    ):
        imagenet_squeezenet.task(0)


@pytest.mark.slow
def test_the_real_squeezenet_has_its_accuracy_on_the_real_sample(hapdata, monkeypatch):
    """65.5 %, told of the decoded weights on this sample; half a minute, and more where the machine is busy."""
    monkeypatch.setenv("HAP_DATA", str(hapdata))
    try:
        task = imagenet_squeezenet.task(0, whole=True)
    except MissingData as error:
        pytest.skip(str(error))
    assert task.evaluate(task.model, "test")["accuracy"] == pytest.approx(65.5, abs=0.3)
