"""The tokenizer's files that travel with an adapter and with a merged checkpoint (D12)."""

from __future__ import annotations

import shutil
from pathlib import Path

# The base's own files, byte for byte: a tokenizer that was never rewritten cannot have changed.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what there is; files of the same name are replaced."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
