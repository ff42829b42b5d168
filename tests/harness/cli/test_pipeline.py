"""The line of the doctor on decoding and training: who is slower is told, in some seconds, and nothing changes."""

import time

import pytest
import torch
from pictures import CLASSES, folder
from small import small
from test_rehearsal import ROOT
from torch import nn

from hap import HapError
from hap.harness.cli import doctor, pipeline
from hap.harness.cli.pipeline import Speed, measured, told
from hap.harness.spec.functions import Ref
from hap.harness.tasks import decoding
from hap.harness.tasks.decoding import Pictures, View, decoded
from hap.harness.tasks.imagefolder import listed
from hap.harness.train.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
RECIPE = Recipe(1, 0.1, compile=True, distil=0.5, label_smoothing=0.1)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DEVICE", "cpu")
    monkeypatch.delenv("HAP_WORKERS", raising=False)
    return Pictures(listed(folder(tmp_path / "train", each=3), CLASSES), View(16, 20))


@pytest.fixture
def task():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 10)).eval()
    return small(model=model, example=torch.zeros(1, 3, 16, 16))


def slow(wait):
    def slowly(*args):
        time.sleep(wait)
        return decoded(*args)

    return slowly


def test_decoding_is_measured_alone_and_by_all_workers(pictures, task, monkeypatch):
    """With a file that takes 10 ms: two workers have twice the images of one."""
    monkeypatch.setattr(decoding, "decoded", slow(0.01))
    monkeypatch.setenv("HAP_WORKERS", "2")
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    start = time.perf_counter()
    speed = measured(pictures, task, RECIPE, 0.4)
    assert time.perf_counter() - start < 20
    assert speed.workers == 2
    assert 30 < speed.one < 100
    assert 1.3 < speed.all / speed.one < 3
    assert speed.training > speed.all
    assert speed.batch == 4
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not task.model.training


def test_without_workers_one_process_does_all(pictures, task):
    speed = measured(pictures, task, RECIPE, 0.05)
    assert speed.workers == 0
    assert speed.all == speed.one > 0


def test_the_slower_one_is_named():
    line = told(Speed(140.4, 3, 410.2, 88.04, 4))
    assert line == (
        "  pipeline: 140 images/s a worker, 410 by 3 workers; training takes 88.0 images/s, uncompiled and 4 at a "
        "time: the network is the bottleneck"
    )
    assert told(Speed(140.4, 3, 410.2, 900.0, 64)).endswith("64 at a time: decoding is the bottleneck")
    assert "140 in the process that trains, for there are no workers" in told(Speed(140.4, 0, 140.4, 88.0, 4))


def test_the_doctor_measures_workloads_with_images_once_and_no_others(imagenets, tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DATA", str(imagenets))
    specs = [ROOT / "reproductions" / f"{name}.toml" for name in ("digits", "squeezenet-imagenet-sample")]
    monkeypatch.setattr(pipeline, "measured", lambda pictures, task, recipe: Speed(1.0, 0, 1.0, recipe.batch_size, 4))
    told = list(doctor.lines(dict.fromkeys(specs, tmp_path)))
    lines = [line for line in told if line.startswith("  pipeline")]
    assert len(lines) == 1
    assert "training takes 8.0 images/s" in lines[0]  # by the recipe of the spec
    at = told.index(lines[0])
    assert told[at - 1].startswith("workload hap.harness.tasks.imagenet_squeezenet:task: found imagenet-sample")
    assert list(pipeline.lines(Ref(use="hap.harness.tasks.digits_preresnet:task"), None, 0)) == []


def test_what_cannot_be_measured_is_one_line(monkeypatch):
    def broken(**options):
        raise HapError("HAP_WORKERS: a whole number expected, found 'x'")

    monkeypatch.setattr("hap.harness.tasks.imagenet_squeezenet.pictures", broken)
    ref = Ref(use="hap.harness.tasks.imagenet_squeezenet:task")
    assert list(pipeline.lines(ref, None, 0)) == ["  pipeline: NO, HAP_WORKERS: a whole number expected, found 'x'"]
