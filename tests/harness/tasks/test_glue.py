"""Sentences of GLUE: the real files where they are, files made up with what may be wrong, a hub of our own."""

import os
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from hap import HapError
from hap.harness.task import MissingData
from hap.harness.tasks.glue import HUB, REVISION, TASKS, digest, glue, layout

SHARED = Path(__file__).parents[4] / "shared" / "data"
COUNTS = {"MRPC": (3668, 408), "SST-2": (67349, 872), "CoLA": (8551, 1043)}
POSITIVE = {"MRPC": (2474, 279), "SST-2": (37569, 444), "CoLA": (6023, 721)}
HEADERS = {"MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "SST-2": "sentence\tlabel\n", "CoLA": ""}
ROWS = {
    "MRPC": ["1\t1\t2\tone cat\ta cat", "0\t3\t4\tno dog\ta cow"],
    "SST-2": ["a fine film\t1", "a poor one\t0"],
    "CoLA": ["gj04\t1\t\tThey sang.", "gj04\t0\t*\tThey sang Tom."],
}
TEXTS = {
    "MRPC": [("one cat", "a cat"), ("no dog", "a cow")],
    "SST-2": [("a fine film",), ("a poor one",)],
    "CoLA": [("They sang.",), ("They sang Tom.",)],
}


def fill(root, name, train=None, dev=None):
    """The files of a task under `root`: bytes, text, or the rows above."""
    folder = root / "glue" / name
    folder.mkdir(parents=True, exist_ok=True)
    usual = HEADERS[name] + "\n".join(ROWS[name]) + "\n"
    for part, given in (("train", train), ("dev", dev)):
        content = usual if given is None else given
        (folder / f"{part}.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No folder of GLUE on any of the ways to one."""
    monkeypatch.setenv("HAP_DATA", str(tmp_path / "given"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real():
    """The folder with the real files, whose line ends and cells can be counted without reading them as we do."""
    given = os.environ.get("HAP_DATA")
    root = next((root for root in ([Path(given)] if given else []) + [SHARED] if (root / "glue").is_dir()), None)
    if root is None:
        pytest.skip(f"GLUE not found: neither in HAP_DATA ({given}) nor in {SHARED}")
    return root


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_files_have_the_official_counts_and_labels(name, real):
    """The counts are those of GLUE's paper and of the hub; they cannot see sentences that have another's place."""
    *parts, data = glue(name, real)
    assert tuple(len(part.labels) for part in parts) == tuple(len(part.texts) for part in parts) == COUNTS[name]
    assert tuple(sum(part.labels) for part in parts) == POSITIVE[name]
    assert {len(texts) for part in parts for texts in part.texts} == {2 if name == "MRPC" else 1}
    assert (data.name, data.official) == (f"glue/{name}", False)
    assert data.sha256 == digest(parts)


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_sentences_are_the_bytes_of_the_file(name, real):
    """The oracle cuts bytes at tabs and line ends; it cannot see whether the file itself was damaged."""
    column, label = {"MRPC": (3, 0), "SST-2": (0, 1), "CoLA": (3, 1)}[name]
    for part, file in zip(glue(name, real)[:2], ("train", "dev"), strict=True):
        lines = (real / "glue" / name / f"{file}.tsv").read_bytes().split(b"\n")[name != "CoLA" :]
        cells = [line.rstrip(b"\r").split(b"\t") for line in lines if line]
        assert [texts[0].encode() for texts in part.texts] == [row[column].strip() for row in cells]
        assert [b"%d" % value for value in part.labels] == [row[label] for row in cells]


def test_quotes_of_the_real_files_are_characters(real):
    """A reader of CSV would take a quote at the start of a cell as one around it, and eat line ends up to the next."""
    raw = (real / "glue" / "MRPC" / "train.tsv").read_bytes().count(b'"')
    assert raw > 1000
    assert sum(text.count('"') for texts in glue("MRPC", real)[0].texts for text in texts) == raw
    assert (real / "glue" / "MRPC" / "dev.tsv").read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("form", ["plain", "bom", "crlf", "no last newline"])
def test_a_file_is_read_however_it_was_saved(name, form, tmp_path):
    text = HEADERS[name] + "\n".join(ROWS[name]) + "\n"
    content = {
        "plain": text.encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
        "no last newline": text.removesuffix("\n").encode(),
    }[form]
    fill(tmp_path, name, content, content)
    for part in glue(name, tmp_path)[:2]:
        assert part.texts == TEXTS[name]
        assert part.labels == [1, 0]


def test_columns_are_found_by_name(tmp_path):
    fill(tmp_path, "SST-2", "label\tmore\tsentence\n1\tx\ta fine film\n")
    assert glue("SST-2", tmp_path)[0] == ([("a fine film",)], [1])


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", '"'])
def test_a_line_ends_at_a_newline_and_nowhere_else(strange, tmp_path):
    sentence = f"one{strange}two {strange}three"
    fill(tmp_path, "SST-2", f"sentence\tlabel\n{sentence}\t1\n{strange}a{strange}\t0\n")
    texts, labels = glue("SST-2", tmp_path)[0]
    assert labels == [1, 0]
    assert texts[0] == (sentence,)
    assert texts[1] == (f"{strange}a{strange}".strip(),)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("SST-2", "text\tlabel\na\t1\n", "a column 'sentence' expected, found text, label"),
        ("SST-2", "sentence\tgold\na\t1\n", "a column 'label' expected, found sentence, gold"),
        ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\n1\t1\t2\ta\n", "a column '#2 String' expected, found Quality"),
        ("SST-2", "sentence\tlabel\na\t1\nb\n", "line 3: 2 cells expected, found 1"),
        ("SST-2", "sentence\tlabel\na\tb\t1\n", "line 2: 2 cells expected, found 3"),
        ("SST-2", "sentence\tlabel\na\t1\n\n", "line 3: 2 cells expected, found 1"),
        ("MRPC", HEADERS["MRPC"] + "1\t1\t2\tone cat\n", "line 2: 5 cells expected, found 4"),
        ("CoLA", "gj04\t1\t\tThey sang.\ngj04\t1\tThey\n", "line 2: 4 cells expected, found 3"),
        ("SST-2", "sentence\tlabel\na\t2\n", "line 2: a label of 0 or 1 expected, found '2'"),
        ("SST-2", "sentence\tlabel\na\t1\nb\t\n", "line 3: a label of 0 or 1 expected, found ''"),
        ("SST-2", "sentence\tlabel\na\t1.0\n", "line 2: a label of 0 or 1 expected, found '1.0'"),
        ("CoLA", "gj04\t-1\t\tThey sang.\n", "line 1: a label of 0 or 1 expected, found '-1'"),
        ("SST-2", "sentence\tlabel\n", "at least one line of data expected, found none"),
        ("SST-2", "", "at least one line of data expected, found none"),
        ("CoLA", "", "at least one line of data expected, found none"),
        ("CoLA", b"\xef\xbb\xbf\n", "at least one line of data expected, found none"),
        ("SST-2", b"sentence\tlabel\ncaf\xe9\t1\n", "must be TSV in UTF-8 .found UnicodeDecodeError.*0xe9"),
        ("CoLA", "gj04\t1\t\tThey sang.\n".encode("utf-16"), "must be TSV in UTF-8"),
    ],
)
@pytest.mark.parametrize("part", ["train", "dev"])
def test_what_is_wrong_with_a_file_is_one_line(name, content, expected, part, tmp_path):
    folder = fill(tmp_path, name, **{part: content})
    with pytest.raises(HapError, match=expected) as caught:
        glue(name, tmp_path)
    assert str(caught.value).startswith(f"{folder / part}.tsv: ")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, MissingData)


@pytest.mark.parametrize("part", ["train", "dev"])
def test_a_file_that_is_not_in_its_folder_is_named(part, tmp_path):
    folder = fill(tmp_path, "CoLA")
    (folder / f"{part}.tsv").unlink()
    with pytest.raises(MissingData, match=rf"CoLA/{part}\.tsv: must be readable .found No such file.*gluebenchmark"):
        glue("CoLA", tmp_path)


@pytest.mark.parametrize("name", ["RTE", "mrpc", ""])
def test_a_task_that_is_not_known_is_refused(name):
    for asked in (layout, glue):
        with pytest.raises(HapError, match=f"task: one of MRPC, SST-2, CoLA expected, found '{name}'"):
            asked(name)


def test_the_metric_is_that_of_glue():
    assert {name: how.metric for name, how in TASKS.items()} == {"MRPC": "f1", "SST-2": "accuracy", "CoLA": "matthews"}


def test_the_record_names_the_very_sentences_and_labels(tmp_path):
    """The oracle is the definition written out; that it differs where a text or a label does is checked by hand."""
    fill(tmp_path, "MRPC")
    one = "".join(f"{a}\0{b}\0{y}\0" for (a, b), y in zip(TEXTS["MRPC"], [1, 0], strict=True))
    before = glue("MRPC", tmp_path)[2].sha256
    assert before == sha256((one + one).encode()).hexdigest()
    seen = {before}
    for row in ("0\t1\t2\tone cat\ta cat", "1\t1\t2\tone\tcat a cat", "1\t1\t2\tone cat\ta cat s"):
        fill(tmp_path, "MRPC", HEADERS["MRPC"] + row + "\n" + ROWS["MRPC"][1] + "\n")
        seen.add(glue("MRPC", tmp_path)[2].sha256)
    assert len(seen) == 4


def test_the_first_folder_that_has_the_task_is_read(nowhere, monkeypatch):
    fill(nowhere / "home" / "data", "CoLA")
    assert len(glue("CoLA")[0].texts) == 2
    fill(nowhere / "data", "CoLA", "a\t1\t\tOne.\n")
    assert len(glue("CoLA")[0].texts) == 1
    (nowhere / "given" / "glue" / "MRPC").mkdir(parents=True)
    assert len(glue("CoLA")[0].texts) == 1
    fill(nowhere / "given", "CoLA", "a\t1\t\tOne.\na\t1\t\tTwo.\na\t1\t\tThree.\n")
    assert len(glue("CoLA")[0].texts) == 3


class Column:
    """A column of the hub, which is no list."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


@pytest.mark.parametrize(("name", "there"), [("MRPC", "mrpc"), ("SST-2", "sst2"), ("CoLA", "cola")])
def test_without_a_folder_the_hub_is_asked_for_a_pinned_revision(name, there, nowhere, monkeypatch):
    asked = []
    keys = ("sentence1", "sentence2") if name == "MRPC" else ("sentence",)
    columns = {key: Column(list(texts)) for key, texts in zip(keys, zip(*TEXTS[name], strict=True), strict=True)}
    part = {**columns, "label": Column([1, 0]), "idx": Column([0, 1])}

    def load(*args, **options):
        asked.append((args, options))
        return {"train": part, "validation": part, "test": {**part, "label": Column([-1, -1])}}

    hub(monkeypatch, load)
    train, dev, data = glue(name)
    assert asked == [(("nyu-mll/glue", there), {"revision": REVISION})]
    assert len(REVISION) == 40
    assert train == dev == (TEXTS[name], [1, 0])
    assert (data.name, data.official) == (f"glue/{name}", True)
    assert HUB in data.note
    assert REVISION[:10] in data.note
    fill(nowhere / "given", name)
    again = glue(name)[2]
    assert again.sha256 == data.sha256  # the same sentences, wherever they come from
    assert not again.official
    assert len(asked) == 1


def test_a_hub_that_is_away_is_one_line_that_says_where_was_looked(nowhere, monkeypatch):
    def load(*args, **options):
        raise ConnectionError("Couldn't reach it\nand more lines\nof that")

    hub(monkeypatch, load)
    with pytest.raises(MissingData) as caught:
        glue("SST-2")
    line = str(caught.value)
    assert "\n" not in line
    for place in ("given", "data", "home/data"):
        assert str(nowhere / place / "glue" / "SST-2") in line
    assert line.startswith("GLUE SST-2: not found; looked for ")
    assert "nyu-mll/glue cannot be had: ConnectionError: Couldn't reach it" in line
    assert line.count("ConnectionError") == 1


def test_without_datasets_a_missing_folder_is_one_line_that_says_how_to_get_it(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingData) as caught:
        glue("MRPC")
    line = str(caught.value)
    assert "\n" not in line
    assert str(nowhere / "given" / "glue" / "MRPC") in line
    assert "`datasets` is not installed; gluebenchmark.com/tasks; or install `datasets`" in line
    with pytest.raises(MissingData, match=f"looked for {nowhere / 'x' / 'glue' / 'MRPC'}, and"):
        glue("MRPC", nowhere / "x")
