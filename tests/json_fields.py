"""What docs/json.md says of the object that a command prints with `--json`, held against one that it did."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

STAGES = ("train", "validate", "evaluate", "export", "verify", "modelfile", "deploy")
"""Commands that run a recipe up to a stage, and print its facts too."""
_ROW = re.compile(r"^\| `(?P<command>[a-z]+)` \| (?P<fields>.+) \|$", re.MULTILINE)
_FIELD = re.compile(r"`(?P<name>[a-z_0-9]+)(?:: \[?{(?P<parts>[a-z_0-9, ]+)}\]?)?`")

Documented = Mapping[str, frozenset[str]]
"""A field -> what it holds, where that is said."""


@functools.cache
def documented() -> Mapping[str, Documented]:
    """Of each command its fields; those of the certificate stand under `certificate`."""
    text = (Path(__file__).parent.parent / "docs" / "json.md").read_text(encoding="utf-8")
    return {
        row["command"]: {
            field["name"]: frozenset((field["parts"] or "").split(", ")) - {""}
            for field in _FIELD.finditer(re.sub(r"\([^()]*\)", "", row["fields"]))
        }
        for row in _ROW.finditer(text)
    }


def fields_of(arguments: Sequence[str]) -> Documented | None:
    """What the command may print; None where the facts of a stage come beside it."""
    command = arguments[0]
    is_recipe = any(argument.endswith((".yaml", ".yml")) for argument in arguments[1:])
    if is_recipe and command in STAGES:
        return None
    if command == "verify":
        return documented()["certificate"]
    if (command == "modelfile" and not is_recipe) or command == "template":
        return {**documented()[command], **documented()["template"]}
    return documented()[command]


def check_fields(arguments: Sequence[str], shown: Mapping[str, object]) -> None:
    """Everything that was printed stands in the document."""
    known = fields_of(arguments)
    if known is None:
        return
    if "error" in shown:  # that of a certificate has the certificate
        known = {**documented()["certificate"], **known}
    assert shown.keys() - {"error"} <= known.keys(), (arguments, shown.keys() - known.keys())
    for name, parts in known.items():
        for value in _objects(shown.get(name)) if parts else ():
            assert value.keys() <= parts, (arguments, name, value.keys() - parts)


def _objects(value: object) -> list[Mapping[str, object]]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]
