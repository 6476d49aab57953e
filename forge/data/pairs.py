"""Preference pairs to ids and loss mask: each answer as a row of its own, after the same prompt.

Not covered: single answers with a label (KTO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from forge.data.conversation import Conversation
from forge.data.problems import BadRows, refuse
from forge.data.prompt_format import PromptFormat
from forge.data.tokens import Encoded, encode_all


def encode_pairs(
    conversations: Sequence[Conversation], form: PromptFormat, bad: BadRows | None = None
) -> list[Encoded]:
    """Encode preference pairs: the last answer carries loss, in the chosen row and in the rejected one.

    Raises as `encode_all`; of a row that is left out the whole pair is.
    """
    chosen = encode_all(conversations, form, supervise="last", bad=bad)
    asked = [replace(row.conversation, turns=row.conversation.rejected) for row in chosen]
    rejected = {id(row.conversation): row for row in encode_all(asked, form, supervise="last", bad=bad)}
    pairs = [
        replace(row, rejected=rejected[id(other)])
        for row, other in zip(chosen, asked, strict=True)
        if id(other) in rejected
    ]
    problems = [
        row.conversation.place.problem("the template writes the prompt of the two answers differently")
        for row in pairs
        if row.rejected and row.prompt != row.rejected.prompt
    ]
    refuse(problems, f"{len(problems)} of {len(pairs)} pairs cannot be compared", "leave these rows out")
    return pairs
