"""Small writers of safetensors and GGUF files, written apart from the code that reads them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
# ggml type -> values in a block, bytes of a block
_BLOCKS = {0: (1, 4), 1: (1, 2), 12: (256, 144), 14: (256, 210)}


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    """A file of zeros; sparse, so that a model of gigabytes takes a few kB of disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    told = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(told)) + told)
        stream.truncate(stream.tell() + position)
    return path


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _typed(value: object) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 8, _text(str(value))


def _value(value: object) -> bytes:
    if not isinstance(value, tuple):
        kind, encoded = _typed(value)
        return struct.pack("<I", kind) + encoded
    typed = [_typed(element) for element in value]
    return struct.pack("<IIQ", 9, typed[0][0], len(typed)) + b"".join(encoded for _, encoded in typed)


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[int, tuple[int, ...]]],
    offsets: tuple[int, ...] | None = None,
) -> Path:
    """A GGUF of zeros; `tensors` are (ggml type, shape with the rows first), `offsets` may lie."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    position = 0
    for index, (name, (kind, shape)) in enumerate(tensors.items()):
        block, size = _BLOCKS.get(kind, (1, 4))
        offset = offsets[index] if offsets else position
        head += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, offset)
        position += -(-(math.prod(shape) // block * size) // 32) * 32
    path.write_bytes(head + bytes(-len(head) % 32 + position))
    return path
