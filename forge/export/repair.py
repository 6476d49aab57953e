"""A GGUF's metadata made what base and adapter say it is, in a copy with the same weights. Runs in a worker.

llama.cpp's converter lays the model out from the base, as for an export, and its token ids are proved. What
the file says otherwise of vocabulary, template, architecture, sampling or licence is replaced; everything
else that it says of itself, and every tensor's bytes, stay. The certificate of the copy is the command's.

Not covered: an adapter's own GGUF, tensors that are missing or too many.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from forge import report
from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import check_tokenizer, fit
from forge.export.describe import describe
from forge.export.header import write_header
from forge.export.merge import base_tensors, merged_tensors
from forge.export.request import ExportRequest, Ingredients
from forge.export.run import HEADER, lay_out
from forge.export.tensors import one_thread
from forge.export.upstream import Converted, Metadata, without_collection
from forge.export.write import check_space, writing
from forge.model.checkpoint import open_checkpoint, refuse_packed
from forge.model.gguf_header import GgufHeader, GgufTensor, read_gguf

_OURS = ("tokenizer.", "general.sampling.", "general.license")
"""Beside the architecture's own keys, metadata that the base decides."""
_NAME = "general.name"  # llama.cpp reads some vocabularies by it
_LAID_OUT_ANEW = "general.alignment"
_SLAB = 1 << 24
_SHOWN = 60


@dataclass(frozen=True)
class Repair:
    """What is asked: `gguf` as its `model` says it should be, in the file `out`, whose directory is there."""

    model: Ingredients
    gguf: Path
    out: Path


@dataclass(frozen=True)
class MetadataChange:
    """A key of the metadata, and what it was and is now; None where it is not there."""

    key: str
    was: str | None
    now: str | None

    def __str__(self) -> str:
        if self.was is None:
            return f"{self.key}: {self.now} (it was missing)"
        return f"{self.key}: {self.was} → {self.now or 'left out'}"


@dataclass(frozen=True)
class Repaired:
    """`changes` are in the copy; it is there if there are any, and nothing stands in `beyond`.

    `beyond`: what no metadata can say otherwise, since the weights are not those of the model.
    """

    changes: tuple[MetadataChange, ...]
    beyond: tuple[str, ...]


def repair(request: Repair) -> Repaired:
    """Write the copy, if it would differ only in its metadata.

    Raises what an export of the model raises, and `StageError` for a full disk.
    """
    header = read_gguf(request.gguf)
    work = request.out.with_name("work")
    converted = laid_out(request.model, _name_of(header), work)
    if beyond := tuple(_beyond(header, converted)):
        return Repaired((), beyond)
    theirs, ours = _metadata(request.gguf), _metadata(work / HEADER)
    fixed = _fixed(theirs, ours, header.architecture)
    changes = tuple(_changes(theirs, fixed))
    if changes:
        report.info(f"{len(changes)} of {len(theirs)} metadata keys are not those of the base")
        _write(converted, header, request.out, fixed)
        read_gguf(request.out)
    return Repaired(changes, ())


def _name_of(header: GgufHeader) -> str:
    return str(header.metadata.get(_NAME) or header.path.stem)


def laid_out(model: Ingredients, name: str, work: Path) -> Converted:
    """What llama.cpp's converter makes of the model, its header in `work` as `HEADER`; no weight is read."""
    description = work / "description"
    description.mkdir(parents=True)
    checkpoint = open_checkpoint(model.base)
    refuse_packed(checkpoint)
    fitted = fit(read_adapter(model.adapter), checkpoint) if model.adapter else None
    if fitted:
        check_tokenizer(fitted, model.tokenizer)
    describe(model.base, model.tokenizer, model.chat_template, description, fitted)
    tensors = merged_tensors(fitted) if fitted else base_tensors(checkpoint)
    with without_collection(), one_thread():
        converted, _ = lay_out(description, work, tensors, ExportRequest(model, work, name, "f16"), fitted)
    return converted


