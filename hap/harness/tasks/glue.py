"""GLUE tasks as they lie on disk, or from the hub: sentences and labels; knows nothing of tokens or networks.

The labels of GLUE's own test sets are not public: the dev set is the test set here, and validation is a part of train.
"""

import importlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from hap import HapError
from hap.harness.task import Data, MissingData
from hap.harness.tasks.data import roots
from hap.harness.tasks.pickles import first_line

HUB, REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
SOURCE = "gluebenchmark.com/tasks; or install `datasets`, which downloads it"


class Layout(NamedTuple):
    """How the TSV of a task says what it says."""

    columns: tuple[str, ...]  # all of them
    header: bool  # whether the file begins with their names
    texts: tuple[str, ...]  # one sentence or two
    label: str
    metric: str  # that GLUE reports
    hub: str  # its name there


TASKS = {
    "MRPC": Layout(
        ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        True,
        ("#1 String", "#2 String"),
        "Quality",
        "f1",
        "mrpc",
    ),
    "SST-2": Layout(("sentence", "label"), True, ("sentence",), "label", "accuracy", "sst2"),
    "CoLA": Layout(("source", "label", "star", "sentence"), False, ("sentence",), "label", "matthews", "cola"),
}
HUB_TEXTS = {1: ("sentence",), 2: ("sentence1", "sentence2")}


class Sentences(NamedTuple):
    """Samples of one sentence or two, with their labels."""

    texts: list[tuple[str, ...]]
    labels: list[int]


def layout(name: str) -> Layout:
    """That of a task; HapError for one that is not known."""
    if name not in TASKS:
        raise HapError(f"task: one of {', '.join(TASKS)} expected, found {name!r}")
    return TASKS[name]


def glue(name: str, root: str | Path | None = None) -> tuple[Sentences, Sentences, Data]:
    """The training and the dev sentences of a task, and which copy they are: TSV on disk, else from the hub."""
    how = layout(name)
    folders = [base / "glue" / name for base in roots(root)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is not None:
        parts = [_table(folder / f"{part}.tsv", how) for part in ("train", "dev")]
        note = "TSV; GLUE publishes no sums to check it by"
    else:
        parts = _from_hub(name, how, folders)
        note = f"huggingface.co/datasets/{HUB} at {REVISION[:10]}"
    return parts[0], parts[1], Data(f"glue/{name}", digest(parts), folder is None, note)


def digest(parts: Sequence[Sentences]) -> str:
    """The sha256 over all texts and labels."""
    total = sha256()
    for part in parts:
        for texts, label in zip(part.texts, part.labels, strict=True):
            total.update("\0".join((*texts, str(label), "")).encode())
    return total.hexdigest()


def _table(file: Path, how: Layout) -> Sentences:
    try:
        lines = file.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")  # and at nothing else
    except OSError as error:
        raise MissingData(f"{file}: must be readable (found {error.strerror}); {SOURCE}") from None
    except UnicodeDecodeError as error:
        raise HapError(f"{file}: must be TSV in UTF-8 (found {first_line(error)})") from None
    if not any(lines[how.header :]):
        raise HapError(f"{file}: at least one line of data expected, found none")
    header = lines[0].removesuffix("\r").split("\t") if how.header else list(how.columns)
    if missing := [column for column in (*how.texts, how.label) if column not in header]:
        raise HapError(f"{file}: a column {missing[0]!r} expected, found {', '.join(header)}")
    at, texts, labels = {column: header.index(column) for column in header}, list[tuple[str, ...]](), list[int]()
    for number, line in enumerate(lines[how.header :], start=1 + how.header):
        cells = line.removesuffix("\r").split("\t")  # GLUE quotes nothing
        if len(cells) != len(header):
            raise HapError(f"{file}: line {number}: {len(header)} cells expected, found {len(cells)}")
        if cells[at[how.label]] not in ("0", "1"):
            raise HapError(f"{file}: line {number}: a label of 0 or 1 expected, found {cells[at[how.label]]!r:.40}")
        texts.append(tuple(cells[at[column]].strip() for column in how.texts))
        labels.append(int(cells[at[how.label]]))
    return Sentences(texts, labels)


def _from_hub(name: str, how: Layout, folders: Sequence[Path]) -> list[Sentences]:
    looked = ", ".join(str(folder.absolute()) for folder in folders)
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise MissingData(
            f"GLUE {name}: not found; looked for {looked}, and `datasets` is not installed; {SOURCE}"
        ) from None
    try:
        found = datasets.load_dataset(HUB, how.hub, revision=REVISION)
    except Exception as error:  # whatever a hub that is away makes it raise
        why = f"{HUB} cannot be had: {first_line(error)}"
        raise MissingData(f"GLUE {name}: not found; looked for {looked}; {why}") from None
    columns = HUB_TEXTS[len(how.texts)]
    parts = [found[part] for part in ("train", "validation")]
    return [Sentences(list(zip(*(part[c] for c in columns), strict=True)), list(part["label"])) for part in parts]
