"""`forge export --base --adapter --out`: its result, and bad input that leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from forge.errors import StageError
from forge.export.write import check_space
from forge.model.gguf_header import read_gguf
from tests.conftest import copy_of_tiny, tree
from tests.models import change_tensors
from tests.shipping import Answer, Workshop, wait_for

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500)]


@pytest.fixture
def place(tmp_path: Path, forge_home: Path) -> Workshop:
    """A copy of the small built-in base in `base`, and an empty `out`."""
    workshop = Workshop(tmp_path / "here", forge_home)
    workshop.directory.mkdir()
    copy_of_tiny(workshop.directory / "base")
    (workshop.directory / "out").mkdir()
    return workshop


def export(place: Workshop, *options: str) -> Answer:
    return place.forge("export", "--base", "base", "--out", "out/small.gguf", *options)


def left(place: Workshop) -> set[str]:
    return set(tree(place.directory / "out"))


def test_the_file_and_what_is_said_of_it(place: Workshop) -> None:
    """The contract's fields; no file beside it; the end of turn is found as a ship finds it."""
    told = export(place, "--quant", "Q4_K_M", "--threads", "2")
    assert told.code == 0, told.said
    assert left(place) == {"small.gguf"}
    gguf = place.directory / "out" / "small.gguf"
    header = read_gguf(gguf)
    fields = told.fields
    assert fields["gguf"] == str(gguf)
    assert fields["tensor_types"] == header.tensor_types
    assert fields["fallbacks"] == {}
    assert 0 < fields["seconds"] < 1500
    assert 100e6 < fields["peak_rss_bytes"] < 2e9
    # The header without weights is all that is written beside the file.
    assert gguf.stat().st_size <= fields["bytes_written"] < gguf.stat().st_size + 500_000
    tokenizer = json.loads((place.directory / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert header.metadata["tokenizer.ggml.eot_token_id"] == ids["<|im_end|>"]


def test_the_merged_checkpoint_is_kept_when_asked(place: Workshop) -> None:
    told = export(place, "--quant", "f16", "--keep-merged")
    assert told.code == 0, told.said
    assert told.fields["merged"] == str(place.directory / "out" / "small-merged")
    names = {name.partition("/")[2] for name in left(place) if "/" in name}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quant", "q4_k_x"), "--quant: no type q4_k_x"),
        (("--mode", "adapter"), "there is no adapter to export as a file of its own"),
        (("--adapter", "nowhere"), "nowhere: no such directory"),
    ],
)
def test_bad_options(place: Workshop, options: tuple[str, ...], message: str) -> None:
    told = export(place, *options)
    assert told.code == 2
    assert told.fields["error"]["message"].replace(f"{place.directory}/", "") == message
    assert told.fields["error"]["hint"]
    assert not left(place)


def _break(base: Path, fault: str) -> None:
    import torch

    weights = base / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-64])
    elif fault == "pickle":
        weights.rename(base / "pytorch_model.bin")
    elif fault == "nan":
        bad = torch.full((256,), float("nan"), dtype=torch.bfloat16)
        change_tensors(weights, {"model.norm.weight": bad})
    elif fault == "renamed":
        header = weights.read_bytes()
        weights.write_bytes(header.replace(b"layers.0.mlp.up_proj", b"layers.9.mlp.up_proj", 1))
    elif fault == "missing":
        change_tensors(weights, {"model.layers.0.mlp.up_proj.weight": None})
    elif fault == "gguf":
        weights.write_bytes(b"GGUF" + bytes(100))


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("truncated", 2, "base/model.safetensors: truncated: it has"),
        ("pickle", 2, "base: only pickled PyTorch weights (.bin, .pth) are there; safetensors are needed"),
        ("nan", 2, "model.safetensors: model.norm.weight has values that are not finite"),
        ("renamed", 2, "base: the checkpoint lacks model.layers.0.mlp.up_proj.weight, which Llama"),
        ("missing", 2, "base: the checkpoint lacks model.layers.0.mlp.up_proj.weight, which Llama"),
        ("gguf", 2, "base/model.safetensors: not a safetensors file"),
    ],
)
def test_broken_weights_are_one_clear_error(place: Workshop, fault: str, code: int, message: str) -> None:
    """One error each, no file under a final name, nothing temporary left."""
    _break(place.directory / "base", fault)
    told = export(place)
    error = told.fields["error"]
    assert error["message"].replace(f"{place.directory}/", "").startswith(message)
    assert error["hint"]
    assert told.code == error["code"] == code
    assert not left(place)


def test_two_exports_into_one_file(place: Workshop) -> None:
    """The second is told at once; what a killed one left is no obstacle, and is not published."""
    scratch = place.directory / "out" / ".small.gguf.partial"
    scratch.mkdir()
    for made in ("model.gguf", "adapter.gguf", "merged/config.json"):
        (scratch / made).parent.mkdir(exist_ok=True)
        (scratch / made).write_bytes(b"of an export that was killed")
    lock = os.open(scratch, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    told = export(place)
    assert told.code == 2
    assert told.fields["error"]["message"].startswith("another command writes ")
    os.close(lock)
    told = export(place, "--quant", "f16")
    assert told.code == 0 and not {"adapter_gguf", "merged"} & told.fields.keys()
    assert left(place) == {"small.gguf"}


def test_a_full_disk(place: Workshop) -> None:
    """The kernel refuses to let a file grow: the same end as a disk that is full in the middle."""
    shell = shutil.which("bash")
    assert shell
    line = 'ulimit -f 2048; exec "$0" "$@"'
    limited = _Limited(place.directory, place.home, (shell, "-c", line))
    told = export(limited, "--quant", "f32")
    assert told.code == 4
    assert "cannot be written: File too large" in told.fields["error"]["message"]
    assert not left(place)


@dataclass(frozen=True)
class _Limited(Workshop):
    """A workshop whose commands are started by `shell`."""

    shell: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [*self.shell, *super().command]


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    check_space(tmp_path, 1000)
    with pytest.raises(StageError, match=r"the GGUF needs 1000000.00 GB and [\d.]+ GB are free"):
        check_space(tmp_path, 10**15)


def test_ctrl_c_leaves_nothing(place: Workshop) -> None:
    with place.start("export", "--base", "base", "--out", "out/small.gguf", "--json") as child:
        scratch = place.directory / "out" / ".small.gguf.partial"
        wait_for("the header", (scratch / "work" / "header.gguf").exists, child)
        os.kill(child.pid, signal.SIGINT)
        told = place.heard(child)
    assert told.code == 130
    assert not left(place)


def test_plain_decides_nothing_for_the_converter(place: Workshop) -> None:
    """The built-in base has a tokenizer of its own, which upstream alone does not know."""
    told = export(place, "--plain")
    assert told.code == 4
    assert "BPE pre-tokenizer was not recognized" in told.fields["error"]["message"]
    assert not left(place)
