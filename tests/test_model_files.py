"""Checkpoints as they are found: whole, truncated, lying, or something else."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.model.checkpoint import open_checkpoint
from forge.model.safetensors_header import read_header
from tests.model_files import write_safetensors

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


def refusal(directory: Path) -> list[str]:
    """Every line that opening the checkpoint gives, without the directory."""
    with pytest.raises(DataError) as caught:
        open_checkpoint(directory)
    lines = [str(problem) for problem in caught.value.problems] or [caught.value.message]
    return [line.replace(f"{directory}/", "").replace(str(directory), ".") for line in lines]


def sharded(directory: Path, shards: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Path:
    """A checkpoint of F32 shards with its index."""
    for name, shapes in shards.items():
        write_safetensors(directory / name, shapes)
    weight_map = {tensor: name for name, shapes in shards.items() for tensor in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return sharded(tmp_path, {ONE: {"a": (2, 3), "b": (4,)}, TWO: {"c": (5, 1)}})


def test_a_single_file_is_read_with_its_extents(tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "model.safetensors", {"w": (2, 3), "scalar": (), "empty": (0, 4)}, "BF16"
    )
    checkpoint = open_checkpoint(tmp_path)
    data = path.stat().st_size - 14
    assert {
        name: (spec.shape, spec.start - data, spec.end - data) for name, spec in checkpoint.tensors.items()
    } == {
        "w": ((2, 3), 0, 12),
        "scalar": ((), 12, 14),
        "empty": ((0, 4), 14, 14),
    }
    assert (checkpoint.numel, checkpoint.files) == (7, (path,))


@pytest.mark.training
def test_headers_agree_with_the_reference_implementation(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(
        {
            "x": torch.ones(3, 5),
            "y": torch.ones(7, dtype=torch.bfloat16),
            "z": torch.ones(2, dtype=torch.int8),
        },
        path,
        metadata={"format": "pt"},
    )
    with safe_open(path, "pt") as reference:
        expected = {name: tuple(reference.get_slice(name).get_shape()) for name in sorted(reference.keys())}
    found = read_header(path)
    assert {name: spec.shape for name, spec in found.items()} == expected
    whole = path.read_bytes()
    assert struct.unpack("<15f", whole[found["x"].start : found["x"].end]) == (1.0,) * 15
    assert whole[found["z"].start : found["z"].end] == b"\x01\x01"


def test_shards_with_an_index(two: Path) -> None:
    checkpoint = open_checkpoint(two)
    assert {name: spec.file.name for name, spec in checkpoint.tensors.items()} == {
        "a": ONE,
        "b": ONE,
        "c": TWO,
    }
    assert (
        sum(tensor.bytes for tensor in checkpoint.tensors.values()),
        [path.name for path in checkpoint.files],
    ) == (60, [ONE, TWO])


def test_a_deleted_a_truncated_and_a_renamed_tensor_are_three_errors(two: Path) -> None:
    whole = (two / TWO).read_bytes()
    (two / TWO).unlink()
    assert refusal(two) == [f"{TWO}: missing: model.safetensors.index.json names this shard"]
    (two / TWO).write_bytes(whole[:-8])
    assert refusal(two) == [
        f"{TWO}: truncated: it has {len(whole) - 8} bytes of the {len(whole)} that its header asks for"
    ]
    (two / TWO).write_bytes(whole.replace(b'"c"', b'"d"'))
    assert refusal(two) == [
        f"{TWO}: tensor d is not in model.safetensors.index.json",
        f"{TWO}: tensor c is missing: model.safetensors.index.json says it is here",
    ]


def test_all_problems_are_said_at_once(two: Path) -> None:
    (two / ONE).write_text(POINTER)
    (two / TWO).write_bytes(b"")
    assert refusal(two) == [
        f"{ONE}: this is a Git LFS pointer, not the weights",
        f"{TWO}: truncated: 0 bytes are too few for a header",
    ]


def test_a_tensor_in_two_shards_or_in_another_one(two: Path) -> None:
    write_safetensors(two / TWO, {"c": (5, 1), "b": (4,)})
    assert refusal(two) == [f"{TWO}: tensor b is in more than one shard: {ONE}, {TWO}"]
    write_safetensors(two / ONE, {"a": (2, 3)})
    assert refusal(two) == [
        f"{ONE}: tensor b is missing: model.safetensors.index.json says it is here; it is in {TWO}"
    ]


def test_a_single_file_beside_an_index_that_does_not_name_it(two: Path) -> None:
    write_safetensors(two / "model.safetensors", {"a": (1,)})
    assert refusal(two) == [
        "model.safetensors: stands beside model.safetensors.index.json, which does not name it: delete one"
    ]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json: not a valid index: "),
        ("[]", "model.safetensors.index.json: it has no weight_map"),
        ('{"weight_map": {}}', "model.safetensors.index.json: it has no weight_map"),
        (
            '{"weight_map": {"a": "../elsewhere.safetensors"}}',
            "model.safetensors.index.json: tensor a: '../elsewhere.safetensors' is not the name of a shard",
        ),
    ],
)
def test_a_broken_index(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (line,) = refusal(tmp_path)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", ".: no weights: neither model.safetensors nor model.safetensors.index.json is there"),
        (
            "pytorch_model.bin",
            ".: only pickled PyTorch weights (.bin, .pth) are there; safetensors are needed",
        ),
        ("model.gguf", ".: only a GGUF is there; a base must be the original checkpoint in safetensors"),
        ("adapter_config.json", ".: this is an adapter, not a base"),
        (
            "consolidated.safetensors",
            ".: no model.safetensors; consolidated.safetensors is there, which transformers does not read",
        ),
        (
            "model.fp16.safetensors",
            ".: no model.safetensors; model.fp16.safetensors is there, which transformers does not read",
        ),
        (ONE, f".: model.safetensors.index.json is missing, but there are shards: {ONE}"),
    ],
)
def test_a_directory_without_weights_says_what_it_is(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    assert refusal(tmp_path) == [message]


def test_a_link_to_nothing_says_so(tmp_path: Path) -> None:
    """A copy of the hub's cache without its blobs."""
    (tmp_path / "model.safetensors").symlink_to("../../blobs/1234")
    assert refusal(tmp_path) == ["model.safetensors: a link to ../../blobs/1234, which is not there"]


