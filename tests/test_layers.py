"""What the tools do not hold: import-linter has the order of the rooms, ruff the docstrings and the unsafe loads."""

import ast
import io
import subprocess
import sys
import tokenize
from importlib import import_module
from pathlib import Path

import pytest

import hap

HERE = Path(hap.__file__).parent
TREES = {file: ast.parse(file.read_text()) for file in sorted(HERE.rglob("*.py"))}
IN_CORE = [file for file in TREES if "harness" not in file.parts and file.name != "__main__.py"]


def imported(tree):
    """The top-level packages that a file imports anywhere."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)


def lengths(file):
    """The lines of each function of a file, by name."""
    found = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: node.end_lineno - node.lineno + 1 for node in found}


def docstrings(tree):
    """The lines that docstrings take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def code_lines(file):
    """The lines that hold a token other than a comment, docstrings aside."""
    source, skipped = file.read_text(), set(docstrings(TREES[file]))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - skipped


def test_the_core_needs_torch_and_nothing_else():
    """A contract of import-linter can forbid packages by name; this allows a few, and so forbids all others."""
    assert set().union(*(imported(TREES[file]) for file in IN_CORE)) <= {
        *("hap", "torch", "jaxtyping"),
        *sys.stdlib_module_names,
    }


def test_public_names_are_few_and_there():
    assert len(hap.__all__) <= 24
    assert len(set(hap.__all__)) == len(hap.__all__)
    for name in hap.__all__:
        assert getattr(hap, name) is not None
    with pytest.raises(AttributeError, match="module 'hap' has no attribute 'nothing'"):
        _ = hap.nothing


def test_importing_hap_imports_the_standard_library_only():
    """In a fresh interpreter; what `site` imports before is not of our doing."""
    program = "import sys; old = set(sys.modules); import hap; print(*sorted(set(sys.modules) - old))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    new = {name.partition(".")[0] for name in ran.stdout.split()}
    assert new <= {"hap", *sys.stdlib_module_names}
    assert len(ran.stdout.split()) < 50


@pytest.mark.parametrize("room", [file.parent for file in TREES if file.name == "__init__.py" and file.parent != HERE])
def test_a_room_exports_what_is_there_and_no_name_of_its_modules(room):
    package = import_module(".".join(room.relative_to(HERE.parent).parts))
    blocks = [node for node in TREES[room / "__init__.py"].body if isinstance(node, ast.If)]
    names = [alias.name for block in blocks for node in block.body for alias in node.names]
    assert not {file.stem for file in room.glob("*")} & set(names)
    for name in names:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_what_reads_records_needs_no_torch():
    program = (
        "from hap.harness.processes import Say, locked; from hap.harness.records import Run, aged; "
        "from hap.harness.spec import load_spec; from hap.harness.train import Recipe; "
        "from hap.harness.verdicts import Verdict; import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_functions_are_short():
    """None is over 60 lines, and of those of the core 9 of 10 have at most 30; ruff counts statements, not lines."""
    assert not {(file.name, name) for file in TREES for name, lines in lengths(file).items() if lines > 60}
    core = sorted(lines for file in IN_CORE for lines in lengths(file).values())
    assert core[len(core) * 9 // 10] <= 30


def test_the_core_is_small():
    """Lines with code: blank lines, comments, docstrings and the exports of rooms do not count."""
    assert sum(len(code_lines(file)) for file in IN_CORE if file.name != "__init__.py") < 4000
