"""Epochs, calibration and counts over folders: the same for any number of workers, and shared out over ranks."""

import pytest
import torch
from pictures import CLASSES, folder
from torch import nn
from torch.nn import functional as F

from hap import HapError, couple, trace
from hap.harness.tasks import decoding, imagestream
from hap.harness.tasks.data import Normalise
from hap.harness.tasks.decoding import View, decoded
from hap.harness.tasks.imagefolder import listed
from hap.harness.tasks.imagestream import Count, calibration, count, epoch, share
from hap.harness.train.loop import generator
from hap.hessian.exact import exact
from hap.hessian.losses import CrossEntropy
from hap.structure.layers import forward

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
VIEW, NORMALISE = View(16, 20), Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_DEVICE", "cpu")
    monkeypatch.delenv("HAP_WORKERS", raising=False)
    return listed(folder(tmp_path / "train", each=5), CLASSES)


@pytest.fixture
def reads(monkeypatch):
    """The files that were decoded in this process."""
    seen = []

    def noted(file, *rest):
        seen.append(file.name)
        return decoded(file, *rest)

    monkeypatch.setattr(decoding, "decoded", noted)
    return seen


def net():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5, generator(1, str(parameter.shape)))
    return model.eval()


def drawn(images, seed=0, batch_size=4, **rest):
    return list(epoch(images, batch_size, generator(seed), view=VIEW, normalise=NORMALISE, **rest))


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def normalised(pixels):
    mean, std = (torch.tensor(each)[:, None, None] for each in NORMALISE[:2])
    return (pixels.permute(2, 0, 1).float() / 255 - mean) / std


def test_an_epoch_shows_each_image_once_cropped_and_half_of_them_mirrored(images):
    """The oracle decodes one by one with the draws repeated."""
    found = drawn(images)
    assert [len(labels) for _, labels in found] == [4, 4, 4, 3]
    rng = generator(0)
    order = torch.randperm(15, generator=rng)
    seeds, mirrored = torch.randint(2**62, (15,), generator=rng), torch.rand(15, generator=rng) < 0.5
    assert 0 < mirrored.sum() < 15
    expected = [decoded(images.file(int(i)), VIEW, int(seed)) for i, seed in zip(order, seeds, strict=True)]
    for pixels, flipped, other in zip(torch.cat([x for x, _ in found]), mirrored, expected, strict=True):
        torch.testing.assert_close(pixels, normalised(other.flip(1) if flipped else other))
    assert torch.equal(torch.cat([y for _, y in found]), images.labels[order])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)


def test_an_epoch_is_that_of_the_generator_alone(images, monkeypatch):
    torch.manual_seed(1)
    first, before = drawn(images), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setenv("HAP_WORKERS", "2")
    torch.manual_seed(2)
    assert equal(drawn(images), first)
    monkeypatch.delenv("HAP_WORKERS")
    rng = generator(0)
    one, two = (list(epoch(images, 4, rng, view=VIEW, normalise=NORMALISE)) for _ in range(2))
    assert equal(one, first)
    assert not torch.equal(one[0][0], two[0][0])
    state = generator(0)
    state.set_state(rng.get_state())  # as a training that goes on after two epochs
    again = list(epoch(images, 4, state, view=VIEW, normalise=NORMALISE))
    assert equal(again, list(epoch(images, 4, rng, view=VIEW, normalise=NORMALISE)))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [4, 15, 7])
def test_ranks_see_together_what_one_would(images, world, batch_size):
    """Bit for bit, in the same order within each batch, the ragged last one too."""
    whole = drawn(images, batch_size=batch_size)
    shards = [drawn(images, batch_size=batch_size, shard=(rank, world)) for rank in range(world)]
    assert {len(shard) for shard in shards} == {len(whole)}  # as many steps on each, or they would wait for ever
    joined = [tuple(torch.cat([shard[i][j] for shard in shards]) for j in (0, 1)) for i in range(len(whole))]
    assert equal(joined, whole)


def test_a_rank_decodes_its_own_images_alone(images, reads):
    drawn(images, shard=(1, 3))
    mine = list(reads)
    assert len(mine) == len(set(mine)) == 4  # one of each batch
    reads.clear()
    drawn(images, shard=(2, 3))
    assert not set(mine) & set(reads)


