"""The examples in the docstrings of the core: all are run, and every public function has one."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hap

CORE = Path(hap.__file__).parent
MODULES = [
    ".".join(("hap", *path.relative_to(CORE).with_suffix("").parts))
    for path in sorted(CORE.rglob("*.py"))
    if "harness" not in path.parts and not path.stem.startswith("__")
]
DOCUMENTED = {"hap.methods", "hap.implants", "hap.cost", "hap.testing", "hap.structure.heads"}


def public(name: str) -> list[Any]:
    """The public functions and classes that a module defines."""
    own = {k: v for k, v in vars(import_module(name)).items() if getattr(v, "__module__", "") == name}
    return [v for k, v in own.items() if k[0] != "_" and (inspect.isroutine(v) or inspect.isclass(v))]


def examples(thing: Any) -> list[doctest.DocTest]:
    """The examples of a function, or of a class and its methods, with the names that `hap` promises them."""
    home = thing.__module__
    names = {"torch": torch, "nn": nn} | {k: getattr(hap, k) for k in hap.__all__} | vars(import_module(home))
    # without a module, for the finder takes a function that jaxtyping has wrapped for one of another module
    tests = doctest.DocTestFinder().find(thing, f"{home}.{thing.__name__}", module=False, globs=names)
    return [test for test in tests if test.examples]


def test_the_examples_of_the_core_run() -> None:
    runner, messages = doctest.DocTestRunner(), list[str]()
    for test in (test for name in MODULES for thing in public(name) for test in examples(thing)):
        runner.run(test, out=messages.append)
    assert runner.tries
    assert not runner.failures, "".join(messages)


def test_every_public_function_of_the_core_has_an_example() -> None:
    functions = [getattr(hap, name) for name in hap.__all__]
    functions += [thing for name in DOCUMENTED for thing in public(name)]
    without = {f"{f.__module__}.{f.__name__}" for f in functions if inspect.isroutine(f) and not examples(f)}
    assert not without
