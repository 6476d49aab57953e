"""What identifies a base, a tokenizer and an adapter: the digest over the files that count of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forge.store.digest import DigestCache, tree_digest

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
_TOKENIZER = ("tokenizer*", "chat_template.*", "special_tokens_map.json", "added_tokens.json")
_ADAPTER = ("adapter_config.json", "adapter_model.*")


def base_digest(directory: Path, cache: DigestCache | None = None) -> str:
    """Over a checkpoint's weights and configuration."""
    return _digest(directory, _WEIGHTS, cache)


def tokenizer_digest(directory: Path, cache: DigestCache | None = None) -> str:
    """Over whatever tokenizes and templates."""
    return _digest(directory, _TOKENIZER, cache)


def adapter_digest(directory: Path, cache: DigestCache | None = None) -> str:
    """Over an adapter's factors and settings, and the tokenizer that it carries."""
    return _digest(directory, (*_ADAPTER, *_TOKENIZER), cache)


def _digest(directory: Path, patterns: Sequence[str], cache: DigestCache | None) -> str:
    names = sorted({path.name for pattern in patterns for path in directory.glob(pattern)})
    return tree_digest(directory, names, cache)
