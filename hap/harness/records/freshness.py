"""Whether evidence is of the code and the data of today: a record and sources -> fresh, stale, or not known.

A record names the sha256 of the whole package and its commit. That sum is today's only until someone mends a comment or
a table; taken by itself it would call all evidence stale for ever, and nobody would look again. What matters is whether
the code that *decides the numbers of this case* has changed. So the sources of the record's commit are fetched from git
and compared with those on disk, definition by definition: the functions that the case names, the procedure `run`, and
all that they reach by name. Comments, docstrings and places do not count, nor does what reports, judges or keeps: a
function that moves to another module unchanged is the same function.

What it cannot see: code outside the package (a stranger's score, torch), and names made from strings. What it sees too
much of: a rewrite that moves no number is a change all the same. It errs towards stale, which is why stale evidence
keeps what it says, and only a release insists on evidence of its own code.

Where git or the commit is missing (an installed copy, a shallow clone) it says that it does not know. Records that
carry the digest of what decides them (`decides`) need no git; those made before it had one do.

Data is stale when it is not that of the newest record of the same data set: both cannot be of today's.
"""

import ast
import io
import re
import subprocess
import tarfile
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import hap
from hap.harness.processes.provenance import checksum

PACKAGE = Path(hap.__file__).parent
ENTRANCE = "hap.harness.run:run"
ROLES = ("task", "score", "method", "reference", "implant", "update")
# they say what happened and where, and keep it; no number comes from them
SILENT = {
    f"hap.harness.{name}"
    for name in (
        "spec.functions train.checkpoints processes.progress processes.files processes.provenance processes.workers "
        "records.freshness records.outcomes tasks.cache "
        "binding checkpoints events files freshness provenance records.provenance"  # where they lay in older commits
    ).split()
}

State = Literal["fresh", "stale", "unknown"]
Place = tuple[str, str]  # a module and a name in it
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Age:
    """Whether a record is of today, and if not why it is told so."""

    state: State
    why: str = ""
    lost: bool = False  # not known for want of a commit, which another clone may have


FRESH = Age("fresh")


class Module:
    """A module of the package, parsed when something is asked of it: most are never reached."""

    def __init__(self, text: str) -> None:
        """`text`: its source."""
        self.text = text
        self._named: dict[str, list[Place]] = {}

    @cached_property
    def nodes(self) -> dict[str, ast.stmt]:
        """What it defines at its top level, name -> syntax."""
        return dict(_defined(self._parts[0]))

    @cached_property
    def texts(self) -> dict[str, str]:
        """The same, name -> text without comments and docstrings."""
        lines = _without_comments(self.text)
        for node in self._parts:
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                for line in range(node.body[0].lineno - 1, node.body[0].end_lineno or 0):
                    lines[line] = ""
        return {name: _text(node, lines) for name, node in self.nodes.items()}

    @cached_property
    def imports(self) -> dict[str, Place]:
        """What its names import, anywhere in it."""
        return dict(_imported(self._parts))

    @cached_property
    def _parts(self) -> list[Any]:
        return list(ast.walk(ast.parse(self.text)))

    def named(self, name: str) -> list[Place]:
        """What the definition `name` names: the module's own ("" for the module), and what it imports."""
        if name not in self._named:
            self._named[name] = list(self._names(self.nodes[name]))
        return self._named[name]

    def _names(self, definition: ast.stmt) -> Iterator[Place]:
        for part in ast.walk(definition):
            if isinstance(part, ast.Name) and part.id in self.nodes:
                yield "", part.id
            elif isinstance(part, ast.Name) and part.id in self.imports:
                yield self.imports[part.id]
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in self.imports:
                yield ".".join(filter(None, self.imports[part.value.id])), part.attr


Sources = Mapping[str, Module]


def age(record: Any, newest: Mapping[str, str], package: Path = PACKAGE) -> Age:
    """That of a record, beside the sha256 of the newest data of each name, and the package as it lies on disk."""
    name, made = record.data["name"], record.data["sha256"]
    if newest.get(name, made) != made:
        return Age("stale", f"it was made of {name} {made[:10]}, newer evidence of {newest[name][:10]}")
    roots, commit = tuple(entrances(record.config)), record.code.get("commit")
    if record.code["sha256"] == _checksum(package) or record.code.get("decides") == decides(roots, package):
        return FRESH
    clean = commit if commit and not record.code.get("dirty") else None
    before = _deciding(clean, roots, package) if clean else None
    if before is None and "decides" in record.code:
        return Age("stale", "what decides it has changed since it was made")
    if before is None:
        lacks = f"git has no commit {clean[:10]} here" if clean else "it names no clean commit"
        return Age("unknown", f"whether its code is that of today is not known: {lacks}", lost=bool(clean))
    return _compared(before, _deciding(None, roots, package) or {}, str(clean))


