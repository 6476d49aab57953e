"""The rules of the house, checked on the sources with `ast`: who may import what, and the rest of DESIGN.md.

Each rule takes sources as text, so that `test_layers` can show that it fails on a bad one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_EVERYONE = {"errors", "report", "codec", "files"}
_BELOW_RESOLVE = {
    "process", "worker", "recipe", "store", "pipeline", "model", "chat", "data", "adapter", "train",
    "export", "verify", "tools", "serve",
}  # fmt: skip
# room -> the rooms that it may import, besides those that everyone may.
ARROWS: Mapping[str, set[str]] = {
    "errors": set(),
    "report": set(),
    "codec": set(),
    "files": set(),
    "process": set(),
    "diagnosis": set(),
    "worker": {"process"},
    "recipe": set(),
    "store": set(),
    "pipeline": {"recipe", "store"},
    "model": set(),
    "chat": {"model", "process"},
    "data": {"recipe", "chat", "model"},
    "adapter": {"model"},
    "train": {"model", "recipe", "data", "adapter", "process"},
    "export": {"model", "adapter", "chat", "tools", "process"},
    "verify": {"model", "adapter", "data", "chat", "export", "tools", "process"},
    "tools": {"process"},
    "serve": {"tools", "chat", "model", "process"},
    "runs": {"recipe", "store", "chat", "train"},
    "resolve": _BELOW_RESOLVE | {"runs"},
    "stages": _BELOW_RESOLVE | {"resolve", "runs"},
    "ship": _BELOW_RESOLVE | {"resolve", "runs", "stages"},
    "commands": _BELOW_RESOLVE | {"resolve", "runs", "stages", "ship", "diagnosis"},
    "cli": {"commands", "ship", "process", "diagnosis"},
    "api": {"commands", "ship", "serve", "recipe"},
    "__main__": {"cli"},
}
# Imported in worker code, inside functions, only.
HEAVY = {
    "torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "numpy", "gguf",
    "safetensors", "llama_cpp", "sentencepiece", "xllamacpp", "pyarrow",
}  # fmt: skip
# Loaded by every command, `forge --help` too.
_FIRST_LOADED = ("forge/__main__.py", "forge/cli/", "forge/errors.py", "forge/report.py", "forge/process.py")
_LIGHT = {"click", "forge"}
# The third is where the library tokenizers raises a bare Exception for a file that it cannot read.
_EDGES = {"forge/cli/main.py", "forge/worker.py", "forge/model/tokenizer_files.py"}
# Several modules have a function of this name, and each the same one.
PROTOCOLS = {
    "command": "a command of the command line, as `cli.main` loads it",
    "main": "what a program of its own begins with",
    "chat_request": "the dialects of servers: OpenAI's and Ollama's",
    "completion_request": "the same",
    "read_reply": "the same",
}
# Names that say nothing of what they hold.
EMPTY_NAMES = {"found", "one", "told", "said", "given"}
# The public names for scripts repeat what they call.
_FACADE = "forge/api.py"
# Guidance: what is longer is looked at, and what was cut only to fit is put together again.
MOST_LINES, MOST_IN_FUNCTION = 450, 80


@dataclass(frozen=True)
class Import:
    """One import: the whole dotted name, its line, whether it stands at the top of its module."""

    name: str
    line: int
    is_top: bool
    parts: tuple[str, ...] = ()
    """What is imported from the module `name`: a module of a room, maybe."""

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def faults(sources: Mapping[str, str]) -> list[str]:
    """Everything in `sources` (path from the root -> text) that breaks a rule: `path:line: what`."""
    found = []
    for path, text in sorted(sources.items()):
        tree = ast.parse(text, path)
        for line, said in _faults_of(PurePosixPath(path), text, tree):
            found.append(f"{path}:{line}: {said}")
    return found + list(circle_faults(sources)) + list(name_faults(sources))


def _faults_of(path: PurePosixPath, text: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for one in imports(tree):
        yield from ((one.line, said) for said in _import_faults(path, one))
    yield from _call_faults(path, tree)
    yield from _size_faults(path, text, tree)


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import that happens at run time, `if TYPE_CHECKING:` left out."""

    def walk(node: ast.AST, is_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, is_top)
            elif isinstance(child, ast.ImportFrom):
                parts = tuple(alias.name for alias in child.names)
                yield from (Import(name, child.lineno, is_top, parts) for name in _names(child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, False)
            else:
                yield from walk(child, is_top)

    return walk(tree, True)


def circle_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Files that import each other, at the top or inside a function, however long the way round.

    An import inside a function for the sake of speed (torch, httpx, a command's module) leads to files that
    do not lead back. One whose target reaches the importer stands there only to make a circle work.
    """
    edges = {path: dict(_files_imported(text, path, sources)) for path, text in sources.items()}
    for path in sorted(edges):
        for target, found in sorted(edges[path].items()):
            if path in _reached(target, edges):
                where = "" if found.is_top else " inside a function"
                yield f"{path}:{found.line}: imports {target}{where}, which leads back here"


def name_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Public classes and functions of one name in two files, and names that say nothing."""
    places: dict[str, list[str]] = {}
    for path, text in sorted(sources.items()):
        tree = ast.parse(text, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.arg in EMPTY_NAMES:
                yield f"{path}:{node.lineno}: {node.arg}: what does it hold?"
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES:
                yield f"{path}:{node.lineno}: {node.id}: what does it hold?"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                is_public = path != _FACADE and not node.name.startswith("_")
                places.setdefault(node.name, []).extend([f"{path}:{node.lineno}"] if is_public else [])
    for name, found in sorted(places.items()):
        if len(found) > 1 and name not in PROTOCOLS:
            yield f"{found[1]}: {name} is in {found[0]}, too"


def patch_faults(tests: Mapping[str, str], sources: Mapping[str, str]) -> Iterator[str]:
    """What `monkeypatch.setattr` replaces in a module of forge that has no such name."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    for path, text in sorted(tests.items()):
        tree = ast.parse(text, path)
        local = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not (patched := _patched(node, local)):
                continue
            module = max((name for name in modules if patched.startswith(f"{name}.")), key=len, default="")
            name = patched.removeprefix(f"{module}.").split(".")[0]
            if module and name not in _top_names(ast.parse(sources[modules[module]])):
                yield f"{path}:{node.lineno}: {module}.{name} is not there to patch"


def _patched(node: ast.AST, local: Mapping[str, str]) -> str:
    """The whole name of what a call of `setattr` replaces; empty for anything else."""
    match node:
        case ast.Call(func=ast.Attribute(attr="setattr"), args=[ast.Constant(value=str(name)), *_]):
            return name
        case ast.Call(
            func=ast.Attribute(attr="setattr"), args=[ast.Name(id=module), ast.Constant(value=str(name)), *_]
        ):
            return f"{local.get(module, module)}.{name}"
    return ""


def _top_names(tree: ast.AST) -> set[str]:
    """What a module binds, functions and classes by their names alone."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name):
            names |= {node.id} if isinstance(node.ctx, ast.Store) else set()
        else:
            names |= _top_names(node)
    return names


def _files_imported(text: str, path: str, sources: Mapping[str, str]) -> Iterator[tuple[str, Import]]:
    for found in imports(ast.parse(text, path)):
        for name in (found.name, *(f"{found.name}.{part}" for part in found.parts)):
            stem = name.replace(".", "/")
            for target in (f"{stem}.py", f"{stem}/__init__.py"):
                if target in sources and target != path and sources[target].strip():
                    yield target, found


def _reached(start: str, edges: Mapping[str, Mapping[str, Import]]) -> set[str]:
    seen, ahead = set(), [start]
    while ahead:
        path = ahead.pop()
        if path not in seen:
            seen.add(path)
            ahead.extend(edges[path])
    return seen


def _names(node: ast.ImportFrom) -> list[str]:
    if node.level:
        return ["." * node.level + (node.module or "")]
    module = node.module or ""
    # `from forge import report` names a room, `from forge.errors import ForgeError` is in one.
    return [f"forge.{alias.name}" for alias in node.names] if module == "forge" else [module]


def room_of(path: PurePosixPath) -> str:
    return path.parts[1] if len(path.parts) > 2 else path.stem


def _import_faults(path: PurePosixPath, one: Import) -> Iterator[str]:
    room = room_of(path)
    if one.name.startswith("."):
        yield "a relative import: the layers are read from whole names"
    if one.package == "forge" and room != "__init__":
        target = one.name.split(".")[1]
        if target != room and target not in ARROWS.get(room, set()) | _EVERYONE:
            yield f"{room} may not import {target}"
    if one.is_top and one.package in HEAVY:
        yield f"{one.package} is imported at the top of a module"
    if one.package == "subprocess" and str(path) != "forge/process.py":
        yield "subprocess outside process.py"
    loaded_first = str(path).startswith(_FIRST_LOADED)
    third_party = not one.name.startswith(".") and one.package not in _LIGHT | sys_names()
    if one.is_top and loaded_first and third_party:
        yield f"{one.package} is imported by every command"


def sys_names() -> set[str]:
    """The standard library's packages."""
    import sys

    return set(sys.stdlib_module_names)


def _call_faults(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and str(path) not in _EDGES:
            broad = node.type is None or "Exception" in {ast.unparse(one) for one in _types(node.type)}
            if broad:
                yield node.lineno, "catches every exception outside the edges"
        if isinstance(node, ast.Call) and str(path) != "forge/report.py":
            called = ast.unparse(node.func)
            if called == "print":
                yield node.lineno, "print outside report.py"
            if called in ("os.system", "os.popen"):
                yield node.lineno, f"{called}: programs are started by process.py"


def _types(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _size_faults(path: PurePosixPath, text: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    lines = len(text.splitlines())
    if lines > MOST_LINES:
        yield lines, f"{lines} lines, at most {MOST_LINES}"
    full = ("forge/__init__.py", "forge/stages/__init__.py")  # the public names; the pipeline
    if path.name == "__init__.py" and text.strip() and str(path) not in full:
        yield 1, "an __init__.py that is not empty"
    if path.name != "__init__.py" and not ast.get_docstring(tree) and "cli" not in path.parts:
        yield 1, "no docstring: what is covered, and what is not?"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_IN_FUNCTION:
                yield node.lineno, f"{node.name}: {length} lines, at most {MOST_IN_FUNCTION}"
