"""What a template writes of rows: whole, as a server prompts each answer, and as each answer ends.

Not covered: whether it writes what the row holds (`shown`), ids (`tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forge.chat.render_process import Prompts
from forge.data.conversation import Conversation
from forge.data.prompt_format import PromptFormat
from forge.errors import DataError


@dataclass(frozen=True)
class Asked:
    """A row before it is rendered: the answers that carry loss, those looked at; or why it cannot be used."""

    conversation: Conversation
    learned: Sequence[int] = ()
    looked_at: Sequence[int] = ()
    error: DataError | None = None

    @property
    def cuts(self) -> list[tuple[int, bool]]:
        """The whole row, and each answer as a server prompts it and as the template then writes it."""
        turns = len(self.conversation.turns)
        cuts = [(turns, False)] if self.looked_at else []
        for index in self.looked_at:
            cuts += [(index, True)] + ([(index + 1, False)] if index + 1 < turns else [])
        return cuts


@dataclass(frozen=True)
class Texts:
    """What the template writes of a row, for each of its cuts; and of the whole row without its tools."""

    cuts: Mapping[tuple[int, bool], str | DataError]
    without_tools: str

    def of(self, length: int, begins_answer: bool) -> str:
        """The text of the first messages; raises the template's refusal."""
        text = self.cuts[length, begins_answer]
        if isinstance(text, DataError):
            raise text
        return text


def rendered_all(batch: Sequence[Asked], form: PromptFormat) -> list[Texts]:
    prompts: list[Prompts] = []
    for row in batch:
        messages, tools = form.template.as_read(row.conversation.messages()), row.conversation.tools
        prompts.append(Prompts(messages, tools, row.cuts))
        prompts += [Prompts(messages, (), [(len(messages), False)])] if tools else []
    texts = iter(form.template.render_all(prompts))
    made: list[Texts] = []
    for row in batch:
        cuts = dict(zip(row.cuts, next(texts), strict=True))
        (without,) = next(texts) if row.conversation.tools else [""]
        made.append(Texts(cuts, without if isinstance(without, str) else ""))
    return made
