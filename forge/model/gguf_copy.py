"""A GGUF with one text of its metadata replaced: every other byte of it is as it was.

Tensors are placed relative to where the header ends, so only the gap before them changes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from forge.errors import CheckError, DataError
from forge.files import is_same_piece
from forge.model.gguf_header import GgufHeader, read_gguf

_CHUNK = 1 << 20


def with_text(header: GgufHeader, key: str, text: str) -> Iterator[bytes]:
    """The file's bytes, with `text` as the value of `key`; raises `DataError` where it has no such text."""
    if not isinstance(header.metadata.get(key), str):
        raise DataError(f"{header.path}: it has no {key}")
    start, end = header.places[key]
    content = text.encode()
    with header.path.open("rb") as stream:
        yield from _pieces(stream.read, start)
        yield struct.pack("<Q", len(content)) + content
        stream.seek(end)
        yield from _pieces(stream.read, header.end - end)
        written = header.end - (end - start) + 8 + len(content)
        yield bytes(-written % header.alignment)
        stream.seek(header.data)
        while chunk := stream.read(_CHUNK):
            yield chunk


def _pieces(read: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    while count:
        chunk = read(min(count, _CHUNK))
        if not chunk:
            raise DataError("the file was cut while it was copied")
        count -= len(chunk)
        yield chunk


def require_same_but(original: GgufHeader, copy: Path, key: str, text: str) -> None:
    """Read `copy` back: raise `CheckError` where more than the value of `key` is another."""
    written = read_gguf(copy)
    keys = {*original.metadata, *written.metadata} - {key}
    wrong = [name for name in keys if _value(original, name) != _value(written, name)]
    if _shapes(original) != _shapes(written):
        wrong.append("its tensors")
    elif not _same_bytes(original, written):
        wrong.append("the bytes of its tensors")
    if written.metadata.get(key) != text:
        wrong.append(key)
    if wrong:
        raise CheckError(f"{copy} was not written as it should be: {', '.join(sorted(wrong))}")


def has_weights_of(header: GgufHeader, other: GgufHeader) -> bool:
    """Whether all tensors of two files have the same types, shapes and bytes, wherever they lie in them."""
    return _shapes(header) == _shapes(other) and all(
        is_same_piece(header.path, tensor.start, other.path, same.start, tensor.end - tensor.start)
        for tensor, same in ((tensor, other.tensors[name]) for name, tensor in header.tensors.items())
    )


def _shapes(header: GgufHeader) -> dict[str, object]:
    return {name: (item.type, item.shape, item.end - item.start) for name, item in header.tensors.items()}


def _value(header: GgufHeader, key: str) -> object:
    return header.array(key) if key in header.metadata else None


def _same_bytes(original: GgufHeader, copy: GgufHeader) -> bool:
    with original.path.open("rb") as first, copy.path.open("rb") as other:
        first.seek(original.data)
        other.seek(copy.data)
        while True:
            chunk = first.read(_CHUNK)
            if chunk != other.read(_CHUNK):
                return False
            if not chunk:
                return True
