"""A tensor on its way from one file to another: a name, a spec and a thunk. Runs in a worker.

`write_safetensors` writes them one at a time, so memory holds one tensor however large the model
is. Format: github.com/huggingface/safetensors (8 bytes of header length, JSON, then the data).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class LazyTensor:
    """`load` makes a torch tensor of the safetensors type `dtype` and of `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Any]

    @property
    def bytes(self) -> int:
        count = _BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


def write_safetensors(
    path: Path, tensors: Sequence[LazyTensor], on_progress: Callable[[int, int], None]
) -> None:
    """Write `tensors` in order; `on_progress` is told the bytes written and their total."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        written = 0
        for tensor in tensors:
            data = tensor.load().contiguous()
            if tuple(data.shape) != tensor.shape:
                raise AssertionError(f"{tensor.name}: {tuple(data.shape)} instead of {tensor.shape}")
            stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
            written += tensor.bytes
            on_progress(written, offset)
