"""A repository of the Hugging Face Hub: its name, its place in the cache, the files of it we want.

`HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are read when a function is called, not
when huggingface_hub is imported.

Not covered: the network; that is `hub`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]

HUB = "https://huggingface.co"

DATA_ENDINGS = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"),
    *(".jsonl.gz", ".json.gz", ".csv.gz", ".jsonl.zst", ".json.zst", ".jsonl.bz2", ".jsonl.xz"),
)
_WEIGHTS = re.compile(r"(adapter_)?model(\.safetensors)?(-\d+-of-\d+)?\.safetensors")
_TEXTS = (".json", ".jinja", ".model", ".tiktoken", ".py", ".txt")
_NOT_WANTED = re.compile(r"trainer_state\.json|.*\.(onnx|tflite|bin)\.json|requirements.*\.txt")
_PAPERS = ("README", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub; `revision` is a branch, a tag or a commit."""

    id: str
    revision: str = "main"
    kind: Kind = "model"

    @property
    def page(self) -> str:
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


@dataclass(frozen=True)
class Snapshot:
    """A whole copy of a repository's wanted files at one commit."""

    directory: Path
    commit: str


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def cache_directory() -> Path:
    """Where huggingface_hub keeps repositories, by the environment as it stands now."""
    cache = os.environ.get("HF_HUB_CACHE")
    if cache:
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    general = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path(home) if home else general / "huggingface").expanduser() / "hub"


def is_offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def wanted(names: Iterable[str], kind: Kind = "model") -> list[str]:
    """Of a repository's files those that are needed: no second copy of the weights, no pickles."""
    if kind == "dataset":
        return [name for name in names if name.endswith(DATA_ENDINGS) or name == "README.md"]
    return [name for name in names if _is_wanted(name)]


def _is_wanted(name: str) -> bool:
    if "/" in name:
        return name.startswith("additional_chat_templates/") and name.endswith(".jinja")
    if name.endswith(".safetensors"):
        return bool(_WEIGHTS.fullmatch(name))
    return (name.endswith(_TEXTS) and not _NOT_WANTED.fullmatch(name)) or name.startswith(_PAPERS)
