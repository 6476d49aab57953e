"""GGUF files as they are found: whole, truncated, lying, or something else."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.model.gguf_header import LongArray, read_gguf, read_whole_gguf
from tests.model_files import write_gguf
from tests.specimens import rewrite
from tests.tiny_gguf import write_tiny_gguf
from tests.vocabularies import llama_cpp_models

TOKENS = tuple(f"token {number}" for number in range(300))


def test_a_gguf_says_what_it_is(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        {
            "general.architecture": "llama",
            "tokenizer.chat_template": "{{ messages }}",
            "llama.rope.freq_base": 10000.0,
            "tokenizer.add_bos": False,
            "short": (1, 2, 3),
            "tokenizer.ggml.tokens": TOKENS,
            "scores": tuple(float(number) for number in range(300)),
        },
        {"token_embd.weight": (12, (3, 256)), "output_norm.weight": (0, (256,)), "blk.0.w": (14, (2, 512))},
    )
    header = read_gguf(path)
    assert (header.version, header.alignment, header.architecture) == (3, 32, "llama")
    assert header.chat_template == "{{ messages }}"
    assert header.metadata["short"] == (1, 2, 3)
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], LongArray)
    assert header.array("tokenizer.ggml.tokens") == TOKENS
    assert header.array("scores")[299] == 299.0
    assert header.tensor_types == {"Q4_K": 1, "F32": 1, "Q6_K": 1}
    extents = {name: (tensor.shape, tensor.end - tensor.start) for name, tensor in header.tensors.items()}
    assert extents == {
        "token_embd.weight": ((3, 256), 3 * 144),
        "output_norm.weight": ((256,), 1024),
        "blk.0.w": ((2, 512), 4 * 210),
    }
    assert max(tensor.end for tensor in header.tensors.values()) <= path.stat().st_size


@pytest.mark.training
def test_a_gguf_agrees_with_gguf_py(tmp_path: Path) -> None:
    import gguf
    import numpy

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(list(TOKENS))
    writer.add_uint32("some.number", 7)
    writer.add_tensor("a", numpy.ones((3, 5), dtype=numpy.float32))
    writer.add_tensor("b", numpy.full((4, 2), 2, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(path)
    assert header.metadata["some.number"] == 7
    assert header.array("tokenizer.ggml.tokens") == TOKENS
    found = {name: (tensor.type, tensor.shape) for name, tensor in header.tensors.items()}
    assert found == {"a": ("F32", (3, 5)), "b": ("F16", (4, 2))}
    last = header.tensors["b"]
    assert struct.unpack("<8e", path.read_bytes()[last.start : last.end]) == (2.0,) * 8


def test_every_shorter_gguf_is_truncated(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", {"general.architecture": "llama", "list": TOKENS}, {"w": (0, (2, 4))}
    )
    whole = path.read_bytes()
    for size in range(4, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"m\.gguf: truncated: "):
            read_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "GGUF version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "a big-endian GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(9), "truncated: "),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(9), "truncated: "),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 99), "metadata k: unknown value type 99"),
    ],
)
def test_what_is_no_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_gguf(path)
    assert caught.value.message.startswith(f"{path}: {message}")


def test_gguf_tensors_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    cases: dict[str, dict[str, Any]] = {
        "unknown type 77": {"tensors": {"w": (77, (2, 4))}},
        "rows of 100 values do not divide into blocks of Q4_K": {"tensors": {"w": (12, (2, 100))}},
        "its offset overlaps another or is not aligned": {
            "tensors": {"w": (0, (64,)), "x": (0, (64,))},
            "offsets": (0, 32),
        },
        "truncated: it has": {"tensors": {"w": (0, (64,))}, "offsets": (2**40,)},
    }
    for message, case in cases.items():
        write_gguf(path, {}, **case)
        with pytest.raises(DataError, match=message):
            read_gguf(path)
    with pytest.raises(DataError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(("count", "is_part"), [(None, False), (0, False), (1, False), (2, True)])
def test_one_of_several_parts_is_no_whole_file(tmp_path: Path, count: int | None, is_part: bool) -> None:
    """`llama-gguf-split --merge` leaves 0 as the number of parts."""
    path = write_gguf(tmp_path / "m.gguf", {} if count is None else {"split.count": count}, {})
    if is_part:
        with pytest.raises(DataError, match=r"m\.gguf is one of the 2 parts"):
            read_whole_gguf(path)
    else:
        assert read_whole_gguf(path) == read_gguf(path)


def test_bos_is_put_before_prompts_where_llama_cpp_puts_it(tmp_path: Path) -> None:
    """B of many a GGUF: it does not say so, and llama.cpp goes by the kind of the vocabulary."""
    import llama_cpp

    told = {}
    named: dict[str, Any] = {"tokenizer__ggml__add_bos_token": False, "tokenizer__ggml__pre": "gemma4"}
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=False)
    overridden = rewrite(tiny, tmp_path / "overridden.gguf", **named)  # Gemma 4: true whatever a file says
    for path in (overridden, *sorted(llama_cpp_models().glob("ggml-vocab-*.gguf"))):
        model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
        try:
            vocabulary = llama_cpp.llama_model_get_vocab(model.model)
            told[path.name] = (read_gguf(path).adds_bos, llama_cpp.llama_vocab_get_add_bos(vocabulary))
        finally:
            model.close()
    assert {name: ours for name, (ours, _) in told.items()} == {
        name: theirs for name, (_, theirs) in told.items()
    }
    assert {ours for ours, _ in told.values()} == {True, False}
    assert told[overridden.name] == (True, True)
