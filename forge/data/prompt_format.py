"""What the encoding of rows needs of a model: its template, its tokenizer, the token that ends a turn."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forge.chat.template import ChatTemplate
from forge.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SENTINEL = "Lorem ipsum"
_TAIL = 64  # characters of a prompt in which its last added token is looked for
_MOST_ENDS = 4096
# Marks that rows write out and mean as the tokens that they are, even where a tokenizer calls them special.
_MEANT = re.compile(r"</?(think|tool_call|tool_response)>")


@dataclass(frozen=True)
class PromptFormat:
    """What encoding needs: the template, the tokenizer, and the token that ends a turn."""

    template: ChatTemplate
    tokenizer: Tokenizer
    end_of_turn: str
    end_of_turn_id: int
    eos_ids: Sequence[int] = ()
    """What the base's files say that ends a reply."""
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

    def ids_of_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Those of many texts, on every core; without the places of their letters, which take time."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else ()
        return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def added(self) -> tuple[Mapping[str, int], re.Pattern[str]]:
        """The tokens that part a text before anything else does, with a pattern that matches any of them."""
        added = {token.content: at for at, token in self.tokenizer.get_added_tokens_decoder().items()}
        return added, re.compile("|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))))

    @functools.cached_property
    def control(self) -> Mapping[int, str]:
        """The control tokens: those of the added ones that are special and not meant where rows have them."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {
            number: token.content
            for number, token in added.items()
            if token.special and token.content and not _MEANT.fullmatch(token.content)
        }

    @functools.cached_property
    def structure(self) -> frozenset[str]:
        """The control tokens that the template writes, or that begin or end a text."""
        source, bos = self.template.source, self.template.special_tokens.get("bos_token")
        used = {token for token in self.control.values() if token in source or token == bos}
        return frozenset({*used, *self.ends})

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """What ends a reply, as texts: the end of turn, and every EOS."""
        eos = [self.template.special_tokens.get("eos_token"), *map(self.tokenizer.id_to_token, self.eos_ids)]
        return tuple(dict.fromkeys((self.end_of_turn, *(text for text in eos if text))))

    @functools.cached_property
    def _control_pattern(self) -> tuple[frozenset[str], re.Pattern[str]]:
        tokens = sorted({*self.control.values(), *self.structure}, key=len, reverse=True)
        return frozenset(token[:1] for token in tokens), re.compile("|".join(map(re.escape, tokens)))

    def controls_in(self, text: str) -> list[str]:
        """The control tokens in `text`, in order."""
        begins, pattern = self._control_pattern
        for letter in begins:  # nearly every text has none, and to look for a letter is far faster
            if letter in text:
                return pattern.findall(text)
        return []

    @functools.cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        plain = type(self.tokenizer).from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    def plain_ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text` with its control tokens as the words that they are written with."""
        ids: list[int] = self._plain_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def ids_of_end(self, text: str) -> list[int]:
        """Those of the end of a prompt; with most templates few are ever different."""
        if text not in self._ends:
            if len(self._ends) == _MOST_ENDS:
                self._ends.clear()
            self._ends[text] = self.ids(text)
        return self._ends[text]


class EncodedText:
    """A text and its ids, asked where the ids of its beginnings end."""

    def __init__(self, text: str, ids: list[int], form: PromptFormat) -> None:
        self.text, self.ids = text, ids
        self._form = form
        self._places: dict[str, list[int]] = {}

    def tokens_of(self, prompt: str) -> int | None:
        """How many of the ids are those of `prompt`, with which the text begins; None where they begin
        otherwise.

        An added token parts what stands before and behind it, so the ids from the last one on decide.
        """
        _, pattern = self._form.added
        marks = list(pattern.finditer(prompt, max(0, len(prompt) - _TAIL)))
        if marks:
            mark, begins = marks[-1].group(), marks[-1].start()
            if places := self._places_of(mark):
                end = self._form.ids_of_end(prompt[begins:])
                at = places[self.text.count(mark, 0, begins)]
                return at + len(end) if self.ids[at : at + len(end)] == end else None
        alone = self._form.ids(prompt)
        return len(alone) if self.ids[: len(alone)] == alone else None

    def _places_of(self, mark: str) -> list[int]:
        """Where an added token stands among the ids; empty where the text has it in other ways too."""
        if mark not in self._places:
            number, at = self._form.added[0][mark], -1
            count = self.ids.count(number)
            places = [at := self.ids.index(number, at + 1) for _ in range(count)]
            self._places[mark] = places if count == self.text.count(mark) else []
        return self._places[mark]


def prompt_format(template: ChatTemplate, tokenizer: Tokenizer, eos_ids: Sequence[int] = ()) -> PromptFormat:
    """Find the end-of-turn token by rendering a sentinel answer.

    Raises `DataError` when the template closes an answer with no special token: a model trained
    so would never stop (pitfall 28).
    """
    question = {"role": "user", "content": "dolor sit amet"}
    text = template.render([question, {"role": "assistant", "content": _SENTINEL}])
    _, answer, after = text.partition(_SENTINEL)
    if not answer:
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
    return PromptFormat(template, tokenizer, end, special[end], eos_ids)
