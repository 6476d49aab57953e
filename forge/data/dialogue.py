"""Conversations that stand in one text with the speakers' names in it, as Guanaco and HH-RLHF have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from forge.data.conversation import Conversation, Place, Turn
from forge.data.turns import BadRowError, Notes, finished, text_of

_DIALOGUE = re.compile(r"(?:(?:^|\n)\s*(?=[HAS])|### ?)(Human|Assistant|System):[ \t]?")


def of_text(text: str, column: str, place: Place, notes: Notes, before: Sequence[Turn] = ()) -> Conversation:
    """The conversation in a text as Guanaco has it, after these turns; or any other text, learned whole."""
    if "### Human:" in text and "### Assistant:" in text:
        notes.counts["texts of ### Human: and ### Assistant:, read as conversations"] += 1
        return Conversation(finished([*before, *dialogue(text, column)], notes), place)
    return Conversation((), place, text=text)


def dialogue(text: str, place: str) -> Iterator[Turn]:
    """The turns of a text that marks them `Human:` and `Assistant:`, as Guanaco and HH-RLHF do."""
    pieces = _DIALOGUE.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRowError(
            "is one text without Human: and Assistant:, and there is no prompt beside it", place
        )
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        yield Turn(roles[speaker], text_of(said.strip(), place))
