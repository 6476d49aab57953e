"""A GGUF's header, written by gguf-py's own writer. Runs in a worker.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.errors import UnexportableError
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
    try:
        writer.write_header_to_file(path)
        try:
            writer.write_kv_data_to_file()
        except struct.error as error:
            raise _unwritable(writer, metadata) from error
        writer.write_ti_data_to_file()
        at: int = writer.fout[0].tell()
    finally:
        writer.tensors, writer.kv_data = kept
        if writer.fout:
            writer.close()
    alignment: int = writer.data_alignment
    return -(-at // alignment) * alignment


def _unwritable(writer: Any, metadata: Mapping[str, Any]) -> UnexportableError:
    """The field whose value is not of its type: converters copy what config.json and its kind say."""
    for name, field in metadata.items():
        try:
            writer._pack_val(field.value, field.type, add_vtype=True, sub_type=field.sub_type)
        except struct.error as error:
            return UnexportableError(
                f"{name} cannot be {field.value!r}: {error}",
                hint="compare config.json and generation_config.json with those on the hub",
            )
    return UnexportableError(
        "a value of the GGUF's header is not of its type", hint="this is a bug; report it"
    )
