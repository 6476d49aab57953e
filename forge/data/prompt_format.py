"""What the encoding of rows needs of a model: its template, its tokenizer, the token that ends a turn."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forge.chat.template import ChatTemplate
from forge.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SENTINEL = "Lorem ipsum"


@dataclass(frozen=True)
class PromptFormat:
    """What encoding needs: the template, the tokenizer, and the token that ends a turn."""

    template: ChatTemplate
    tokenizer: Tokenizer
    end_of_turn: str
    end_of_turn_id: int
    _ends: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def bos_id(self) -> int | None:
        bos = self.template.special_tokens.get("bos_token")
        number: int | None = self.tokenizer.token_to_id(bos) if bos else None
        return number

    def ids(self, text: str) -> list[int]:
        """Ids of `text` as it is: the template has written every special token (pitfall 48)."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Of the tokens that part a text before anything else does."""
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    def ids_of_end(self, text: str) -> list[int]:
        """Those of the end of a prompt; few are ever different."""
        if text not in self._ends:
            self._ends[text] = self.ids(text)
        return self._ends[text]


def prompt_format(template: ChatTemplate, tokenizer: Tokenizer) -> PromptFormat:
    """Find the end-of-turn token by rendering a sentinel answer.

    Raises `DataError` when the template closes an answer with no special token: a model trained
    so would never stop (pitfall 28).
    """
    question = {"role": "user", "content": "dolor sit amet"}
    text = template.render([question, {"role": "assistant", "content": _SENTINEL}])
    _, found, after = text.partition(_SENTINEL)
    if not found:
        raise DataError(
            "the chat template does not show the assistant's answer",
            hint="look at chat_template.jinja in the base's directory",
        )
    special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    at_start = after.lstrip()
    matching = [token for token in special if at_start.startswith(token)]
    if not matching:
        raise DataError(
            f"the chat template ends an answer with {after[:40]!r}, which is not a special token: "
            "a model trained on it would not learn to stop",
            hint="use the template of the base's instruct version, or end the turn with the EOS token",
        )
    end = max(matching, key=len)
    return PromptFormat(template, tokenizer, end, special[end])
