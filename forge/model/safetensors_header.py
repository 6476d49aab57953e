"""The header of a safetensors file: which tensors it holds and where their bytes lie.

Read with `struct` and `json` only, and believed only after every extent was checked against the
file: a lying or truncated file is an error here, not a crash in the middle of an export. The
format: https://huggingface.co/docs/safetensors/index#format.

Not covered: what the values are; they are read where they are used. `is_copy` compares bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from forge.errors import DataError
from forge.files import is_same_piece

# The reference implementation refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000

BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in a file: its bytes are `file[start:end]`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.start


class TensorFileError(DataError):
    """One file of tensors is not what it should be; `str()` starts with its path."""

    def __init__(self, path: Path, message: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {message}", hint=hint)
        self.path = path
        self.reason = message


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of the safetensors file `path`, in the order of their bytes.

    Raises `TensorFileError` (a `DataError`) when it is missing, truncated, a Git LFS pointer, not a
    safetensors file, or when its extents overlap, leave holes or do not fit their shapes.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            start = stream.read(8)
            _check_start(path, start + stream.read(64), size)
            (length,) = struct.unpack("<Q", start)
            if length > size - 8:
                _truncated(path, size, 8 + length)
            stream.seek(8)
            header = stream.read(length)
    except FileNotFoundError as error:
        raise TensorFileError(path, "no such file") from error
    except OSError as error:
        raise TensorFileError(path, f"cannot be read: {error.strerror}") from error
    tensors = [
        _tensor(path, name, entry, 8 + length)
        for name, entry in _entries(path, header).items()
        if name != "__metadata__"
    ]
    return _check_extents(path, tensors, 8 + length, size)


def is_copy(tensor: TensorSpec, other: TensorSpec) -> bool:
    """Whether both have the same type, shape and bytes."""
    return (tensor.dtype, tensor.shape) == (other.dtype, other.shape) and is_same_piece(
        tensor.file, tensor.start, other.file, other.start, tensor.bytes
    )


def _check_start(path: Path, start: bytes, size: int) -> None:
    if start.startswith(_POINTER):
        raise TensorFileError(
            path,
            "this is a Git LFS pointer, not the weights",
            hint="fetch the weights: run `git lfs pull` in its directory",
        )
    if size < 8:
        raise TensorFileError(path, f"truncated: {size} bytes are too few for a header", hint=_FETCH_AGAIN)
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
        kind = "a PyTorch pickle" if start.startswith(b"PK") else "something else"
        raise TensorFileError(path, f"not a safetensors file: it starts like {kind}", hint=_FETCH_AGAIN)


_FETCH_AGAIN = "copy or download this file again"


def _truncated(path: Path, size: int, promised: int) -> NoReturn:
    raise TensorFileError(
        path,
        f"truncated: it has {size:,} bytes of the {promised:,} that its header asks for",
        hint=_FETCH_AGAIN,
    )


def _refuse_doubles(pairs: Iterable[tuple[str, object]]) -> Mapping[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} stands there twice")
        fields[name] = value
    return fields


def _entries(path: Path, header: bytes) -> Mapping[str, object]:
    try:
        entries = json.loads(header, object_pairs_hook=_refuse_doubles)
    except (ValueError, RecursionError) as error:
        raise TensorFileError(path, f"not a safetensors file: its header is not valid: {error}") from error
    if not isinstance(entries, dict):
        raise TensorFileError(path, "not a safetensors file: its header is not a JSON object")
    return entries


def _tensor(path: Path, name: str, entry: object, data: int) -> TensorSpec:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            dtype in BITS and all(_is_count(number) for number in (*shape, start, end))
        ):
            tensor = TensorSpec(name, dtype, tuple(shape), path, data + start, data + end)
        case {"dtype": str(dtype)} if dtype not in BITS:
            raise TensorFileError(path, f"tensor {name}: unknown dtype {dtype!r}")
        case _:
            raise TensorFileError(path, f"tensor {name}: its entry in the header is not valid")
    if tensor.bytes * 8 != tensor.numel * BITS[dtype]:
        raise TensorFileError(
            path,
            f"tensor {name}: shape {list(shape)} of {dtype} needs {tensor.numel * BITS[dtype] // 8:,} bytes, "
            f"the header gives it {tensor.bytes:,}",
        )
    return tensor


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _check_extents(path: Path, tensors: list[TensorSpec], data: int, size: int) -> dict[str, TensorSpec]:
    ordered = sorted(tensors, key=lambda tensor: (tensor.start, tensor.end))
    position = data
    for tensor in ordered:
        if tensor.start != position:
            what = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise TensorFileError(path, f"tensor {tensor.name}: its extent {what}")
        position = tensor.end
    if position > size:
        _truncated(path, size, position)
    if position < size:
        raise TensorFileError(path, f"{size - position:,} bytes at its end belong to no tensor")
    return {tensor.name: tensor for tensor in ordered}
