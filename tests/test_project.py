"""The files around the package agree with each other, and what the documents tell people to write works."""

import csv
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn
from torchvision.models import resnet18

from hap import CrossEntropy, couple, trace
from hap.harness.models import load_model
from hap.harness.run import run
from hap.harness.spec.spec import load_spec
from hap.testing import check_groups, check_implant, check_score

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
LIBRARY = (ROOT / "hap" / "README.md").read_text()
SPECS = (ROOT / "reproductions" / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MACHINE_PATHS = re.compile(r"(?<![\w.~/-])/(work|root|home/\w+|Users/\w+|tmp/\w+)/")
TEXT = {".cff", ".csv", ".json", ".md", ".py", ".toml", ".txt", ""}


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())])
def test_the_tested_version_is_in_the_range(line: str) -> None:
    wanted = Requirement(line)
    assert wanted.specifier, f"{wanted.name} has no range"
    assert _constraints()[canonicalize_name(wanted.name)] in wanted.specifier


def test_constraints_are_exact_and_leave_cuda_to_torch() -> None:
    assert len(_constraints()) > len(PROJECT["dependencies"])
    assert not [name for name in _constraints() if re.match("nvidia|cuda|triton", name)]


def test_the_citation_names_the_paper() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["title"] == "Hessian-Aware Pruning and Optimal Neural Implant"
    authors = [author["family-names"] for author in paper["authors"]]
    assert authors == ["Yu", "Yao", "Gholami", "Dong", "Kim", "Mahoney", "Keutzer"]
    assert (paper["year"], paper["start"], paper["end"]) == (2022, 3880, 3891)
    assert "arXiv:2101.08940" in str(paper["identifiers"])


def test_version_and_citation_agree() -> None:
    import hap

    assert PROJECT["version"] == hap.__version__
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == PROJECT["version"]


def test_the_commands_of_the_documents_are_sessions() -> None:
    assert "    python -m pip install nox && nox -s reproduce\n    nox -s tests\n" in README
    named = set(re.findall(r"nox -s (\w+)", README + CONTRIBUTING + (ROOT / ".ci" / "run").read_text()))
    assert named <= set(re.findall(r"^@session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE))
    assert {"reproduce", "tests"} <= named


def test_the_readme_is_a_page_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 120
    for document in (README, LIBRARY, SPECS, CONTRIBUTING):
        folder = {LIBRARY: ROOT / "hap", SPECS: ROOT / "reproductions"}.get(document, ROOT)
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", document) if "://" not in link]
        assert not [link for link in links if not (folder / link).exists()]


def test_the_specs_of_the_documents_exist() -> None:
    there = {path.stem for path in (ROOT / "reproductions").glob("*.toml")}
    assert {name for name in there if f"`{name}`" in SPECS} == there


def test_the_changelog_tells_which_results_moved() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("#")]
    assert "## Results that moved" in headings
    assert "## [Unreleased]" in headings


def test_the_script_of_ci_is_bash() -> None:
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_no_committed_file_names_a_path_of_a_machine() -> None:
    found = []
    for name in _committed():
        file = ROOT / name
        if file.suffix in TEXT and file.is_file():
            lines = file.read_text(errors="replace").splitlines()
            found += [
                f"{name}:{i}: {line.strip():.100}" for i, line in enumerate(lines, 1) if MACHINE_PATHS.search(line)
            ]
    assert not found


def test_the_score_and_the_implant_of_the_readme_satisfy_the_kit(written: Callable[[str, str], Any]) -> None:
    mine = written(LIBRARY, "mine.py")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    groups = couple(model, trace(model, x), "union")
    check_groups(model, x, groups)
    check_score(mine.mean_power, model, CrossEntropy(), [(x, y)], groups)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    check_implant(mine.kernel_sum, conv, x)


def test_the_spec_of_the_readme_reads(written: Callable[[str, str], Any]) -> None:
    written(LIBRARY, "mine.py")
    spec = load_spec(written(LIBRARY, "mine.toml"))
    assert (len(spec.cases), len(spec.claims)) == (2, 1)


def test_the_workload_of_contributing_runs(written: Callable[[str, str], Any]) -> None:
    written(CONTRIBUTING, "wine.py")
    spec = load_spec(written(CONTRIBUTING, "wine.toml"))
    made = run(spec.cases["hap"], spec.seeds[0])
    assert made.metrics["dense"]["accuracy"] > 80
    assert made.cost["pruned"]["params"] < made.cost["dense"]["params"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the last example of the README ran, which imports the one before, and what was printed."""
    folder = tmp_path_factory.mktemp("kept")
    for name in ("own.py", "keep.py"):
        (folder / name).write_text(_block(LIBRARY, name))
    command = [sys.executable, "keep.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_first_example_of_the_readme_prunes_and_prints(tmp_path: Path) -> None:
    (tmp_path / "quick.py").write_text(_block(LIBRARY, "quick.py"))
    command = [sys.executable, "quick.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^parameters +11,181,642 +5,\d+,\d+ +(49|50)\.\d%$", done.stdout, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_example_on_heads_of_the_readme_runs_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "bert.py").write_text(_block(LIBRARY, "bert.py"))
    command = [sys.executable, "bert.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    heads, before, after = map(int, done.stdout.split()[-3:])
    width, head = 48, 4
    assert heads == 144
    # rows of queries, keys and values with their biases, and the columns that read them
    prunable = heads * (4 * width * head + 3 * head)
    assert 0.6 <= (before - after) / prunable < 0.6 + 2 / heads
    assert sorted(file.name for file in (tmp_path / "small-bert").iterdir()) == ["config.json", "model.safetensors"]


def test_the_library_example_of_the_readme_runs(kept: tuple[Path, str]) -> None:
    before, after, _ = map(int, kept[1].split("\n")[0].split())
    assert 0.49 < 1 - after / before < 0.51


def test_what_the_readme_keeps_and_exports_is_the_same_model(kept: tuple[Path, str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    small = load_model(kept[0] / "small", partial(resnet18, num_classes=10))
    session = onnxruntime.InferenceSession(kept[0] / "small.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), small(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Writes a block of a document to a file: a module is imported, of anything else the path is given."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str, name: str) -> Any:
        file = tmp_path / name
        file.write_text(_block(text, name))
        if file.suffix != ".py":
            return file
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
        module = __import__(file.stem)
        monkeypatch.setitem(sys.modules, file.stem, module)
        return module

    return write


def _block(text: str, name: str) -> str:
    """The fenced block whose first line is a comment that ends in this file name."""
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if re.match(rf"# (\w+/)*{re.escape(name)}\n", block)]
    assert len(found) == 1
    return str(found[0])


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def _committed() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("which files are committed is not known: this is no git checkout, or git is missing")
    return [name for name in done.stdout.split("\0") if name]


def test_the_numbers_of_the_readme_are_those_of_the_evidence():
    """The table of rankings, to the digits that are shown."""
    with (ROOT / "results" / "tables" / "probes-cifar10.csv").open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    quoted = re.findall(r"^\|.*\(`(r20-.+)`\) \| ([\d.]+) \| ([\d.]+) \|$", LIBRARY, flags=re.MULTILINE)
    assert len(quoted) >= 4
    for case, correlation, overlap in quoted:
        assert f"{float(rows[case]['spearman_mean']):.2f}" == correlation
        assert f"{float(rows[case]['overlap_mean']):.2f}" == overlap
