"""A GGUF's header, written by gguf-py's own writer. Runs in a worker.

Only arrays are packed here: gguf-py packs a vocabulary item by item, a second for 150,000 tokens.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from forge.export.upstream import Converted, bytes_of


def write_header(
    converted: Converted, path: Path, metadata: Mapping[str, Any], types: Mapping[str, str]
) -> int:
    """Write a GGUF's header to `path`, the tensors in the order and of the types of `types`.

    Returns where the tensors' bytes begin.
    """
    import gguf

    writer = converted.writer
    placed = {}
    for name, kind in types.items():
        shape = converted.tensors[name].shape
        number = gguf.GGMLQuantizationType[kind]
        placed[name] = type(converted.tensors[name])(shape, number, bytes_of(kind, shape))
    kept = writer.tensors, writer.kv_data
    writer.tensors, writer.kv_data = [placed], [dict(metadata)]
    writer.state, writer.fout = type(writer.state).NO_FILE, None
    writer._pack_val = partial(_pack_once, converted.packed, writer._pack_val)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        at: int = writer.fout[0].tell()
    finally:
        del writer._pack_val  # the class's own again
        writer.tensors, writer.kv_data = kept
        if writer.fout:
            writer.close()
    alignment: int = writer.data_alignment
    return -(-at // alignment) * alignment


def _pack_once(
    packed: dict[int, tuple[Any, bytes]], pack: Callable[..., bytes], value: Any, kind: Any, **how: Any
) -> bytes:
    """GGUFWriter._pack_val, which packs an array that is in `packed` no second time."""
    if kind.name != "ARRAY":
        return pack(value, kind, **how)
    if id(value) not in packed:
        packed[id(value)] = value, _pack_array(pack, value, kind, **how)
    return packed[id(value)][1]


def _pack_array(
    pack: Callable[..., bytes], value: Any, kind: Any, *, add_vtype: bool, sub_type: Any = None
) -> bytes:
    """The bytes that gguf-py's `pack` gives, which has those arrays that are not packed here."""
    name, items = _packed_items(value) if isinstance(value, list) else ("", b"")
    number = getattr(type(kind), name, None)
    if not items or not add_vtype or sub_type not in (None, number):
        return pack(value, kind, add_vtype=add_vtype, sub_type=sub_type)
    return struct.pack("<IIQ", kind, number, len(value)) + items


def _packed_items(value: list[Any]) -> tuple[str, bytes]:
    """The name of gguf-py's type of every item and their bytes; nothing for a mixture or another type."""
    kinds = {type(item) for item in value}
    if not kinds or bool in kinds:
        return "", b""
    if all(issubclass(kind, (str, bytes)) for kind in kinds):
        texts = (item.encode() if isinstance(item, str) else item for item in value)
        return "STRING", b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    if all(issubclass(kind, int) for kind in kinds) and min(value) >= -(2**31) and max(value) < 2**31:
        return "INT32", struct.pack(f"<{len(value)}i", *value)
    if all(issubclass(kind, float) for kind in kinds):
        return "FLOAT32", struct.pack(f"<{len(value)}f", *value)
    return "", b""
