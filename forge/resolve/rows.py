"""Rows to verify on where there is no data stage: a file of the user's, or built-in ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forge.data.account import Prepared
from forge.data.conversations import to_conversations
from forge.data.files import read_rows
from forge.data.layout import Shape
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE, Settings, prepare
from forge.data.reading import Source
from forge.data.sources import locate
from forge.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from forge.data.prompt_format import PromptFormat
    from forge.resolve.resolved import Resolved
    from forge.store.artifacts import Artifact

_BUILTIN = "builtin:yoda_heldout"
_NEEDED = "--data takes rows of prompt and completion, or of messages, that fit the model's context"
_BUILTIN_SHAPE = Shape("prompt", {"prompt": "sentence", "completion": "translation"})


def certificate_rows(ship: Resolved, inputs: Mapping[str, Artifact], out: Path) -> Path:
    """What a ship is measured on: its held-out rows, else those of training, else built-in ones."""
    if "data" not in inputs:
        return builtin_rows(ship.prompt_format, ship.configuration.max_positions, out)
    data = inputs["data"]
    return data.path / measured_file(data)


def certificate_rows_are(inputs: Mapping[str, Artifact]) -> str:
    """What `certificate_rows` gives, in a word."""
    if "data" not in inputs:
        return "built-in"
    return "held-out" if measured_file(inputs["data"]) == HELDOUT_FILE else "training"


def measured_file(data: Artifact) -> str:
    """The file of held-out rows, where there are any; else that of the training rows."""
    return HELDOUT_FILE if data.read(Prepared).heldout_rows else TRAIN_FILE


def builtin_rows(form: PromptFormat, context: int | None, out: Path) -> Path:
    """Short English questions and answers in the template of `form`, as JSONL in `out`."""
    path = locate(_BUILTIN, Path())
    prepare(Settings([Source((path,), _BUILTIN_SHAPE)], 0), form, context, out)
    return out / TRAIN_FILE


def own_rows(data: Path, form: PromptFormat, context: int | None, out: Path, *, heldout: float = 0) -> Path:
    """The conversations in `data`, without the share `heldout` of them, which is in a file beside.

    Raises `DataError` with every row that cannot be used.
    """
    try:
        prepare(Settings([Source((data,))], heldout), form, context, out)
    except DataError as wrong:
        # What is said of a recipe's fields would mislead here.
        message = wrong.message.replace("data.source:", "--data:")
        raise DataError(message, hint=_NEEDED, problems=wrong.problems) from wrong
    return out / TRAIN_FILE


def plain_rows(data: Path | None, tokenizer: Tokenizer, out: Path) -> Path:
    """For a base without chat template: the messages' texts as they are, with the tokenizer's own BOS."""
    rows = read_rows(data or locate(_BUILTIN, Path()))
    target = out / TRAIN_FILE
    with target.open("w", encoding="utf-8") as stream:
        for conversation in to_conversations(rows, None if data else _BUILTIN_SHAPE).conversations:
            text = conversation.text or "\n".join(turn.content for turn in conversation.turns)
            row = {"input_ids": tokenizer.encode(text).ids, "messages": conversation.messages()}
            stream.write(json.dumps(row) + "\n")
    return target
