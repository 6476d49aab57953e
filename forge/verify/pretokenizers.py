"""Whether two names of a pre-tokenizer mean the same to a vocabulary. Runs in a worker.

llama.cpp has many names for one way to split a text, so another name than the converter's is no fault by
itself. Where a text is split matters only where a token would lie across; so every token's text is tried
beside others of its shape (digits by digits), apart and among any others, and of each shape one beside one
of each other.

Not covered: vocabularies that are not split before merging (SentencePiece).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from forge.export.proof import ServedVocabulary, test_strings
from forge.model.gguf_header import GgufHeader
from forge.model.tokenizer_files import open_tokenizer

_KEY = "tokenizer.ggml.pre"
_TOGETHER, _SHORT, _BY_CHANCE = 6, 4, 10_000
_REPEATED = re.compile(r"(..|\s)\1+")
_UNREADABLE = re.compile("[\0\ufffd]")


def other_pre_tokenizer(file: GgufHeader, own: GgufHeader, tokenizer: Path) -> str | None:
    """How the file's pre-tokenizer differs from that of llama.cpp's `own` header; None where it does not."""
    name, expected = (header.metadata.get(_KEY) for header in (file, own))
    if name == expected or file.metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    with ServedVocabulary(file.path) as served, ServedVocabulary(own.path) as known:
        text = next((text for text in _texts(tokenizer) if served.ids(text) != known.ids(text)), None)
    if text is None:
        return None
    called = "is missing" if name is None else f"is {name}"
    return f"{_KEY} {called}, the base's is {expected}, which reads {text[:40]!r} as other tokens"


def _texts(tokenizer: Path) -> Iterator[str]:
    """Hard texts, and those of all tokens of plain text."""
    yield from filter(lambda text: "\0" not in text, test_strings())
    reference = open_tokenizer(tokenizer)
    added = reference.get_added_tokens_decoder()
    numbers = (number for number in range(reference.get_vocab_size()) if number not in added)
    texts = (reference.decode([number]) for number in numbers)
    plain = sorted(
        (text for text in texts if text and not _UNREADABLE.search(text)),
        key=lambda text: (_shape(text), text),
    )
    shapes = {_shape(text): text for text in reversed(plain)}
    short = [text for shape, text in shapes.items() if len(shape) <= _SHORT]
    for text in short:
        yield "".join(f"{text}{other}" for other in short)
    draw = random.Random(0)
    by_chance = [draw.sample(plain, len(plain)) for _ in range(max(1, _BY_CHANCE // max(1, len(plain))))]
    for listed, between in ((plain, ""), (plain, " "), *((drawn, "") for drawn in by_chance)):
        for start in range(0, len(listed), _TOGETHER):
            yield between.join(listed[start : start + _TOGETHER])


def _shape(text: str) -> str:
    """Kinds of characters: letters by their case, marks, numbers, punctuation, symbols, spaces."""
    kinds = "".join(
        character if character.isspace() else unicodedata.category(character) for character in text
    )
    return _REPEATED.sub(r"\1", kinds)
