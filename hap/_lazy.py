"""Lazy exports of packages: imports under TYPE_CHECKING in an `__init__` take place when a name is first used.

So `from hap.harness.spec import Spec` needs no torch, and the export is an ordinary import to readers and tools. A name
that is also a module of its package cannot be exported: which of the two it is would depend on earlier imports.
"""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazily(file: str) -> Callable[[str], Any]:
    """The `__getattr__` of the package whose `__init__` is `file`: imports a name by the lines in its `if` blocks."""
    blocks = [node for node in ast.parse(Path(file).read_text("utf-8")).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {Path(file).parent.name!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get
