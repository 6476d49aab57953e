"""What a tokenizer.json means in llama.cpp's words: decided here, proved by `proof`.

llama.cpp names its pre-tokenizers after models; what counts is the pattern that splits the text
(its `src/llama-vocab.cpp`). Only patterns that are certain are listed; anything else is left to
the converter's own table, and refused when that does not know it either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.model.config import read_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BY_PATTERN = {
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}

Stated = Mapping[str, Any]
"""What a tokenizer.json states; empty where there is none."""


def read_stated(directory: Path) -> Stated:
    """The tokenizer.json in `directory`; raises `DataError` for a broken one."""
    path = directory / "tokenizer.json"
    return read_json(path) if path.is_file() else {}


# llama.cpp takes the flags of some special tokens from the *name* of the model: any name with one of
# these in it changes how every prompt is read, or stops the file from loading.
_NAMES_WITH_EFFECT = re.compile(r"(phi)-?(3)|(modern)-(bert)", re.IGNORECASE)
_STRIPPING_NAME = "phi-3"
_STRIPPING_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def model_name(stated: Stated, name: str) -> str:
    """`name` such that llama.cpp reads special tokens as tokenizer.json does.

    Phi-3's special tokens take the white space after them (`rstrip`). The GGUF has no place for
    that; llama.cpp does it where general.name has "phi-3" in it, and only there (pitfall 49).
    """
    added = stated.get("added_tokens") or []
    strips = any(token.get("rstrip") for token in added)
    if strips and {token["content"] for token in added} >= _STRIPPING_TOKENS:
        return name if _STRIPPING_NAME in name.lower() else f"{name} ({_STRIPPING_NAME})"
    return _NAMES_WITH_EFFECT.sub(lambda match: " ".join(part for part in match.groups() if part), name)


def space_prefix(stated: Stated) -> bool | None:
    """Whether a space goes before each stretch of text between special tokens; None: no SentencePiece.

    llama.cpp does it always or never. Metaspace's `first` means the text's very start, which in a
    chat is a special token, so never.
    """
    if not (stated.get("model") or {}).get("byte_fallback"):
        return None
    steps = [*_steps(stated, "normalizer"), *_steps(stated, "pre_tokenizer")]
    kinds = {step.get("type"): step for step in steps}
    if "ByteLevel" in kinds:
        return None
    if "Metaspace" in kinds:
        return bool(kinds["Metaspace"].get("prepend_scheme", "always") == "always")
    return "Prepend" in kinds


def pretokenizer_of(stated: Stated) -> str:
    """The pre-tokenizer's name in llama.cpp, or "" when tokenizer.json does not settle it."""
    steps = _steps(stated, "pre_tokenizer")
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _BY_PATTERN.get(_pattern(steps[0]), "")
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return ""


def _steps(stated: Stated, part: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence, one step, or absent."""
    whole = stated.get(part) or {}
    inner: list[dict[str, Any]] = whole.get(part.replace("_", "") + "s", [whole])
    return inner


def _pattern(step: dict[str, Any]) -> str:
    pattern = step.get("pattern", {})
    return str(pattern.get("Regex", pattern.get("String", "")))
