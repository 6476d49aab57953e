"""A tensor on its way from one file to another: a name, a spec and a thunk. Runs in a worker.

A tensor is read in slabs of rows, so memory holds a few slabs however large the model is. Files are
read, not mapped: a mapped page counts as memory in use, and a file cut short would kill the process
where a read gives an error. Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import DataError
from forge.model.safetensors_header import BITS, TensorSpec

# Values in a slab: 4 MiB in float32. Where a slab ends decides how a merge is rounded in its last bit,
# so this is a constant, whatever the machine.
SLAB = 1 << 20
INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of infinity, by safetensors' names of the types that are checked for it."""


@dataclass(frozen=True)
class LazyTensor:
    """`read(start, stop)` gives rows [start, stop) as a torch tensor (rows, width) of `dtype`.

    A row is a stretch of the last dimension; all others are one: a bias is one row. `dtype` is
    safetensors' name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Any]

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def load(self) -> Any:
        """The whole tensor, put together of the same slabs as anything else is."""
        import torch

        parts = [self.read(start, stop) for start, stop in slabs(self.rows, self.width)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(self.shape)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread: slabs run side by side instead, and each is rounded the same anywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slabs(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """The bounds of the slabs of `rows` rows; a tensor without values has one, which is empty."""
    step = max(1, SLAB // max(1, width))
    for start in range(0, max(1, rows), step):
        yield start, min(rows, start + step)


def stored(spec: TensorSpec, name: str | None = None) -> LazyTensor:
    """The tensor in its file as it is; `name` is what it is called from here on."""
    return LazyTensor(
        name or spec.name, spec.dtype, spec.shape, lambda start, stop: read_tensor_rows(spec, start, stop)
    )


def read_tensor_rows(spec: TensorSpec, start: int, stop: int) -> Any:
    """Rows [start, stop) of `spec` from its file.

    Raises `DataError` that names the tensor when a value is not finite, or the file ends early.
    """
    import numpy as np
    import torch

    width = spec.shape[-1] if spec.shape else 1
    row_bytes = width * BITS[spec.dtype] // 8
    count = (stop - start) * row_bytes
    try:
        raw = np.fromfile(spec.file, np.uint8, count, offset=spec.start + start * row_bytes)
    except OSError as error:
        raise DataError(f"{spec.file}: cannot be read: {error.strerror}") from error
    if raw.size < count:
        raise DataError(f"{spec.file.name}: {spec.name} ends before its last value: was the file changed?")
    values = torch.from_numpy(raw).view(_torch_type(spec.dtype)).reshape(stop - start, width)
    if spec.dtype in INFINITY and not are_finite(values):
        raise DataError(
            f"{spec.file.name}: {spec.name} has values that are not finite",
            hint="these weights are broken: fetch them again, or train again with a smaller learning rate",
        )
    return values


def are_finite(values: Any) -> bool:
    """Whether `values`, a contiguous torch tensor of F64, F32, F16 or BF16, has no infinity and no NaN.

    As integers, infinities and NaNs are the greatest of their sign: two maxima show it, in a thirtieth of
    `torch.isfinite`'s time (IEEE 754, 3.4).
    """
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    infinity = INFINITY[names[values.dtype]]
    size = values.element_size()
    bits = values.reshape(-1).view(torch.uint8).numpy()
    negative = 1 << (8 * size - 1)
    return bool(
        bits.view(f"i{size}").max(initial=0) < infinity
        and bits.view(f"u{size}").max(initial=0) < negative + infinity
    )


def _torch_type(dtype: str) -> Any:
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
        "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    }  # fmt: skip
    if dtype not in names:
        raise DataError(f"weights of type {dtype} cannot be exported", hint="use the unquantized base")
    return getattr(torch, names[dtype])


def write_safetensors(
    path: Path, tensors: Sequence[LazyTensor], on_progress: Callable[[int, int], None]
) -> None:
    """Write `tensors` in order; `on_progress` gets the bytes written and their total."""
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
            for start, stop in slabs(tensor.rows, tensor.width):
                data = tensor.read(start, stop).contiguous().reshape(-1).view(torch.uint8)
                written += stream.write(data.numpy().data)
                on_progress(written, offset)
