"""GGUFs written anew by gguf-py: in several parts, or an adapter's factors as another type. Runs in a worker.

llama.cpp's quantizer does neither: it writes parts only as it read them, and takes no adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge.errors import StageError
from forge.export.types import file_type

ADAPTER_TYPES = ("f32", "f16", "bf16", "q8_0")


# What the writer says itself: it pads to the default alignment, which every part then has.
_OWN = ("general.architecture", "general.alignment")


def split_file(source: Path, most_bytes: int) -> tuple[Path, ...]:
    """Write parts as llama.cpp's loader takes them, all metadata in the first, and remove `source`.

    A tensor is not divided: a part holds at least one.
    """
    import gguf

    reader = gguf.GGUFReader(str(source))
    target = source.with_name("parts") / source.name
    target.parent.mkdir()
    writer = _writer(reader, target, split_max_size=most_bytes)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    _finish(writer)
    source.unlink()
    return tuple(sorted(target.parent.iterdir()))


def round_adapter(source: Path, target: Path, quant: str) -> float:
    """Write an adapter's GGUF with factors of the type `quant`; gives how far a factor moved at most.

    That is the root mean square over the factor's own. Rows that hold no block of q8_0 become f16, as
    llama.cpp's converter has them. Raises `StageError` for values that the type cannot hold.
    """
    import gguf
    import numpy as np
    from gguf import quants

    reader = gguf.GGUFReader(str(source))
    writer = _writer(reader, target, "general.file_type")
    writer.add_uint32("general.file_type", file_type(quant))
    asked, farthest = gguf.GGMLQuantizationType[quant.upper()], 0.0
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        is_whole = values.shape[-1] % gguf.GGML_QUANT_SIZES[asked][0] == 0
        kind = asked if is_whole else gguf.GGMLQuantizationType.F16
        with np.errstate(over="ignore"):
            rounded = quants.quantize(values, kind)
        moved = float(np.linalg.norm(quants.dequantize(rounded, kind) - values))
        if not np.isfinite(moved):
            raise StageError(f"{tensor.name} has values that {quant} cannot hold", hint="take bf16 or f32")
        farthest = max(farthest, moved / (float(np.linalg.norm(values)) or 1.0))
        writer.add_tensor(tensor.name, rounded, raw_dtype=kind)
    _finish(writer)
    return farthest


def _writer(reader: Any, target: Path, *left_out: str, **options: int) -> Any:
    """A writer of a file with the metadata of what is read, but for some and for what parts have."""
    import gguf

    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(target), architecture, **options)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "split.")) and name not in (*_OWN, *left_out):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    return writer


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
