"""What the worker is asked to export, and what it reports of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

MergeBase: TypeAlias = Literal["original", "nf4"]
Mode: TypeAlias = Literal["merged", "adapter", "auto"]


@dataclass(frozen=True)
class Ingredients:
    """What a GGUF is made of, whoever asks for it.

    `tokenizer` is the directory whose tokenizer was trained with, `chat_template` the pinned text that the
    GGUF is to carry, `merge_base` what the adapter is merged into, `converters` llama.cpp's own, `sampling`
    what stands over the base's generation_config.json.
    """

    base: Path
    adapter: Path | None
    tokenizer: Path
    chat_template: str | None
    converters: Path
    end_of_turn_id: int | None = None
    merge_base: MergeBase = "original"
    sampling: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportRequest:
    """One GGUF, called `name` inside, in the directory `out`.

    `data` is a directory of prepared rows to compare token ids on, `importance` an imatrix GGUF to round by.
    `plain` leaves every choice to the converter and writes the bytes of the usual chain.
    """

    model: Ingredients
    out: Path
    name: str
    quant: str
    mode: Mode = "merged"
    data: Path | None = None
    importance: Path | None = None
    keep_merged: bool = False
    plain: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Exported:
    """The file that was written. `mode` is what `auto` came to, `merged_because` why it is no adapter.

    `misread` says how transformers' AutoTokenizer reads the tokenizer otherwise than it is written.
    """

    architecture: str
    quant: str
    bytes: int
    tensor_types: Mapping[str, int]
    fallbacks: Mapping[str, str]
    bits_per_weight: float
    mode: Mode
    merged_because: tuple[str, ...]
    bytes_written: int
    compiled_kernels: tuple[str, ...]
    ids_compared: int
    ids_limits: tuple[str, ...]
    misread: str | None
    pre_tokenizer: str | None
    peak_rss_bytes: int
    seconds: float
