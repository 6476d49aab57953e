"""Preference pairs to ids and loss mask: each answer as a row of its own, after the same prompt.

Single answers with a label, good or bad, are rows among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from forge.data.conversation import Conversation
from forge.data.problems import BadRows, refuse
from forge.data.prompt_format import PromptFormat
from forge.data.tokens import Encoded, encode_each
from forge.errors import Problem


def encode_pairs(
    conversations: Iterable[Conversation], form: PromptFormat, bad: BadRows | None = None
) -> Iterator[tuple[Conversation, Sequence[Encoded]]]:
    """Encode preference pairs: the last answer carries loss, in the chosen row and in the rejected one.

    An answer that is good or bad by itself becomes its own row. Raises as `encode_each`; of a row that is
    left out the whole pair is.
    """
    problems: list[Problem] = []
    count = 0
    chosen: Encoded | None = None
    for conversation, (row,) in encode_each(_answers(conversations), form, supervise="last", bad=bad):
        if conversation.rejected:
            chosen = row
        elif conversation.desirable is not None:
            yield conversation, [row]
        elif chosen and chosen.conversation.rejected is conversation.turns:
            count += 1
            if chosen.prompt == row.prompt:
                yield chosen.conversation, [replace(chosen, rejected=row)]
            else:
                words = "the template writes the prompt of the two answers differently"
                problems.append(conversation.place.problem(words))
    refuse(problems, f"{len(problems)} of {count} pairs cannot be compared", "leave these rows out")


def _answers(pairs: Iterable[Conversation]) -> Iterator[Conversation]:
    """Each pair as two conversations: with the chosen answer, then with the rejected one."""
    for pair in pairs:
        yield pair
        if pair.rejected:
            yield replace(pair, turns=pair.rejected, rejected=())