def _beyond(header: GgufHeader, converted: Converted) -> list[str]:
    """What of the file's tensors is not the model's by name or shape; values are the certificate's."""
    expected = {name: tuple(info.shape) for name, info in converted.tensors.items()}
    problems = [f"the tensor {name} is missing" for name in expected if name not in header.tensors]
    problems += [f"the tensor {name} is not the model's" for name in header.tensors if name not in expected]
    for name, tensor in header.tensors.items():
        if name in expected and tensor.shape != expected[name]:
            what = ": another size of the vocabulary" if name == "token_embd.weight" else ""
            problems.append(f"{name} has the shape {tensor.shape}, the model's has {expected[name]}{what}")
    return problems


def _metadata(path: Path) -> Metadata:
    """The metadata of a GGUF as gguf-py's writer takes it."""
    import gguf
    from gguf.gguf_writer import GGUFValue

    return {
        name: GGUFValue(field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in gguf.GGUFReader(str(path)).fields.items()
        if not name.startswith("GGUF.")
    }


def _fixed(theirs: Metadata, ours: Metadata, architecture: str) -> Metadata:
    """The file's metadata in its order, with what the base decides as the base has it."""
    decided = (*_OURS, *{f"{name}." for name in (architecture, ours["general.architecture"].value)})

    def is_ours(name: str) -> bool:
        return name.startswith(decided) or name in (_NAME, "general.architecture")

    kept = {
        name: ours[name] if is_ours(name) else value
        for name, value in theirs.items()
        if name != _LAID_OUT_ANEW and (name in ours or not is_ours(name))
    }
    same = {name: theirs[name] for name in kept if name in theirs and _is_same(kept[name], theirs[name])}
    return {**kept, **same, **{name: ours[name] for name in ours if is_ours(name) and name not in kept}}


def _changes(theirs: Metadata, fixed: Metadata) -> list[MetadataChange]:
    names = [name for name in {**theirs, **fixed} if name != _LAID_OUT_ANEW]
    changes = []
    for name in names:
        before, after = theirs.get(name), fixed.get(name)
        if before is None or after is None:
            changes.append(MetadataChange(name, *_shown(before and before.value, after and after.value)))
        elif before.value != after.value:
            changes.append(MetadataChange(name, *_shown(before.value, after.value)))
        elif not _is_same(before, after):
            changes.append(MetadataChange(name, *(f"of type {value.type.name}" for value in (before, after))))
    return changes


def _is_same(first: Any, second: Any) -> bool:
    """Value and type: llama.cpp does not load a number or a flag of another type than it asks for."""
    return bool(first.value == second.value and first.type == second.type)


def _shown(before: object, after: object) -> tuple[str | None, str | None]:
    """The two values; of long lists of one length how many differ."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        number = next(at for at, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        differ = sum(first != second for first, second in zip(before, after, strict=True))
        return f"{before[number]!r} at {number}", f"{after[number]!r} ({differ} of {len(after)} differ)"
    first, second = (
        None if value is None else f"{len(value)} values" if isinstance(value, list) else _short(value)
        for value in (before, after)
    )
    return first, second


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(str(value))} characters)"


def _write(converted: Converted, header: GgufHeader, out: Path, metadata: Metadata) -> None:
    tensors = sorted(header.tensors.values(), key=lambda tensor: tensor.start)
    alignment: int = converted.writer.data_alignment
    with writing(out.parent):
        check_space(out.parent, header.path.stat().st_size)
        types = {tensor.name: tensor.type for tensor in tensors}
        start = write_header(converted, out, metadata, types)
        with out.open("r+b") as target, header.path.open("rb") as source:
            target.seek(0, os.SEEK_END)
            target.write(bytes(start - target.tell()))
            for tensor in tensors:
                _copy(source, tensor, target)
                target.write(bytes(-target.tell() % alignment))
            target.flush()
            os.fsync(target.fileno())


def _copy(source: BinaryIO, tensor: GgufTensor, target: BinaryIO) -> None:
    source.seek(tensor.start)
    left = tensor.end - tensor.start
    while left:
        slab = source.read(min(left, _SLAB))
        target.write(slab)
        left -= len(slab)
