"""Requests of an export as the tests write them: paths as text, and what goes into the file as `settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from forge.codec import from_plain, to_plain
from forge.export.request import ExportRequest, Ingredients


def ingredients(settings: Mapping[str, Any], **files: Any) -> Ingredients:
    """Of the settings what says how the model is made."""
    named = {field.name for field in fields(Ingredients)}
    return from_plain(Ingredients, {**files, **{name: settings[name] for name in named & settings.keys()}})


def export_request(
    *, out: str, settings: Mapping[str, Any], data: str | None = None, **files: Any
) -> ExportRequest:
    """`files`: base, adapter, tokenizer, chat_template, converters."""
    named = {field.name for field in fields(Ingredients)}
    rest = {name: value for name, value in settings.items() if name not in named}
    return from_plain(
        ExportRequest, {"model": to_plain(ingredients(settings, **files)), "out": out, "data": data, **rest}
    )


def export_here(**arguments: Any) -> dict[str, Any]:
    """Export in this process; the facts as plain JSON."""
    from forge.export.run import export_gguf

    facts: dict[str, Any] = to_plain(export_gguf(export_request(**arguments)))
    return facts
