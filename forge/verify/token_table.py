"""Whether a file's table of tokens is tokenizer.json's, entry by entry. Runs in a worker.

Texts that are tried say nothing of a token or a merge that none of them has. So each token's text, the merges
in their order, which tokens are special, and the ids of BOS, PAD and UNK are compared themselves.

Not covered: the scores of a SentencePiece vocabulary and which of its special tokens are shown; BOS, PAD and
UNK that are another special token, and the pre-tokenizer's name: `session` asks llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forge.errors import Problem
from forge.model.config import read_json
from forge.model.gguf_header import GgufHeader
from forge.model.tokenizer_files import TokenizerFiles, read_tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
_KINDS = {1: "plain text", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "a byte"}
_LOOKS_SPECIAL = re.compile(r"[<\[].*[>\]]", re.DOTALL)
"""What the converters take for a control token, whatever tokenizer.json calls it."""


def other_entries(header: GgufHeader, tokenizer: Path) -> Iterator[Problem]:
    """Each kind of entry that differs from that of the directory `tokenizer`, with the first that does."""
    stated = read_json(tokenizer / "tokenizer.json")
    model = stated.get("model") or {}
    listed = model.get("vocab")
    texts = {number: text for text, number in listed.items()} if isinstance(listed, dict) else {}
    added = {int(token["id"]): token for token in stated.get("added_tokens") or []}
    yield from _texts(header, {**texts, **{number: token["content"] for number, token in added.items()}})
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        yield from _merges(header, model.get("merges") or [])
    yield from _types(header, texts, added)
    yield from _ids(header, read_tokenizer(tokenizer), tokenizer / "config.json", added)


def _array(header: GgufHeader, name: str) -> tuple[Any, ...]:
    key = f"tokenizer.ggml.{name}"
    return header.array(key) if key in header.metadata else ()


def _texts(header: GgufHeader, expected: Mapping[int, str]) -> Iterator[Problem]:
    """A token past the file's last has no row in the embedding."""
    tokens = _array(header, "tokens")
    other = [
        number
        for number, text in expected.items()
        if number < len(tokens) and _spaced(tokens[number]) != _spaced(text)
    ]
    if other:
        first = min(other)
        words = f"token {first} is {tokens[first]!r}, the tokenizer's is {expected[first]!r}"
        yield Problem(f"{words}{_more(other)}", "tokenizer.ggml.tokens")


def _spaced(text: str) -> str:
    """Of user-defined pieces the converters write SentencePiece's mark as a space."""
    return text.replace("\u2581", " ")


def _merges(header: GgufHeader, stated: list[Any]) -> Iterator[Problem]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in stated]
    # As the converters write a part that has a space in it.
    expected = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]
    merges = _array(header, "merges")
    if list(merges) == expected:
        return
    at = next((at for at, pair in enumerate(zip(merges, expected, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        words = f"{len(merges)} merges, the tokenizer has {len(expected)}"
    else:
        words = f"merge {at} is {merges[at]!r}, the tokenizer's is {expected[at]!r}"
    yield Problem(words, "tokenizer.ggml.merges")


def _types(
    header: GgufHeader, texts: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]
) -> Iterator[Problem]:
    """Which tokens are read as one wherever they stand, and which of them are not shown."""
    types = _array(header, "token_type")
    is_bytes = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    other = []
    for number, kind in enumerate(types):
        token = added.get(number)
        if token is None:
            wrong = number in texts and (kind != _NORMAL if is_bytes else kind in (_CONTROL, _UNUSED))
        elif kind in (_CONTROL, _USER_DEFINED) and is_bytes:
            may_be = token.get("special") or _LOOKS_SPECIAL.fullmatch(token["content"])
            wrong = not may_be if kind == _CONTROL else bool(token.get("special"))
        else:
            wrong = is_bytes or kind in (_NORMAL, _UNUSED)
        if wrong:
            other.append(number)
    if other:
        first = min(other)
        token = added.get(first, {"content": texts.get(first), "special": False})
        own = "special" if token.get("special") else "an added token" if first in added else "plain text"
        words = f"token {first}, {token['content']!r}, is {_KINDS.get(types[first])}, in the tokenizer {own}"
        yield Problem(f"{words}{_more(other)}", "tokenizer.ggml.token_type")


def _ids(
    header: GgufHeader,
    files: TokenizerFiles,
    configuration: Path,
    added: Mapping[int, Mapping[str, Any]],
) -> Iterator[Problem]:
    """Another BOS; a PAD or UNK that is a word. What ends an answer is asked of llama.cpp itself.

    Where the tokenizer names none, the converters take that of the `configuration`, which an adapter has not.
    """
    stated = read_json(configuration) if configuration.is_file() else {}
    stated = {**stated, **(stated.get("text_config") or {})}
    for name, key in (("bos", "bos"), ("pad", "padding"), ("unk", "unknown")):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        own = {files.ids.get(name), stated.get(f"{name}_token_id")} - {None}
        if number is None or number in own or not (own or stated):
            continue
        if number in added and (name != "bos" or not own):
            continue
        words = f"is {number}, the base's is {', '.join(map(str, own)) or 'none'}"
        yield Problem(words, f"tokenizer.ggml.{key}_token_id")


def _more(other: list[int]) -> str:
    return f", and {len(other) - 1} more" if len(other) > 1 else ""
