"""Proof that the GGUF's tokenizer is the model's: the same ids for a few hundred strings.

Runs in a worker, on a GGUF that holds the vocabulary alone, before anything large is written
(pitfall 49; silent wrong 13). The reference is the `tokenizers` library on tokenizer.json, which
is what transformers runs. Special tokens are parsed on both sides, as in a rendered prompt.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forge.errors import CheckError, Problem

_PIECES = (
    "Hello", " world", "  two", "\n", "\n\n", "\t", " ", "'s", "'LL", "don't", "I'm", "1", "42", "3.14159",
    "1234567890", "ü", "Straße", "naïve", "日本語", "中文", "한국어", "العربية", "עברית", "Привет", "🙂", "👩‍👩‍👧", "e\u0301",
    "\u00a0", "\u200b", "\u2003", "…", "—", "“quoted”", "(x)", "[y]", "{{ z }}", "{% if %}", "</s>", "<s>", "a_b",
    "CamelCase", "snake_case", "https://example.org/?q=1&r=2", "foo@bar.baz", "C++", "#!", "$5.00", "50%", "a\r\nb",
    "    indent", "\u3000", "ﬁ", "½", "²", "Ⅷ", "\u0000", "\ufeff", "!!!", "...", "?!", "--", "__init__", "0x1F", "1e-9",
)  # fmt: skip


def test_strings(count: int = 300, seed: int = 0) -> list[str]:
    """Every piece alone, then seeded random joins of two to six pieces."""
    draw = random.Random(seed)
    joins = ["".join(draw.choices(_PIECES, k=draw.randint(2, 6))) for _ in range(count - len(_PIECES))]
    return [*_PIECES, *joins]


@dataclass(frozen=True)
class Compared:
    """How many texts gave the same ids, and for which kind of text that is not claimed."""

    texts: int
    limits: tuple[str, ...]


def compare_ids(tokenizer_json: Path, vocabulary: Path, texts: Sequence[str]) -> Compared:
    """Check that both sides give equal ids for every text.

    Raises `CheckError` with the first texts that differ. Texts with NUL are left out: llama.cpp's
    interface takes C strings. Where the tokenizer composes characters first (Unicode NFC, as
    Qwen's does), llama.cpp does not: decomposed text is left out and named as a limit.
    """
    import llama_cpp
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(tokenizer_json))
    reference.no_truncation()
    usable = [text for text in texts if text and "\0" not in text]
    limits: tuple[str, ...] = ()
    if _composes(tokenizer_json):
        composed = [text for text in usable if unicodedata.is_normalized("NFC", text)]
        left_out = len(usable) - len(composed)
        limits = (f"text that is not in Unicode normal form C (left out: {left_out} of {len(usable)})",)
        usable = composed
    model = llama_cpp.Llama(model_path=str(vocabulary), vocab_only=True, verbose=False)
    problems: list[Problem] = []
    try:
        for text in usable:
            expected = reference.encode(text, add_special_tokens=False).ids
            found = model.tokenize(text.encode(), add_bos=False, special=True)
            if found != expected:
                problems.append(Problem(f"trained on {expected[:12]}, served {found[:12]}", repr(text[:60])))
    finally:
        model.close()
    if problems:
        raise CheckError(
            f"the GGUF's tokenizer gives other ids for {len(problems)} of {len(usable)} texts: "
            "the model would be served other tokens than it was trained on",
            hint="llama.cpp has no pre-tokenizer equal to this tokenizer's; choose a base that it knows",
            problems=problems[:5],
        )
    return Compared(len(usable), limits)


def _composes(tokenizer_json: Path) -> bool:
    normalizer = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("normalizer") or {}
    return "NFC" in {step.get("type") for step in normalizer.get("normalizers", [normalizer])}