@pytest.mark.parametrize("broken", ["model.safetensors.index.json", ONE])
def test_a_link_to_nothing_among_shards_says_so(broken: str, tmp_path: Path) -> None:
    (tmp_path / ONE).touch()
    index = json.dumps({"weight_map": {"a.weight": ONE}})
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (tmp_path / broken).unlink()
    (tmp_path / broken).symlink_to("../../blobs/1234")
    assert refusal(tmp_path) == [f"{broken}: a link to ../../blobs/1234, which is not there"]


def test_no_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == [".: no such directory"]


def entry(shape: list[int], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LYING: list[tuple[str, Mapping[str, Any], int, str]] = [
    (
        "overlap",
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
        12,
        "tensor b: its extent overlaps the one before",
    ),
    (
        "hole",
        {"a": entry([2], 0, 8), "b": entry([2], 12, 20)},
        20,
        "tensor b: its extent leaves a hole before it",
    ),
    ("start", {"a": entry([2], 8, 16)}, 16, "tensor a: its extent leaves a hole before it"),
    ("shape", {"a": entry([3], 0, 8)}, 8, "tensor a: shape [3] of F32 needs 12 bytes, the header gives it 8"),
    (
        "huge",
        {"a": entry([2**40, 2**40], 0, 8)},
        8,
        "tensor a: shape [1099511627776, 1099511627776] of F32 needs",
    ),
    ("rest", {"a": entry([2], 0, 8)}, 11, "3 bytes at its end belong to no tensor"),
    ("beyond", {"a": entry([2**20], 0, 2**22)}, 8, "truncated: it has"),
    ("dtype", {"a": entry([2], 0, 8, "F33")}, 8, "tensor a: unknown dtype 'F33'"),
    ("negative", {"a": entry([2], -8, 0)}, 8, "tensor a: its entry in the header is not valid"),
    ("text", {"a": entry([2], 0, "8")}, 8, "tensor a: its entry in the header is not valid"),
    ("bool", {"a": entry([1], False, 4)}, 4, "tensor a: its entry in the header is not valid"),
]


@pytest.mark.parametrize(
    ("header", "size", "message"), [row[1:] for row in LYING], ids=[row[0] for row in LYING]
)
def test_lying_extents_are_refused(
    tmp_path: Path, header: Mapping[str, Any], size: int, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + bytes(size))
    with pytest.raises(DataError) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "not a safetensors file: it starts like a PyTorch pickle"),
        (b"GGUF" + bytes(60), "not a safetensors file: it starts like something else"),
        (struct.pack("<Q", 2**60) + b"{}", "not a safetensors file: it starts like something else"),
        (struct.pack("<Q", 50) + b"{}", "truncated: it has 10 bytes of the 58 that its header asks for"),
        (struct.pack("<Q", 2) + b"{]", "not a safetensors file: its header is not valid: "),
        (
            struct.pack("<Q", 13) + b'{"a":1,"a":2}',
            "not a safetensors file: its header is not valid: 'a' stands",
        ),
        (POINTER.encode(), "this is a Git LFS pointer, not the weights"),
        (b"abc", "truncated: 3 bytes are too few for a header"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: {message}")
