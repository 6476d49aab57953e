"""What the fake Ollama refuses, in the words of the real one. Measured on a live server 0.33."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.model.gguf_header import GgufHeader

QUANTIZE = ("F32", "F16", "BF16", "Q8_0", "Q4_K_S", "Q4_K_M")
# general.file_type of F32, F16 and BF16.
_WHOLE = (0, 1, 32)
_NAME = re.compile(r"(([\w.-]+(:\d+)?/)?\w[\w-]*/)?\w[\w.-]*(:\w[\w.-]*)?", re.ASCII)
_FLOATS = ("temperature", "top_p", "min_p", "repeat_penalty")
_INTEGERS = ("num_ctx", "num_predict", "top_k", "seed")


class RefusedError(Exception):
    """An answer that is no success; 200 where it stands in a stream that began so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_create(fields: Mapping[str, Any]) -> None:
    """The early errors of /api/create."""
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in fields.get("files", {})):
        raise RefusedError(400, "file path must be relative")
    if not _NAME.fullmatch(fields.get("model") or fields.get("name") or ""):
        raise RefusedError(400, "invalid model name")
    if not fields.get("from") and not fields.get("files"):
        raise RefusedError(400, "neither 'from' or 'files' was specified")


def check_quantize(header: GgufHeader, kind: str) -> None:
    """A late one: the kinds that it can make, from what is not quantized."""
    if kind.upper() not in QUANTIZE:
        raise RefusedError(
            200, f"unsupported quantization type {kind.upper()} - supported types are F32, F16, ..."
        )
    if header.metadata.get("general.file_type") not in _WHOLE:
        raise RefusedError(200, "quantization is only supported for F16, BF16 and F32 models")


def check_options(options: Mapping[str, Any]) -> None:
    """Types are looked at when a model is used, not when it is made."""
    for name, value in options.items():
        if name in _FLOATS and not isinstance(value, int | float):
            raise RefusedError(500, f'option "{name}" must be of type float32')
        if name in _INTEGERS and not isinstance(value, int | float):
            raise RefusedError(500, f'option "{name}" must be of type integer')
