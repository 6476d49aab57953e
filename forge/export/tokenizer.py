"""A tokenizer's files, repaired in a copy so that the converters read what tokenizer.json says.

tokenizer.json is what transformers runs; the converters read half a dozen other files beside it, which
transformers 5 no longer writes. Here they are made from it: the added tokens, and for a SentencePiece
vocabulary (BPE with bytes to fall back on) the `tokenizer.model`.

Not covered: Unigram vocabularies (T5), tokens of the vocabulary proper that have no row.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from forge.errors import DataError
from forge.model.config import read_json

MODEL = "tokenizer.model"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # sentencepiece_model.proto
_SPECIAL = ("pad_token", "unk_token")


def repair_tokenizer(directory: Path, rows: int | None) -> list[str]:
    """Repair the tokenizer's files in `directory`; returns what a person should know.

    `rows` are the embedding's: added tokens past them are left out, since nothing can have learned them.
    Raises `DataError` when a token of the vocabulary proper has no row.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return []
    stated = read_json(path)
    added = stated.get("added_tokens") or []
    notes = []
    if rows is not None and (lost := [token for token in added if token["id"] >= rows]):
        names = ", ".join(str(token["content"]) for token in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        notes.append(
            f"the embedding has {rows} rows: the tokenizer's {names}{more} have none and are left out"
        )
        added = [token for token in added if token["id"] < rows]
        stated = {**stated, "added_tokens": added}
        _write(path, stated)
    vocabulary = _vocabulary(stated)
    if rows is not None and (largest := max(vocabulary.values(), default=0)) >= rows:
        raise DataError(
            f"the tokenizer's vocabulary has token {largest}, the embedding {rows} rows",
            hint="config.json, weights and tokenizer are not of one model: copy all from one place",
        )
    known = {*vocabulary, *(str(token["content"]) for token in added)}
    _repair_configuration(directory / "tokenizer_config.json", added, known)
    _forget(directory / "special_tokens_map.json", known)
    (directory / "added_tokens.json").unlink(missing_ok=True)  # all of it is in tokenizer_config.json now
    if (stated.get("model") or {}).get("byte_fallback") and not (directory / MODEL).is_file():
        _write_sentencepiece(directory / MODEL, stated, vocabulary)
    return notes


def _vocabulary(stated: Mapping[str, Any]) -> dict[str, int]:
    listed = (stated.get("model") or {}).get("vocab")
    return {str(token): int(number) for token, number in listed.items()} if isinstance(listed, dict) else {}


def _repair_configuration(path: Path, added: Iterable[Mapping[str, Any]], known: set[str]) -> None:
    """Write `added_tokens_decoder` anew, and drop PAD and UNK that are no token."""
    fields = read_json(path) if path.is_file() else {}
    decoder = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in sorted(added, key=lambda token: int(token["id"]))
    }
    changed = {**_without_unknown(fields, known), "added_tokens_decoder": decoder}
    if changed != fields:
        _write(path, changed)


def _forget(path: Path, known: set[str]) -> None:
    if path.is_file() and (kept := _without_unknown(fields := read_json(path), known)) != fields:
        _write(path, kept)


def _without_unknown(fields: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """transformers would add such a token, with an id past the embedding."""
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in fields.items()
    }
    return {
        name: value
        for name, value in fields.items()
        if name not in _SPECIAL or texts[name] is None or texts[name] in known
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_sentencepiece(path: Path, stated: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """A ModelProto of `vocabulary`, in protobuf's wire format.

    A piece's score is the rank of the first merge that makes it: llama.cpp joins the best scored pair first,
    as tokenizer.json joins the first pair of its list.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(stated["model"].get("merges") or []):
        first, _, second = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        ranks.setdefault(first + second, rank)
    unknown = stated["model"].get("unk_token")
    if unknown not in vocabulary:
        unknown = min(vocabulary, key=vocabulary.__getitem__)  # sentencepiece loads no model without
    special = {str(token["content"]) for token in stated.get("added_tokens") or [] if token.get("special")}
    pieces = b""
    texts = {number: text for text, number in vocabulary.items()}
    for number in range(max(texts) + 1):
        text = texts.get(number, f"<unused {number}>")
        kind = _NORMAL
        if text == unknown:
            kind = _UNKNOWN
        elif text in special or number not in texts:
            kind = _CONTROL
        elif len(text) == 6 and text.startswith("<0x"):
            kind = _BYTE
        score = -float(ranks.get(text, len(ranks))) if kind == _NORMAL else 0.0
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes((0x18, kind))
        pieces += _field(1, piece)
    trainer = bytes((3 << 3, 2, 35 << 3 & 0x7F | 0x80, 35 << 3 >> 7, 1))  # BPE, byte_fallback
    normalizer = _field(1, b"identity") + bytes((3 << 3, 1, 4 << 3, 0))  # a space first, all spaces kept
    path.write_bytes(pieces + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    length, size = len(content), b""
    while length > 0x7F:
        size, length = size + bytes((length & 0x7F | 0x80,)), length >> 7
    return bytes((number << 3 | 2,)) + size + bytes((length,)) + content
