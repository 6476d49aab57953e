"""Which of llama.cpp's pre-tokenizers a tokenizer.json has: decided here, proved by `proof`.

llama.cpp names its pre-tokenizers after models; what counts is the pattern that splits the text
(its `src/llama-vocab.cpp`). Only patterns that are certain are listed; anything else is left to
the converter's own table, and refused when that does not know it either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BY_PATTERN = {
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}


def decide(directory: Path) -> str:
    """The pre-tokenizer's name in llama.cpp, or "" when tokenizer.json does not settle it."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return ""
    stated = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    steps = stated.get("pretokenizers", [stated])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _BY_PATTERN.get(_pattern(steps[0]), "")
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return ""


def _pattern(step: dict[str, Any]) -> str:
    pattern = step.get("pattern", {})
    return str(pattern.get("Regex", pattern.get("String", "")))
