"""A GGUF's header, written by gguf-py's own writer. Runs in a worker.

Only long arrays are packed here, at once: gguf-py packs item by item, which takes a second for a vocabulary
of 150,000 tokens, and the header is written twice.
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
    writer._pack_val = partial(_pack, writer._pack_val)
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


def _pack(
    pack: Callable[..., bytes], value: Any, kind: Any, *, add_vtype: bool, sub_type: Any = None
) -> bytes:
    """The bytes that gguf-py's `pack` gives; it is asked for all but a list of plain items."""
    if kind.name == "ARRAY" and isinstance(value, list) and add_vtype and sub_type is None:
        name, items = _packed_items(value)
        if items:
            return struct.pack("<IIQ", kind, type(kind)[name], len(value)) + items
    return pack(value, kind, add_vtype=add_vtype, sub_type=sub_type)


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
