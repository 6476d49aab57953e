"""The GGUF itself, written front to back in one pass. Runs in a worker.

Every tensor is merged, rounded as the converter would have stored it, quantized and written by the
slab, on threads; the order in the file is kept. A tensor that the converter takes apart or turns
around is in memory whole, twice at most: as it came and as it was turned.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from forge.errors import StageError
from forge.export.header import write_header
from forge.export.importance import Importance
from forge.export.kernels import Kernel, quantize_rows
from forge.export.tensors import LazyTensor, are_finite, slabs
from forge.export.upstream import Converted, Pending, extents

Advance = Callable[[int, int], None]
_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Rounding:
    """How values become the bytes of a type.

    `kernels` quantize the types that they are for, ggml's own library the others, and every tensor that
    `importance` has, which is rounded by it.
    """

    kernels: Mapping[str, Kernel]
    importance: Importance


def write_gguf(
    converted: Converted,
    path: Path,
    metadata: Mapping[str, Any],
    types: Mapping[str, str],
    rounding: Rounding,
    threads: int,
    on_progress: Advance,
) -> int:
    """Write the whole file to `path`; returns its bytes. `on_progress` gets the bytes done and in all.

    Raises `StageError` when the disk is full, before anything is written if that is known, or when
    a tensor cannot be given its type; `DataError` for weights that are not finite.
    """
    sizes = dict(extents(types, converted))
    total = sum(sizes.values())
    with writing(path.parent):
        check_space(path.parent, total)
        start = write_header(converted, path, metadata, types)
        with path.open("r+b") as stream:
            stream.seek(0, os.SEEK_END)
            stream.write(bytes(start - stream.tell()))
            done = 0
            for name, made, last in _in_order(_jobs(converted, types, rounding), threads):
                stream.write(made.data)
                done += made.nbytes
                if last:
                    stream.write(bytes(-sizes[name] % converted.writer.data_alignment))
                on_progress(done, total)
            end = stream.tell()
            stream.flush()
            os.fsync(stream.fileno())
    return end


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise a full disk, or one that cannot be written, as `StageError`."""
    try:
        yield
    except OSError as error:
        raise StageError(
            f"{directory}: cannot be written: {error.strerror or error}",
            hint="`forge plan` shows how much room an export needs",
        ) from error


def check_space(directory: Path, total: int) -> None:
    """Raise `StageError` when fewer than `total` bytes are free where the file is to be."""
    free = shutil.disk_usage(directory).free
    if free < total:
        raise StageError(
            f"{directory}: the GGUF needs {total / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            hint="free some space, or choose a smaller type",
        )


_Job = tuple[str, Callable[[], Any], bool]


def _in_order(jobs: Iterator[_Job], threads: int) -> Iterator[tuple[str, Any, bool]]:
    """Do the jobs on `threads` threads, a few ahead, and give their results in order."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[tuple[str, Future[Any], bool]] = deque()
        try:
            for name, job, last in jobs:
                ahead.append((name, pool.submit(job), last))
                if len(ahead) > threads + 1:
                    yield _finished(ahead)
            while ahead:
                yield _finished(ahead)
        finally:
            for _, future, _ in ahead:
                future.cancel()


def _finished(ahead: deque[tuple[str, Future[Any], bool]]) -> tuple[str, Any, bool]:
    name, future, last = ahead.popleft()
    return name, future.result(), last


def _jobs(converted: Converted, types: Mapping[str, str], rounding: Rounding) -> Iterator[_Job]:
    """The slabs of every tensor, each as a thunk that gives its bytes."""
    slab = partial(_slab, rounding.kernels)
    for name, kind in types.items():
        info = converted.tensors[name]
        data, info.tensor = info.tensor, None  # so that a tensor's memory ends with its last slab
        stored = converted.types[name]
        if chunks := getattr(data, "_chunks", None):  # a table that the converter itself takes in parts
            for number, chunk in enumerate(chunks, 1):
                part = partial(_read_chunk, chunk, info.shape[-1])
                yield name, partial(slab, name, part, stored, kind, None, 0, 0), number == len(chunks)
            continue
        if not isinstance(data, Pending) or stored not in _PLAIN:
            yield name, partial(_as_made, name, data, stored, kind), True
            continue
        source = data.source
        unturned = source if source is not None and source.shape == data.shape else None
        read = partial(_read_source, unturned) if unturned else _evaluated_reader(data)
        del data
        shape = info.shape
        width = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        for start, stop, weights in _pieces(rows, width, rounding.importance.get(name)):
            yield name, partial(slab, name, read, stored, kind, weights, start, stop), stop == rows


def _pieces(rows: int, width: int, importance: Any) -> Iterator[tuple[int, int, Any]]:
    """The slabs of a tensor, none over the end of an expert, each with the importance of its columns."""
    matrices = 1 if importance is None else len(importance)
    each = rows // matrices
    for number in range(matrices):
        weights = None if importance is None else importance[number]
        for start, stop in slabs(each, width):
            yield number * each + start, number * each + stop, weights


def _evaluated_reader(data: Pending) -> Callable[[int, int], Any]:
    """Rows, as a float array, of a tensor that the converter has turned around, which is in memory whole."""
    import numpy as np

    whole = _evaluated(data.data)
    flat = whole.reshape(-1, data.shape[-1] if data.shape else 1)
    return lambda start, stop: np.ascontiguousarray(flat[start:stop])


def _read_chunk(chunk: Callable[[], Any], width: int, start: int, stop: int) -> Any:
    return chunk().reshape(-1, width)


def _read_source(source: LazyTensor, start: int, stop: int) -> Any:
    return source.read(start, stop).float().numpy()


def _evaluated(data: Any) -> Any:
    to_eager = getattr(type(data), "to_eager", None)
    return to_eager(data) if to_eager else data


def _slab(
    kernels: Mapping[str, Kernel],
    name: str,
    read: Callable[[int, int], Any],
    stored: str,
    kind: str,
    importance: Any,
    start: int,
    stop: int,
) -> Any:
    """Rows in the type that the converter stores, then in the type that the file gets."""
    import numpy as np
    import torch

    values = torch.from_numpy(read(start, stop))
    rounded = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored])
    if kind == stored:
        raw = rounded.reshape(-1).view(torch.uint8).numpy()
        if kind != "F32" and not are_finite(rounded):
            raise StageError(f"{name} has values that {kind} cannot hold", hint="export it as bf16 or f32")
        return raw
    return quantize_rows(name, kind, np.ascontiguousarray(rounded.float().numpy()), kernels, importance)


def _as_made(name: str, data: Any, stored: str, kind: str) -> Any:
    """What the converter has packed itself (MXFP4, tables of integers): as it is, or not at all."""
    import numpy as np

    if stored != kind:
        raise StageError(f"{name} is stored as {stored} and cannot become {kind}")
    if isinstance(data, Pending):
        data = data.data
    return np.ascontiguousarray(_evaluated(data)).reshape(-1).view(np.uint8)
