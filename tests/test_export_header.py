"""The header's arrays are packed at once, and have the bytes that gguf-py gives item by item."""

from __future__ import annotations

import enum
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

from forge.export.header import write_header
from forge.export.upstream import Converted

pytestmark = pytest.mark.training


class Kind(enum.IntEnum):
    NORMAL = 1
    CONTROL = 3


class Text(str):
    """As a tokenizer's own class may be."""


def writer_of(values: dict[str, Any], sub_type: Any = None) -> Any:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_uint32("llama.block_count", 2)
    for name, value in values.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, sub_type)
    return writer


def by_gguf_py(path: Path, writer: Any) -> bytes:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return path.read_bytes()


def by_forge(path: Path, writer: Any) -> bytes:
    converted = Converted(writer, {})
    write_header(converted, path, converted.metadata, {})
    return path.read_bytes()


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
    arrays = {"tokenizer.ggml.x": values, "tokenizer.ggml.y": ["z"]}
    expected = by_gguf_py(tmp_path / "plain.gguf", writer_of(arrays))
    assert by_forge(tmp_path / "ours.gguf", writer_of(arrays)) == expected


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "UINT8"), ([1.0, 1e39], "FLOAT64"), ([1, 2**40], "INT64"), (["a"], "STRING"), ([], "STRING")],
)
def test_an_array_of_a_named_type_has_them_too(tmp_path: Path, values: Any, kind: str) -> None:
    sub_type = gguf.GGUFValueType[kind]
    if not values:
        with pytest.raises(ValueError, match="Empty array"):
            by_forge(tmp_path / "ours.gguf", writer_of({"x": values}, sub_type))
        return
    expected = by_gguf_py(tmp_path / "plain.gguf", writer_of({"x": values}, sub_type))
    assert by_forge(tmp_path / "ours.gguf", writer_of({"x": values}, sub_type)) == expected


@pytest.mark.parametrize(
    "values", [["a"] * 1000, [1] * 1000, [0.5] * 1000], ids=["texts", "whole", "numbers"]
)
def test_long_arrays_are_not_packed_item_by_item(
    tmp_path: Path, values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    pack = gguf.GGUFWriter._pack_val

    def counted(self: Any, *arguments: Any, **more: Any) -> bytes:
        asked.append(arguments)
        made: bytes = pack(self, *arguments, **more)
        return made

    monkeypatch.setattr(gguf.GGUFWriter, "_pack_val", counted)
    by_forge(tmp_path / "ours.gguf", writer_of({"x": values}))
    assert len(asked) < 10


@pytest.mark.parametrize(
    "values", [[1, "a"], [1, 2.0], [True, 1], [2**31]], ids=["text", "fraction", "truth", "too large"]
)
def test_an_array_that_gguf_py_refuses_is_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises((ValueError, struct.error)) as expected:
        by_gguf_py(tmp_path / "plain.gguf", writer_of({"x": values}))
    with pytest.raises(expected.type) as found:
        by_forge(tmp_path / "ours.gguf", writer_of({"x": values}))
    assert str(found.value) == str(expected.value)