def _compared(before: Mapping[str, str], after: Mapping[str, str], commit: str) -> Age:
    changed = differing(before, after)
    if not changed:
        return FRESH
    named = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    count = "1 definition" if len(changed) == 1 else f"{len(changed)} definitions"
    return Age("stale", f"{count} of what decides it changed since {commit[:10]} ({named})")


def decides(roots: Iterable[str], package: Path = PACKAGE) -> str:
    """The sha256 over all that these functions reach, for a record to carry."""
    reached = _deciding(None, tuple(roots), package) or {}
    return sha256("\0".join(sorted(reached.values())).encode()).hexdigest()


_checksum = lru_cache(maxsize=4)(checksum)  # of the package when it is first asked for


@lru_cache(maxsize=1024)  # many records have the same commit and name the same functions
def _deciding(commit: str | None, roots: tuple[str, ...], package: Path) -> dict[str, str] | None:
    sources = on_disk(package) if commit is None else at_commit(commit, package)
    return None if sources is None else deciding(sources, roots)


def aged(records: Sequence[Any], package: Path = PACKAGE) -> Callable[[Any], Age]:
    """What tells the age of each of these records."""
    latest = newest(records)
    return lambda record: age(record, latest, package)


def newest(records: Iterable[Any]) -> dict[str, str]:
    """The sha256 of each data set, by name, in the newest of these records."""
    return {record.data["name"]: record.data["sha256"] for record in sorted(records, key=lambda each: each.created)}


def entrances(config: Mapping[str, Any]) -> list[str]:
    """The functions that decide a case: those that it names, and the procedure."""
    return [ENTRANCE, *(config[role]["use"] for role in ROLES if config.get(role))]


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names of what is not in both with the same text, wherever it lies."""
    gone = set(before.values()) ^ set(after.values())
    return sorted({name for side in (before, after) for name, text in side.items() if text in gone})


def deciding(sources: Sources, roots: Iterable[str]) -> dict[str, str]:
    """The text of each definition that the functions `roots` ("package.module:function") reach, by module and name."""
    waiting: list[Place] = [(module, name.partition(".")[0]) for module, _, name in (r.partition(":") for r in roots)]
    found: dict[str, str] = {}
    while waiting:
        place = module, name = waiting.pop()
        whole = f"{module.removeprefix('hap.').removeprefix('harness.')}.{name}"
        if module in SILENT or module not in sources or whole in found or name not in sources[module].nodes:
            waiting += _handed_on(sources, place)
            continue
        found[whole] = sources[module].texts[name]
        waiting += ((other or module, each) for other, each in sources[module].named(name))
    return found


def _handed_on(sources: Sources, place: Place) -> Iterator[Place]:
    """Where a name lies that a module of the package has from another; lazily, as `hap` does, from any of the core."""
    module, name = place
    if module not in sources or module in SILENT or name in sources[module].nodes:
        return
    if name in sources[module].imports:
        yield sources[module].imports[name]
    elif module == "hap":
        core = ((other, each) for other, each in sources.items() if not other.startswith("hap.harness"))
        yield from ((other, name) for other, each in core if name in each.nodes)


@lru_cache(maxsize=4)
def on_disk(package: Path = PACKAGE) -> Sources:
    """The package as it lies there when it is first asked for."""
    files = sorted(package.rglob("*.py"))
    return {_module(file.relative_to(package.parent)): parsed(file.read_text("utf-8")) for file in files}


@lru_cache(maxsize=32)
def at_commit(commit: str, package: Path = PACKAGE) -> Sources | None:
    """The package as it was; None where git does not have it."""
    if not re.fullmatch("[0-9a-f]{7,64}", commit):  # what a record says is no option of git
        return None
    command = ["git", "-C", str(package), "archive", "--format=tar", commit, "."]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive if member.name.endswith(".py")]
        texts = [(_module(Path(package.name, name)), file.read().decode()) for name, file in files if file is not None]
    return {module: parsed(text) for module, text in sorted(texts)}


def _module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


@lru_cache(maxsize=4096)  # of most files the text is the same on disk and at several commits
def parsed(text: str) -> Module:
    """A module from its text."""
    return Module(text)


def _text(node: ast.stmt, lines: list[str]) -> str:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    return "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno] if line.strip())


def _without_comments(text: str) -> list[str]:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return lines


def _defined(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = (part for target in targets for part in ast.walk(target))
            yield from ((part.id, node) for part in parts if isinstance(part, ast.Name))


def _imported(parts: Iterable[ast.AST]) -> Iterator[tuple[str, Place]]:
    for node in parts:
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, (whole, "")
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)
