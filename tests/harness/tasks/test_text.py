"""Tokens, batches and metrics, each beside a plain reimplementation in lists."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hap.harness.tasks.glue import Sentences
from hap.harness.tasks.text import BUCKET, Tokens, calibration, epoch, measure, scores, tokens
from hap.harness.train.loop import generator

NAMES = ("input_ids", "attention_mask", "token_type_ids")
PAD = 99
TOKEN = st.tuples(st.integers(0, 50), st.integers(0, 1))
SAMPLES = st.lists(st.tuples(st.lists(TOKEN, min_size=1, max_size=7), st.integers(0, 1)), min_size=1, max_size=9)


def packed(samples, names=NAMES):
    """Tokens of [(pairs of id and type, label)]."""
    flat = [pair for pairs, _ in samples for pair in pairs]
    ids, types = (torch.tensor([pair[i] for pair in flat]) for i in range(2))
    lengths, labels = (torch.tensor(v) for v in ([len(pairs) for pairs, _ in samples], [y for _, y in samples]))
    return Tokens(ids, types, lengths, labels, names)


def unpacked(found):
    """The samples of Tokens, one after the other."""
    pairs = list(zip(found.ids.tolist(), found.types.tolist(), strict=True))
    samples = []
    for length, label in zip(found.lengths.tolist(), found.labels.tolist(), strict=True):
        samples.append((pairs[:length], label))
        pairs = pairs[length:]
    assert pairs == []
    return samples


def shown(inputs, labels):
    """The samples of a batch without their padding."""
    rows = zip(*(inputs[name].tolist() for name in NAMES), labels.tolist(), strict=True)
    return [([(i, t) for i, m, t in zip(ids, mask, types, strict=True) if m], y) for ids, mask, types, y in rows]


def numbered(n, *, longest=40, seed=0, classes=2):
    """Samples of random lengths that begin with their number."""
    lengths = torch.randint(1, longest + 1, (n,), generator=generator(seed, "lengths")).tolist()
    return packed([([(i, 0)] + [(7, i % 2)] * (length - 1), i % classes) for i, length in enumerate(lengths)])


def firsts(batches):
    """The numbers of the samples shown, batch by batch."""
    return [inputs["input_ids"][:, 0].tolist() for inputs, _ in batches]


def drawn(batches):
    """The numbers of the samples shown, one after the other."""
    return [i for batch in firsts(batches) for i in batch]


def padding(batches):
    """The share of all positions that is padding."""
    masks = [inputs["attention_mask"] for inputs, _ in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@given(st.data(), SAMPLES)
def test_a_part_has_the_samples_that_were_asked_for_in_that_order(data, samples):
    index = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=12))
    whole = packed(samples)
    found = whole.part(torch.tensor(index))
    assert unpacked(found) == [samples[i] for i in index]
    assert found.names == whole.names
    assert unpacked(whole) == samples


@given(st.data(), SAMPLES)
def test_a_batch_is_padded_to_its_longest_sample_and_no_further(data, samples):
    index = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=12))
    inputs, labels = packed(samples).batch(torch.tensor(index), PAD)
    width = max(len(samples[i][0]) for i in index)
    expected = {name: [] for name in NAMES}
    for i in index:
        pairs, short = samples[i][0], width - len(samples[i][0])
        expected["input_ids"].append([token for token, _ in pairs] + [PAD] * short)
        expected["attention_mask"].append([1] * len(pairs) + [0] * short)
        expected["token_type_ids"].append([kind for _, kind in pairs] + [0] * short)
    assert {name: value.tolist() for name, value in inputs.items()} == expected
    assert {value.dtype for value in inputs.values()} == {torch.long}
    assert labels.tolist() == [samples[i][1] for i in index]


@given(st.data(), SAMPLES)
def test_a_batch_of_a_part_is_that_batch_of_the_whole(data, samples):
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=9)))
    whole = packed(samples)
    one, other = whole.batch(index, PAD), whole.part(index).batch(torch.arange(len(index)), PAD)
    assert all(torch.equal(one[0][name], other[0][name]) for name in NAMES)
    assert torch.equal(one[1], other[1])


def test_a_batch_has_what_the_network_takes_and_nothing_else():
    samples = [([(1, 0), (2, 1)], 0), ([(3, 0)], 1)]
    for names in ((), ("input_ids",), ("input_ids", "attention_mask")):
        assert tuple(packed(samples, names).batch(torch.tensor([0, 1]), PAD)[0]) == names


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """An encoder of letters that counts its calls; its cache lies in tmp_path."""
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))
    calls = []

    def encode(texts, length):
        calls.append(length)
        found = []
        for sample in texts:
            pairs = [(ord(letter), which) for which, text in enumerate(sample) for letter in text][:length]
            found.append(([i for i, _ in pairs], [t for _, t in pairs]))
        return found

    return encode, calls


TWO = Sentences([("ab", "c"), ("defg", "h"), ("i", "")], [1, 0, 1])


def test_sentences_are_encoded_once_for_texts_length_and_vocabulary(encoder, tmp_path):
    encode, calls = encoder
    first, again = (tokens(TWO, encode, b"words", 9, NAMES) for _ in range(2))
    assert len(calls) == 1
    assert unpacked(first) == unpacked(again)
    assert unpacked(first)[0] == ([(97, 0), (98, 0), (99, 1)], 1)
    assert len(list(tmp_path.iterdir())) == 1
    relabelled = tokens(TWO._replace(labels=[0, 0, 0]), encode, b"words", 9, ["input_ids"])
    assert len(calls) == 1  # labels and names are no part of what is kept
    assert relabelled.labels.tolist() == [0, 0, 0]
    assert relabelled.names == ("input_ids",)
    others = [
        (TWO._replace(texts=[*TWO.texts[:2], ("j", "")]), b"words", 9),
        (TWO._replace(texts=[("abc", ""), *TWO.texts[1:]]), b"words", 9),
        (TWO, b"other words", 9),
        (TWO, b"words", 8),
    ]
    for number, (sentences, vocabulary, length) in enumerate(others, start=2):
        for _ in range(2):
            tokens(sentences, encode, vocabulary, length, NAMES)
            assert len(calls) == number
    assert len(list(tmp_path.iterdir())) == 5


def test_what_is_kept_is_cut_at_the_length(encoder):
    encode, calls = encoder
    assert tokens(TWO, encode, b"", 3, NAMES).lengths.tolist() == [3, 3, 1]
    assert tokens(TWO, encode, b"", 3, NAMES).ids.tolist() == [97, 98, 99, 100, 101, 102, 105]
    assert calls == [3]


@pytest.mark.parametrize("damage", ["empty", "cut", "no header", "a bit", "other names", "gone"])
def test_a_damaged_cache_is_made_anew(damage, encoder, tmp_path):
    encode, calls = encoder
    expected = unpacked(tokens(TWO, encode, b"", 9, NAMES))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    at = content.index((97).to_bytes(8, "little"))  # the first token
    changed = {
        "empty": b"",
        "cut": content[:-1],
        "no header": b"<html>404</html>" * 9,
        "a bit": content[:at] + b"\x60" + content[at + 1 :],
        "other names": content.replace(b'"lengths"', b'"strengt"'),
    }
    file.unlink() if damage == "gone" else file.write_bytes(changed[damage])
    assert unpacked(tokens(TWO, encode, b"", 9, NAMES)) == expected
    assert len(calls) == 2
    assert file.read_bytes() == content
    tokens(TWO, encode, b"", 9, NAMES)
    assert len(calls) == 2


@given(st.integers(1, 200), st.integers(1, 40), st.none() | st.integers(1, 250))
def test_an_epoch_shows_each_sample_once_or_as_many_as_it_may(n, size, limit):
    found = numbered(n)
    batches = list(epoch(found, size, generator(1), pad=PAD, limit=limit))
    seen = drawn(batches)
    count = min(n, limit or n)
    assert len(seen) == len(set(seen)) == count
    assert len(batches) == math.ceil(count / size)  # as the schedule counts its steps
    assert sorted(len(batch) for batch in firsts(batches))[1:] == [size] * (len(batches) - 1)
    samples = unpacked(found)
    for inputs, labels in batches:
        assert shown(inputs, labels) == [samples[i] for i in inputs["input_ids"][:, 0].tolist()]


def test_the_order_of_an_epoch_is_the_generators_and_each_is_new():
    found = numbered(300)
    one, two = generator(3), generator(3)
    first, second = ([firsts(epoch(found, 16, rng, pad=PAD)) for _ in range(2)] for rng in (one, two))
    assert first == second
    assert first[0] != first[1]
    assert {frozenset(batch) for batch in first[0]} != {frozenset(batch) for batch in first[1]}
    few, more = (drawn(epoch(found, 16, one, pad=PAD, limit=40)) for _ in range(2))
    assert set(few) != set(more)


def test_a_limit_draws_all_samples_alike():
    """Buckets are made after the draw; a limit on sorted samples would show short ones alone."""
    found, rng = numbered(100), generator(0)
    seen = torch.zeros(100)
    for _ in range(300):
        seen[drawn(epoch(found, 5, rng, pad=PAD, limit=20))] += 1
    assert seen.min() > 30  # 60 on average, with a deviation of 7
    assert seen.max() < 90


def test_samples_of_a_batch_are_of_about_one_length_and_batches_come_in_any_order():
    found = numbered(4 * BUCKET * 16, longest=60)
    batches = list(epoch(found, 16, generator(0), pad=PAD))
    order = torch.split(torch.randperm(len(found.labels), generator=generator(1)), 16)
    assert padding(batches) < 0.05 < 0.35 < padding([found.batch(part, PAD) for part in order])
    widths = [inputs["input_ids"].shape[1] for inputs, _ in batches]
    assert widths != sorted(widths)
    assert abs(sum(widths[:100]) / 100 - sum(widths[100:]) / 100) < 6  # short and long ones all over the epoch


def test_calibration_is_drawn_by_the_generator_without_repeats():
    found = numbered(200)
    first, again, other = (calibration(found, 50, 16, generator(seed), PAD) for seed in (0, 0, 1))
    assert firsts(first) == firsts(again)
    seen, others = set(drawn(first)), set(drawn(other))
    assert len(seen) == len(others) == 50
    assert seen != others
    assert [len(labels) for _, labels in first] == [16, 16, 16, 2]
    apart = torch.split(torch.tensor(sorted(seen)), 16)
    assert padding(first) < 0.7 * padding([found.batch(part, PAD) for part in apart])
    assert sum(len(labels) for _, labels in calibration(found, 999, 64, generator(0), PAD)) == 200


def counted(found, wanted):
    """Metrics from the four counts, as the textbook writes them."""
    pairs = list(zip(found, wanted, strict=True))
    tp, fp, fn, tn = (pairs.count(kind) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": 100 * (tp + tn) / len(pairs),
        "f1": 100 * 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
        "matthews": 100 * (tp * tn - fp * fn) / below if below else 0.0,
    }


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_metrics_are_those_of_the_textbook(pairs):
    """Where no sample is of class 1, or said to be, F1 is 0 by our choice; that is not the textbook's."""
    found, wanted = ([pair[i] for pair in pairs] for i in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = scores(torch.tensor(found), torch.tensor(wanted), 2)
    assert given == pytest.approx(counted(found, wanted), abs=1e-9)


@pytest.mark.parametrize("constant", [0, 1])
def test_to_say_the_same_of_all_correlates_with_nothing(constant):
    found = scores(torch.full((10,), constant), torch.arange(10) % 2, 2)
    assert found == pytest.approx({"accuracy": 50, "f1": 100 * 2 / 3 * constant, "matthews": 0})


def test_of_more_than_two_classes_there_are_accuracy_and_loss_alone():
    assert scores(torch.arange(9) % 3, torch.zeros(9, dtype=torch.long), 3) == {"accuracy": pytest.approx(100 / 3)}
    found = measure(Bag(3), lambda model, inputs: model(**inputs), numbered(30, classes=3), PAD)
    assert found.keys() == {"accuracy", "loss"}


class Bag(nn.Module):
    """Logits of a sum over the tokens that are not padding; padding that was read would change them."""

    def __init__(self, classes=2):
        super().__init__()
        rng = generator(0, "bag")
        self.words = nn.Parameter(torch.randn(1000, 2, classes, generator=rng))
        self.asked = []

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.asked.append(tuple(input_ids.shape))
        return (self.words[input_ids, token_type_ids] * attention_mask[..., None]).sum(1) / 5


def test_measuring_is_a_loop_over_samples_whatever_the_batches():
    """The loop shows one sample at a time, unpadded; it shares the network with what it is beside."""
    found, model = numbered(90), Bag().train()
    logits = []
    for pairs, _ in unpacked(found):
        ids, types = (torch.tensor([[pair[i] for pair in pairs]]) for i in range(2))
        logits.append(model(ids, torch.ones_like(ids), types)[0].detach().double())
    loss = sum(-row.log_softmax(0)[y] for row, y in zip(logits, found.labels.tolist(), strict=True)) / 90
    expected = {**counted([int(row.argmax()) for row in logits], found.labels.tolist()), "loss": float(loss)}
    assert len(set(found.labels.tolist())) == 2
    for size in (1, 7, 64, 1000):
        model.asked.clear()
        given = measure(model, lambda model, inputs: model(**inputs), found, PAD, size)
        assert given == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert [n for n, _ in model.asked] == [len(part) for part in torch.split(torch.arange(90), size)]
        assert not model.training
        model.train()


def test_measuring_pads_little_and_keeps_no_graph():
    model, found = Bag(), numbered(640)
    outputs = []

    def call(model, inputs):
        outputs.append(model(**inputs))
        return outputs[-1]

    measure(model, call, found, PAD, 32)
    assert sum(rows * width for rows, width in model.asked) < 1.1 * int(found.lengths.sum())
    assert not any(output.requires_grad for output in outputs)
