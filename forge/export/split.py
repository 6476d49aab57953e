"""A GGUF as several files of a size, as llama.cpp's loader takes them: all metadata is in the first."""

from __future__ import annotations

from pathlib import Path


def split_file(source: Path, most_bytes: int) -> tuple[Path, ...]:
    """Write the parts beside `source` and remove it; a file that is small enough stays as it is.

    A tensor is not divided: a part holds at least one. Runs in a worker.
    """
    import gguf

    reader = gguf.GGUFReader(str(source))
    architecture = reader.fields["general.architecture"].contents()
    target = source.with_name("parts") / source.name
    target.parent.mkdir()
    writer = gguf.GGUFWriter(str(target), architecture, split_max_size=most_bytes)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "split.")) and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source.unlink()
    return tuple(sorted(target.parent.iterdir()))
