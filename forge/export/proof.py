"""Proof that the GGUF's tokenizer is the model's: the same ids for every prompt that is tried.

Runs in a worker, on a GGUF that holds only the vocabulary, before anything large is written
(pitfalls 48, 49; silent wrongs 3, 4, 13). The reference is the `tokenizers` library on
tokenizer.json, which is what transformers runs.

What is compared are *rendered prompts*: the template with hard texts as its contents, and the user's
own conversations. Both sides get them as they do in earnest: training encodes the text as it is,
llama-server takes a BOS off the text when the GGUF adds one, then adds it, and reads special
tokens. Texts outside a template are compared only where there is none: no server ever sees them, and
SentencePiece treats the start of a text apart from the text after a special token, so that
equality there would neither follow nor be needed.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from forge.chat.difference import first_difference
from forge.chat.template import ChatTemplate, Message
from forge.errors import CheckError, DataError, Problem
from forge.export.types import last_words, listening
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECES = (
    "Hello", " world", "  two", "\n", "\n\n", "\t", " ", "'s", "'LL", "don't", "I'm", "1", "42", "3.14159",
    "1234567890", "ü", "Straße", "naïve", "日本語", "中文", "한국어", "العربية", "עברית", "Привет", "🙂", "👩‍👩‍👧", "e\u0301",
    "\u00a0", "\u200b", "\u2003", "…", "—", "“quoted”", "(x)", "[y]", "{{ z }}", "{% if %}", "</s>", "<s>", "a_b",
    "CamelCase", "snake_case", "https://example.org/?q=1&r=2", "foo@bar.baz", "C++", "#!", "$5.00", "50%", "a\r\nb",
    "    indent", "\u3000", "ﬁ", "½", "²", "Ⅷ", "\u0000", "\ufeff", "!!!", "...", "?!", "--", "__init__", "0x1F", "1e-9",
)  # fmt: skip


def test_strings(count: int = 300, seed: int = 0) -> list[str]:
    """Every piece by itself, then seeded random joins of two to six pieces."""
    draw = random.Random(seed)
    joins = ["".join(draw.choices(_PIECES, k=draw.randint(2, 6))) for _ in range(count - len(_PIECES))]
    return [*_PIECES, *joins]


@dataclass(frozen=True)
class ComparedIds:
    """How many texts gave the same ids, and for which kind of text that is not claimed."""

    texts: int
    limits: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """`text` is what is encoded; `content` what somebody wrote of it."""

    text: str
    content: str


def cases(
    template: ChatTemplate | None, texts: Sequence[str], conversations: Sequence[Sequence[Message]]
) -> list[Case]:
    """Each text as a user's and an assistant's message, each conversation, rendered; else as they are.

    What the template refuses is left out.
    """
    if template is None:
        contents = [str(message["content"]) for messages in conversations for message in messages]
        return [Case(text, text) for text in (*texts, *contents)]
    cases = []
    for messages in (*map(_dialogue, texts), *conversations):
        content = "\n".join(str(message["content"]) for message in messages)
        asks = messages[-1]["role"] != "assistant"
        try:
            cases.append(Case(template.render(messages, add_generation_prompt=asks), content))
        except DataError:
            continue
    return cases


def _dialogue(text: str) -> list[Message]:
    return [{"role": role, "content": text} for role in ("user", "assistant", "user")]


def compare_ids(
    directory: Path, vocabulary: Path, tried: Sequence[Case], *, end_of_turn: int | None = None
) -> ComparedIds:
    """Check that the tokenizer in `directory` and the GGUF `vocabulary` give equal ids for every case.

    Raises `CheckError` with the first that differ, or, where there is an `end_of_turn`, when llama.cpp would
    not stop there, or would at a token of plain text.
    Left out, and named as limits: text with NUL (llama.cpp's interface takes C strings); text that
    the tokenizer composes first (Unicode NFC, as Qwen's does; llama.cpp does not); text with words that
    only llama.cpp takes for special tokens (`</s>` with Qwen's vocabulary); white space outside
    ASCII after a token that strips what follows it (Phi-3).
    """
    reference = open_tokenizer(directory)
    served = ServedVocabulary(vocabulary)
    try:
        kept, limits = _without_limits(tried, directory / "tokenizer.json", reference, served)
        compared = [_difference(case, reference, served) for case in kept]
        ending = {} if end_of_turn is None else served.ending()
    finally:
        served.close()
    problems = list(filter(None, compared))
    if not compared:
        raise CheckError("no prompt could be compared: the chat template refuses all that were tried")
    if problems:
        failure = CheckError(
            f"the GGUF's tokenizer gives other ids for {len(problems)} of {len(compared)} texts: "
            "the model would be served other tokens than it was trained on",
            hint="llama.cpp has no pre-tokenizer equal to this tokenizer's; choose a base that it knows",
            problems=problems[:5],
        )
        failure.fields = {"compared": len(compared), "different": len(problems)}
        raise failure
    if end_of_turn is not None and end_of_turn not in ending:
        raise CheckError(f"llama.cpp does not take token {end_of_turn} for the end of a reply")
    ends = {end_of_turn, *read_tokenizer(directory).eos_ids, *reference.get_added_tokens_decoder()}
    wrong = [token for token, is_control in ending.items() if token not in ends and not is_control]
    if words := [repr(reference.id_to_token(token)) for token in wrong]:
        raise CheckError(
            f"llama.cpp would end an answer at {', '.join(words[:3])}, in the middle of a text",
            hint="config.json or generation_config.json names that token as an end: compare it with the hub's",
        )
    return ComparedIds(len(compared), limits)


def _difference(case: Case, reference: Tokenizer, served: ServedVocabulary) -> Problem | None:
    expected: list[int] = reference.encode(case.text, add_special_tokens=False).ids
    ids = served.ids(case.text)
    if ids == expected:
        return None
    at = first_difference(expected, ids)
    here = slice(max(0, at - 2), at + 6)
    return Problem(
        f"trained on {expected[here]}, served {ids[here]} (from token {here.start})",
        repr(case.content[:60]),
    )


class ServedVocabulary:
    """llama.cpp with the vocabulary, used as llama-server uses it."""

    def __init__(self, vocabulary: Path) -> None:
        import llama_cpp
        from llama_cpp._internals import LlamaModel

        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        with listening() as printed:
            try:
                # Not `Llama`, which compiles the file's chat template, and fails on a broken one.
                self._model = LlamaModel(path_model=str(vocabulary), params=parameters, verbose=False)
            except ValueError as error:
                raise CheckError(
                    f"llama.cpp cannot load the model's vocabulary: {last_words(printed)}",
                    hint="of somebody's GGUF: forge repair writes a copy with the base's metadata",
                ) from error
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model.model)
        bos = llama_cpp.llama_vocab_bos(self._vocabulary)
        adds = llama_cpp.llama_vocab_get_add_bos(self._vocabulary)
        self._bos = self._text(bos) if adds and bos >= 0 else ""

    def ids(self, text: str) -> list[int]:
        stripped = text.removeprefix(self._bos) if self._bos else text
        ids: list[int] = self._model.tokenize(stripped.encode(), add_bos=True, special=True)
        return ids

    def _text(self, token: int) -> str:
        import llama_cpp

        raw: bytes = llama_cpp.llama_vocab_get_text(self._vocabulary, token)
        return raw.decode(errors="replace")

    def special(self) -> dict[int, str]:
        """Every text that is read as one token wherever it stands, by its token."""
        import llama_cpp

        flags = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        flags |= llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        count = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        attributes = (llama_cpp.llama_vocab_get_attr(self._vocabulary, token) for token in range(count))
        return {token: self._text(token) for token, attribute in enumerate(attributes) if attribute & flags}

    def ends_reply(self, token: int) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    def ending(self) -> dict[int, bool]:
        """Every token at which llama.cpp ends a reply, and whether it takes that for a control token.

        It does of each that it knows by its text, such as `</s>`, which Qwen's vocabulary has as a word; not
        of a word that the file's ids name, or that it falls back to where they name none.
        """
        import llama_cpp

        return {
            token: bool(llama_cpp.llama_vocab_is_control(self._vocabulary, token))
            for token in range(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
            if self.ends_reply(token)
        }

    def __enter__(self) -> ServedVocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._model.close()


@dataclass(frozen=True)
class _Limit:
    """A kind of text for which equal ids are not claimed."""

    name: str
    applies: Callable[[str], bool] = field(repr=False)


def _without_limits(
    tried: Sequence[Case], tokenizer_json: Path, reference: Tokenizer, served: ServedVocabulary
) -> tuple[list[Case], tuple[str, ...]]:
    kept = [case for case in tried if case.text and "\0" not in case.text]
    left_out = []
    for limit in _limits(tokenizer_json, reference, served):
        left = [case for case in kept if not limit.applies(case.content)]
        if len(left) < len(kept):
            left_out.append(f"{limit.name} (left out: {len(kept) - len(left)} of {len(tried)})")
        kept = left
    return kept, tuple(left_out)


def _limits(tokenizer_json: Path, reference: Tokenizer, served: ServedVocabulary) -> Iterator[_Limit]:
    added_by_id = reference.get_added_tokens_decoder()
    added = added_by_id.values()
    known = {token.content for token in added}
    # Gemma's runs of spaces are added tokens in both, and written otherwise in each.
    foreign = sorted(
        {text for token, text in served.special().items() if token not in added_by_id} - known - {""}
    )
    if foreign:
        shown = ", ".join(foreign[:3])
        pattern = re.compile("|".join(map(re.escape, foreign)))
        yield _Limit(f"text with {shown}, which llama.cpp reads as a special token", _finds(pattern))
    if _composes(tokenizer_json):
        yield _Limit(
            "text that is not in Unicode normal form C",
            lambda content: not unicodedata.is_normalized("NFC", content),
        )
    if any(token.rstrip for token in added):
        before = "|".join(["^", *(re.escape(token.content) for token in added)])
        pattern = re.compile(rf"(?:{before})[ \t\n\r\f\v]*[^\S \t\n\r\f\v]", re.MULTILINE)
        yield _Limit("a message that begins with white space other than ASCII's", _finds(pattern))


def _finds(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda content: pattern.search(content) is not None


def _composes(tokenizer_json: Path) -> bool:
    normalizer = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("normalizer") or {}
    return "NFC" in {step.get("type") for step in normalizer.get("normalizers", [normalizer])}
