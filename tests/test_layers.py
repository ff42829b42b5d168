"""Imports point one way, names are few, and files and functions are small: the design, held by `ast`.

The core follows the listing of the design, with more modules, each before its first reader: `patch` is the module that
surgery adds, and `bypass` those for implants of heads; `layers` says what modules are, `taps` is what a model looks
like to tracing; `heads` picks heads among groups, and `masking` silences groups, for scores and for surgery; `losses`,
`persample`, `tally` and `graph` are what curvature is built of; `budget` was a part of `plan`, and `bridge` puts
implants of heads in their place.

The harness deviates in that what has no readers yet to come moves up: `ranks` (which process this is), `binding` (how a
name in a spec becomes a function), `files`, `provenance`, `events` and `recipe` know nothing of the rest; `batchnorm`,
`stepping` and `checkpoints` are what training is built of; `tasks` comes before `training`, which trains a Task, and so
before `cases`, which hold a Recipe; the single tasks come after it, for they train themselves. `cases`, a part of
`spec` until that grew too long, makes a Case of its tables; `upstream`, a method that only specs name, needs no more
than a Task; `returned` is what `run` holds a method to. `shapes` and `architecture` are what `store` needs to write a
pruned model without a pickle: a module, then a model, as a record. `freshness` is whether a record is of today's code,
`statistics` and `evidence` are what `judge` needs: bounds from numbers, and numbers from runs.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import hap

HERE = Path(hap.__file__).parent
CORE = (
    "structure hessian surgery surgery.patch structure.bypass structure.layers structure.taps structure.tracing "
    "structure.groups structure.heads surgery.masking hessian.losses hessian.persample hessian.accumulate "
    "hessian.linearity hessian.hooks hessian.hutchinson hessian.exact methods budget plan surgery.head_implants "
    "surgery.apply implants cost testing "
).split()
HARNESS = (
    "processes train tasks spec records models verdicts compare report nightly processes.ranks processes.files "
    "task spec.functions records.provenance records.freshness processes.events train.recipe batchnorm train.ema "
    "train.step train.checkpoints train.curve train.loop upstream tasks.cache tasks.nets tasks.pickles tasks.data "
    "tasks.imagefolder tasks.decoding tasks.imagestream tasks.digits_preresnet tasks.cifar10 "
    "tasks.cifar10_scratch tasks.cifar10_resnet20 tasks.cifar10_resnet32 tasks.cifar10_resnet56 "
    "tasks.cifar10_preresnet29 tasks.cifar10_resnet56b tasks.cifar10_wideresnet32 tasks.cifar10_vgg16 "
    "tasks.imagenet tasks.imagenet_resnet50 tasks.imagenet_squeezenet tasks.glue tasks.text tasks.encoder "
    "tasks.digits_bert tasks.glue_minilm tasks.glue_bert tasks.glue_roberta spec.cases spec.spec scoring returned "
    "run models.layers models.architecture models.huggingface records.parts records.store verdicts.statistics "
    "verdicts.measures verdicts.judge plugin report.markup report.plans report.tables report.verdicts_md "
    "report.plots report.page report.write cli.rehearsal cli.pipeline cli.doctor processes.progress "
    "processes.fanout cli.making cli.bill cli.pricing cli.estimate cli.terminal nightly.changepoint "
    "nightly.history nightly.regressions nightly.speed nightly.measure compare.comparison "
    "compare.conclusions records.checks cli.lint cli.commands cli.compare cli.app cli "
).split()
ORDER = ["hap", *[f"hap.{m}" for m in CORE], "hap.harness", *[f"hap.harness.{m}" for m in HARNESS], "hap.__main__"]


def name_of(file):
    return ".".join([*file.relative_to(HERE.parent).with_suffix("").parts]).removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted(HERE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
IN_CORE = [name for name in FILES if name == "hap" or name.removeprefix("hap.") in CORE]


def imported(tree):
    """The modules that a file imports anywhere; `from hap import x` is hap.x where x is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function):
    return function.end_lineno - function.lineno + 1


def docstrings(tree):
    """The lines that docstrings take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def code_lines(name):
    """The lines that hold a token other than a comment, docstrings aside."""
    source, skipped = FILES[name].read_text(), set(docstrings(TREES[name]))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - skipped


def test_every_module_has_its_place():
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    """It reads import statements, also those inside functions; a name resolved from a string it cannot see."""
    for other in imported(TREES[name]):
        if other == "hap" or other.startswith("hap."):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which comes after it"


@pytest.mark.parametrize("name", IN_CORE)
def test_the_core_needs_torch_and_nothing_else(name):
    roots = {other.partition(".")[0] for other in imported(TREES[name])}
    assert roots <= {"hap", "torch", "jaxtyping", *sys.stdlib_module_names}
    assert not any(other.startswith("hap.harness") for other in imported(TREES[name]))


def test_the_guard_sees_an_arrow_that_points_back():
    tree = ast.parse("def f():\n    from hap import surgery\n    import hap.cost as c\n    from hap.plan import Plan")
    assert list(imported(tree)) == ["hap.surgery", "hap.cost", "hap.plan"]


def test_public_names_are_few_and_there():
    assert len(hap.__all__) <= 20
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


@pytest.mark.parametrize("name", IN_CORE)
def test_a_module_of_the_core_is_short(name):
    assert len(FILES[name].read_text().splitlines()) <= 250


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    long = {f.name: length(f) for f in functions(TREES[name]) if length(f) > 60}
    assert not long


def test_functions_are_short_on_the_whole():
    lengths = sorted(length(f) for name in IN_CORE for f in functions(TREES[name]))
    assert lengths[len(lengths) * 9 // 10] <= 30


def test_the_core_is_small():
    """Lines with code: blank lines, comments and docstrings do not count."""
    assert sum(len(code_lines(name)) for name in IN_CORE) < 2500


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled_but_weights_and_arrays(name):
    """By how the calls are spelled: `torch.load` with weights_only=True alone, `pickle` to subclass Unpickler alone."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "pickle"
            assert node.module != "torch" or "load" not in [alias.name for alias in node.names]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "np.load", "numpy.load", "joblib.load")
