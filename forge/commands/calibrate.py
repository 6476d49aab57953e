"""An importance matrix, and a type within a budget, for `forge export` on files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import worker
from forge.chat.template import ChatTemplate
from forge.data.prepare import HELDOUT_FILE
from forge.data.tokens import prompt_format
from forge.model.config import Configuration
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer
from forge.recipe.quants import BUDGETED
from forge.resolve.rows import own_rows, plain_rows
from forge.stages.calibrate import failure_of, tell
from forge.verify.calibrate import IMPORTANCE_FILE


def calibrate_alone(
    arguments: dict[str, Any], data: Path, configuration: Configuration, max_kl: float | None, scratch: Path
) -> dict[str, Any]:
    """Put the importance matrix of `data`'s rows, and with `max_kl` the type, into `arguments` of an export.

    A tenth of the rows is measured on and left out of the matrix. Raises `CheckError` when no type is
    within the budget.
    """
    rows, measured = _rows(arguments, data, configuration, scratch)
    out = scratch / "calibration"
    out.mkdir(exist_ok=True)
    settings = arguments["settings"]
    given = ("base", "adapter", "tokenizer", "chat_template", "converters")
    facts = worker.call(
        "calibrate",
        {
            **{name: arguments[name] for name in given},
            "rows": str(rows),
            "measured_rows": str(measured),
            "types": [] if max_kl is None else list(BUDGETED),
            "max_kl": max_kl,
            "out": str(out),
            "settings": {**settings, "keep_merged": False},
        },
    )
    tell(facts)
    if failure := failure_of(facts):
        raise failure
    settings["importance"] = str(out / IMPORTANCE_FILE)
    settings["quant"] = facts.get("quant", settings["quant"])
    return facts


def _rows(
    arguments: Mapping[str, Any], data: Path, configuration: Configuration, scratch: Path
) -> tuple[Path, Path]:
    """The rows to calibrate on, and those to measure on: others, where there are enough."""
    files = read_tokenizer(Path(arguments["tokenizer"]))
    tokenizer = open_tokenizer(files.directory)
    if arguments["chat_template"] is None:
        rows = plain_rows(data, tokenizer, scratch)
        return rows, rows
    form = prompt_format(ChatTemplate(arguments["chat_template"], files.template_tokens), tokenizer)
    rows = own_rows(data, form, configuration.max_positions, scratch, heldout=0.1)
    held = scratch / HELDOUT_FILE
    return rows, held if held.stat().st_size else rows
