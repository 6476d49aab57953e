"""What a template writes of rows: whole, as a server prompts each answer, and as each answer ends.

Not covered: whether it writes what the row holds (`shown`), ids (`tokens`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from forge.chat.render_process import Prompts
from forge.chat.template import ChatTemplate
from forge.codec import Json
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
    own: Mapping[str, Json] = field(default_factory=dict)
    """Variables of the row's own by which the template writes it otherwise."""

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
    for own, numbers in _by_variables(batch, form.template):
        its = replace(form.template, variables={**form.template.variables, **own})
        rows = [batch[number].conversation for number in numbers]
        again = [
            Prompts(its.as_read(row.messages()), row.tools, batch[number].cuts)
            for row, number in zip(rows, numbers, strict=True)
        ]
        for number, written in zip(numbers, its.render_all(again), strict=True):
            if [*map(str, written)] != [*map(str, made[number].cuts.values())]:
                made[number] = replace(made[number], own=own)
    return made


def _by_variables(
    batch: Sequence[Asked], template: ChatTemplate
) -> Iterator[tuple[Mapping[str, Json], Sequence[int]]]:
    """Variables that rows have otherwise than the model is served, each with the rows' numbers."""
    groups: dict[str, tuple[Mapping[str, Json], list[int]]] = {}
    for number, row in enumerate(batch):
        variables = row.conversation.variables
        own = (
            {name: value for name, value in variables.values.items() if name in template.names}
            if variables
            else {}
        )
        if any(name not in template.variables or template.variables[name] != own[name] for name in own):
            groups.setdefault(json.dumps(own, sort_keys=True), (own, []))[1].append(number)
    yield from groups.values()