@pytest.mark.parametrize(("samples", "world"), [(10, 3), (2, 5), (0, 2), (256, 8)])
def test_shares_are_equal_and_whole(samples, world):
    parts = [list(range(samples))[share(samples, (rank, world))] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_can_be_limited_and_is_drawn_anew(images, reads):
    rng = generator(0)
    for _ in range(2):
        assert sum(len(y) for _, y in epoch(images, 4, rng, view=VIEW, normalise=NORMALISE, limit=6)) == 6
    assert len(reads) == 12
    assert set(reads[:6]) != set(reads[6:])


@pytest.mark.usefixtures("unchecked")  # the checker of types would look into a batch
def test_calibration_is_decoded_when_it_is_read_and_the_same_each_time(images, reads):
    batches = calibration(images, VIEW, NORMALISE, 10, 4, generator(0))
    assert len(batches) == 3
    assert not reads
    first = list(batches)
    assert len(set(reads)) == 10
    assert [len(y) for _, y in first] == [4, 4, 2]
    assert equal(first, list(batches))
    assert equal([batches[1], batches[-1]], [first[1], first[2]])
    reads.clear()
    assert equal(list(batches[0::2]), first[0::2])
    assert len(reads) == 6
    with pytest.raises(IndexError):
        batches[3]
    order = torch.randperm(15, generator=generator(0))[:10]
    expected = [normalised(decoded(images.file(int(i)), VIEW, None)) for i in order]
    torch.testing.assert_close(torch.cat([x for x, _ in first]), torch.stack(expected))
    assert torch.equal(torch.cat([y for _, y in first]), images.labels[order])


def test_calibration_may_be_augmented_once_and_for_all(images):
    batches = calibration(images, VIEW, NORMALISE, 10, 4, generator(0), augmented=True)
    plain = calibration(images, VIEW, NORMALISE, 10, 4, generator(0))
    assert equal(list(batches), list(batches))
    assert equal(list(batches[1:]), list(batches)[1:])
    assert not torch.equal(batches[0][0], plain[0][0])
    assert torch.equal(batches[0][1], plain[0][1])
    rng = generator(0)
    order, seeds = torch.randperm(15, generator=rng)[:10], torch.randint(2**62, (10,), generator=rng)
    mirrored = torch.rand(10, generator=rng) < 0.5
    shown = torch.cat([x for x, _ in batches])
    for pixels, index, seed, flipped in zip(shown, order, seeds, mirrored, strict=True):
        expected = decoded(images.file(int(index)), VIEW, int(seed))
        torch.testing.assert_close(pixels, normalised(expected.flip(1) if flipped else expected))


def test_calibration_of_nothing_is_refused(images):
    for options in ((0, 4), (4, 0)):
        with pytest.raises(HapError, match="must be at least 1, found 0"):
            calibration(images, VIEW, NORMALISE, *options, generator(0))


@pytest.mark.usefixtures("unchecked")
def test_curvature_takes_a_batch_at_a_time_and_gives_what_a_list_gives(images, monkeypatch):
    """No more than one batch is alive at any time, and each is decoded once."""
    model, loss = net(), CrossEntropy()
    batches, alive = calibration(images, VIEW, NORMALISE, 15, 4, generator(0)), []
    groups = couple(model, trace(model, batches[0][0][:1]), "union")
    expected = exact(model, loss, list(batches), groups)
    whole = imagestream.stream

    def watched(*given):
        for pixels in whole(*given):
            alive.append(len(pixels))
            yield pixels

    monkeypatch.setattr(imagestream, "stream", watched)
    found = exact(model, loss, batches, groups)
    assert alive == [4, 4, 4, 3]
    assert torch.equal(found.trace, expected.trace)


@pytest.mark.parametrize("batch_size", [None, 4, 15])
def test_each_image_is_counted_once(images, batch_size):
    """The oracle goes image by image; the last batch is ragged."""
    model, hits, loss = net(), 0, 0.0
    with torch.no_grad():
        for i, label in enumerate(images.labels):
            logits = model(normalised(decoded(images.file(i), VIEW, None))[None])
            hits += int(logits.argmax()) == int(label)
            loss += float(F.cross_entropy(logits.double(), label[None]))
    found = count(model.train(), forward, images, VIEW, NORMALISE, batch_size)
    assert not model.training
    assert (found.hits, found.images) == (hits, 15)
    assert 0 < hits < 15
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.rates == {"accuracy": pytest.approx(100 * hits / 15), "loss": pytest.approx(loss / 15, rel=1e-5)}


@pytest.mark.parametrize("world", [2, 4, 16])
def test_the_counts_of_ranks_add_up(images, world, reads):
    model = net()
    whole = count(model, forward, images, VIEW, NORMALISE, 4)
    reads.clear()
    parts = [count(model, forward, images, VIEW, NORMALISE, 4, (rank, world)) for rank in range(world)]
    assert sorted(reads) == sorted(images.file(i).name for i in range(15))
    hits, loss, number = (sum(each) for each in zip(*parts, strict=True))
    assert (hits, number) == (whole.hits, whole.images)
    assert loss == pytest.approx(whole.loss, rel=1e-6)
    assert Count(hits, loss, number).rates["accuracy"] == whole.rates["accuracy"]
