from pathlib import Path

import pytest
from encoders import DEV, HEADS, SPECIAL, TRAIN, WORDS, rows, saved
from fakes import fake_run, with_accuracy, write_spec

from hap.harness.spec.spec import load_spec

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path):
    return load_spec(write_spec(tmp_path))


@pytest.fixture
def runs(spec):
    """Three seeds of hap, one of random."""
    hap = [with_accuracy(fake_run(spec.cases["hap"], seed), "selected", 93.0 + seed) for seed in spec.seeds]
    return {"hap": hap, "random": [fake_run(spec.cases["random"], 0)]}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of trained digits, shared by the tests of one process."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """A folder laid out as $HAP_DATA, with the three tasks of GLUE in small."""
    from hap.harness.tasks import glue

    root = tmp_path_factory.mktemp("data")
    for name in glue.TASKS:
        folder = root / "glue" / name
        folder.mkdir(parents=True)
        (folder / "train.tsv").write_text(rows(range(TRAIN), name))
        (folder / "dev.tsv").write_text(rows(range(TRAIN, TRAIN + DEV), name))
    return root


@pytest.fixture(scope="session")
def imagenets(tmp_path_factory):
    """A folder laid out as $HAP_DATA: ImageNet with two training pictures a class, its sample, a SqueezeNet."""
    import pictures
    import torch

    from hap.harness.tasks import imagenet_squeezenet
    from hap.harness.tasks.imagenet import wnids

    root = tmp_path_factory.mktemp("data")
    for part, each in (("train", 2), ("val", 1)):
        pictures.folder(root / "imagenet" / part, wnids(), each, first=len(part))
    (root / "imagenet-sample").mkdir()
    (root / "imagenet-sample" / "val").symlink_to(root / "imagenet" / "val")
    weights = root / "checkpoints" / "imagenet"
    weights.mkdir(parents=True)
    torch.save(imagenet_squeezenet.network().state_dict(), weights / imagenet_squeezenet.FILE)
    return root


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The folder of a BERT with words of its own, as it comes out of pretraining, without a head."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no encoder can be made")
    words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=48, initializer_range=0.2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(config)
    return saved(tmp_path_factory.mktemp("bert"), model, transformers.BertTokenizerFast(vocab=words))
