"""The header's arrays are packed at once, and have the bytes that gguf-py gives item by item."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import gguf
import pytest

from forge.export.header import write_header
from forge.export.upstream import Converted


class Kind(enum.IntEnum):
    NORMAL = 1
    CONTROL = 3


class Text(str):
    """As a tokenizer's own class may be."""


def writer_of(values: dict[str, Any]) -> Any:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_uint32("llama.block_count", 2)
    for name, value in values.items():
        writer.add_array(name, value)
    return writer


def both(tmp_path: Path, values: dict[str, Any]) -> tuple[bytes, bytes]:
    """The header as gguf-py writes it, and as forge does, twice, which packs once."""
    plain, ours = tmp_path / "plain.gguf", tmp_path / "ours.gguf"
    writer = writer_of(values)
    writer.write_header_to_file(plain)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    converted = Converted(writer_of(values), {})
    write_header(converted, tmp_path / "first.gguf", converted.metadata, {})
    write_header(converted, ours, converted.metadata, {})
    assert (tmp_path / "first.gguf").read_bytes() == ours.read_bytes()
    return plain.read_bytes(), ours.read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(["a", "", "ü", "日本語", "👩‍👩‍👧", "a\0b"], id="texts"),
        pytest.param([b"a", b"\xff\xfe", b""], id="bytes"),
        pytest.param(["a", b"b", Text("c")], id="texts and bytes"),
        pytest.param([0, -1, 2**31 - 1, -(2**31)], id="whole numbers"),
        pytest.param([Kind.NORMAL, Kind.CONTROL, 1], id="named numbers"),
        pytest.param([0.0, -1.5, 3.4e38, 1e-45], id="numbers"),
        pytest.param([True, False], id="truths"),
        pytest.param([["a", "b"], ["c"]], id="lists"),
        pytest.param(b"abc", id="one stretch of bytes"),
        pytest.param(("a", "b"), id="a tuple"),
        pytest.param([1], id="one"),
    ],
)
def test_an_array_has_the_bytes_of_gguf_py(tmp_path: Path, values: Any) -> None:
    expected, found = both(tmp_path, {"tokenizer.ggml.x": values, "tokenizer.ggml.y": ["z"]})
    assert found == expected


@pytest.mark.parametrize(
    "values", [[1, "a"], [1, 2.0], [True, 1], [2**31]], ids=["text", "fraction", "truth", "too large"]
)
def test_an_array_that_gguf_py_refuses_is_refused(tmp_path: Path, values: Any) -> None:
    converted = Converted(writer_of({"tokenizer.ggml.x": values}), {})
    with pytest.raises(Exception, match=r"same type|format requires|argument out of range"):
        write_header(converted, tmp_path / "ours.gguf", converted.metadata, {})
