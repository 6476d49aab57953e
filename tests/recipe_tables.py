"""The recipe's field table in Markdown, made from the schema.

Not covered: rules that hold between fields; a recipe that breaks one is refused.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.fields import FieldInfo

from forge.recipe.explain import choices
from forge.recipe.fields import name_of, sections
from forge.recipe.schema import Adopted, Section


def describe_recipe() -> str:
    """Every field with its default and meaning, one table a section, in the schema's order."""
    parts = [_table(path, kind) for path, kinds in sections().items() for kind in kinds]
    return "\n\n".join(parts) + "\n"


def _title(path: str, kind: type[Section]) -> str:
    name = "The recipe" if not path else f"`{path.replace('.*', '[]')}`"
    if kind is Adopted:
        name = "`train: {from: ADAPTER}`"
    about = (kind.__doc__ or "").strip().splitlines()[0]
    return f"### {name}\n\n{about}"


def _table(path: str, kind: type[Section]) -> str:
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for attribute, field in kind.model_fields.items():
        meaning = f"{field.description or ''}{_choices(field)}".replace("|", "\\|")
        rows.append(f"| `{name_of(attribute, field)}` | {_default(field)} | {meaning} |")
    return f"{_title(path, kind)}\n\n" + "\n".join(rows)


def _choices(field: FieldInfo) -> str:
    words = [word for word in choices(field.annotation) if isinstance(word, str)]
    return f" ({' · '.join(f'`{word}`' for word in words)})" if len(words) > 2 else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default: Any = field.default
    if default is None:
        return "unset"
    if isinstance(default, Section):
        return "see below"
    if default in ((), {}):
        return "empty"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"
