"""Export in its worker: real vocabularies and architectures, proved against transformers by logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.vendor_chain import quantize
from forge import worker
from forge.adapter.tokenizer import copy_tokenizer
from forge.errors import CheckError, DataError, ForgeError, StageError
from forge.export import proof
from forge.export.request import Exported
from forge.export.run import export_gguf as make_gguf
from forge.model.gguf_header import read_gguf
from tests.exporting import export_request
from tests.models import change_json, change_tensors, load, make_adapter, make_model
from tests.vocabularies import converters, home_made_tokenizer

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500)]


def export(base: Path, adapter: Path | None, out: Path, **changes: Any) -> Exported:
    """As the stage calls it; `changes` go into the settings, or replace an argument."""
    out.mkdir(exist_ok=True)
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    settings = {"name": "yoda", "quant": "q4_k_m", "keep_merged": False, "threads": 2} | {
        name: value for name, value in changes.items() if name not in ("data", "tokenizer")
    }
    arguments: dict[str, Any] = {
        "base": str(base),
        "adapter": str(adapter) if adapter else None,
        "tokenizer": str(changes.get("tokenizer", base)),
        "chat_template": template,
        "data": str(changes["data"]) if "data" in changes else None,
        "out": str(out),
        "converters": str(converters()),
        "settings": settings,
    }
    return worker.perform(make_gguf, export_request(**arguments), log=out.with_suffix(".log"))


def normalised_error(base: Path, adapter: Path | None, gguf: Path) -> float:
    """Mean squared error of the GGUF's logits over the variance of transformers', in fp32."""
    import llama_cpp
    import numpy as np
    import torch

    ids = [int(number) for number in np.random.default_rng(0).integers(3, 300, 48)]
    with torch.inference_mode():
        expected = load(base, adapter)(torch.tensor([ids])).logits[0].numpy()
    model = llama_cpp.Llama(model_path=str(gguf), logits_all=True, n_ctx=64, verbose=False, n_threads=1)
    try:
        model.eval(ids)
        found = np.array(model.scores[: len(ids), : expected.shape[1]])
    finally:
        model.close()
    return float(((found - expected) ** 2).mean() / expected.var())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a home-made tokenizer, in several shards, and an rsLoRA adapter."""
    root = tmp_path_factory.mktemp("small")
    base = make_model(root / "base", "llama", "home-made", shards=2)
    return base, make_adapter(base, root / "adapter", r=16, use_rslora=True)


def test_home_made_tokenizer_whole(small: tuple[Path, Path], tmp_path: Path) -> None:
    """O1, O2, N5: one GGUF with K-quants, its ids proved, nothing else beside it."""
    base, adapter = small
    told = export(base, adapter, tmp_path / "out", end_of_turn_id=2)
    gguf = tmp_path / "out" / "model.gguf"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf"}
    assert told.bytes == gguf.stat().st_size
    assert told.architecture == "llama"
    assert told.quant == "q4_k_m"
    assert told.pre_tokenizer == "qwen2"
    assert told.fallbacks == {}
    assert told.tensor_types.keys() == {"Q4_K", "Q6_K", "F32"}
    assert told.ids_compared > 230
    assert told.ids_limits == ()
    header = read_gguf(gguf)
    assert header.metadata["general.name"] == "yoda"
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert header.metadata["tokenizer.ggml.eot_token_id"] == 2
    assert header.chat_template == (base / "chat_template.jinja").read_text(encoding="utf-8")
    assert answer(gguf)


def answer(gguf: Path) -> bool:
    """It answers through its own template."""
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(gguf), n_ctx=64, verbose=False, n_threads=1)
    try:
        reply = model.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=3)
    finally:
        model.close()
    return bool(reply["usage"]["completion_tokens"])


def test_no_path_of_this_machine_leaks(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    export(base, adapter, tmp_path / "out", quant="f16", keep_merged=True)
    told = repr(read_gguf(tmp_path / "out" / "model.gguf").metadata)
    for word in (str(base), str(adapter), str(tmp_path), tmp_path.name, "merged", "/tmp", "root"):
        assert word not in told
    kept = {path.name for path in (tmp_path / "out" / "merged").iterdir()}
    assert kept == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert normalised_error(tmp_path / "out" / "merged", None, tmp_path / "out" / "model.gguf") < 1e-4


@pytest.mark.parametrize(
    ("architecture", "vocabulary"),
    [
        ("llama", "home-made"),
        ("gpt2", "home-made"),
        ("phi3", "phi-3"),
        pytest.param("llama", "llama-spm", marks=pytest.mark.slow),
        pytest.param("gpt2", "gpt-2", marks=pytest.mark.slow),
        pytest.param("llama", "llama-bpe", marks=pytest.mark.slow),
        pytest.param("qwen2", "qwen2", marks=pytest.mark.slow),
    ],
)
def test_the_gguf_is_the_merged_model(architecture: str, vocabulary: str, tmp_path: Path) -> None:
    """L: NMSE under 1e-4 against fp32 base and adapter merged by peft; then q4_k_m of it loads."""
    width: dict[str, Any] = {"intermediate_size": 1024} if architecture == "gpt2" else {}
    base = make_model(tmp_path / "base", architecture, vocabulary, **width)
    options: Mapping[str, Any] = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    adapter = make_adapter(base, tmp_path / "adapter", alpha_pattern={"o_proj": 64}, **options)
    told = export(base, adapter, tmp_path / "out", quant="f16")
    gguf = tmp_path / "out" / "model.gguf"
    assert told.architecture == architecture
    assert normalised_error(base, adapter, gguf) < 1e-4
    assert normalised_error(base, None, gguf) > 1e-3, "the adapter changes nothing, so this proved nothing"
    quantize(str(gguf), str(tmp_path / "small.gguf"), "q4_k_m", 1)
    assert {"Q4_K", "Q6_K"} <= read_gguf(tmp_path / "small.gguf").tensor_types.keys()
    assert answer(tmp_path / "small.gguf")


def test_rows_that_k_quants_cannot_hold_are_reported(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama", "home-made", intermediate_size=640)
    told = export(base, None, tmp_path / "out")
    assert told.fallbacks.keys() == {f"blk.{layer}.ffn_down.weight" for layer in (0, 1)}
    assert set(told.fallbacks.values()) <= {"Q5_0", "Q8_0"}
    # 640 values are twenty blocks of 32.
    for quant in ("q4_1", "q5_1", "iq4_nl"):
        assert export(base, None, tmp_path / quant, quant=quant).fallbacks == {}


def fails(kind: type[ForgeError], base: Path, adapter: Path | None, out: Path, **changes: Any) -> str:
    """The message; nothing with a final name may be left."""
    with pytest.raises(kind) as caught:
        export(base, adapter, out, **changes)
    assert {path.name for path in out.iterdir()} <= {"work"}
    return "\n".join([caught.value.message, *map(str, caught.value.problems)])


def test_a_wrong_pre_tokenizer_stops_it_before_weights_are_written(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    """Silent wrong 13, seeded: the pattern of tokenizer.json says Qwen2's, its tokens another's."""
    base = shutil.copytree(small[0], tmp_path / "base")
    odd = home_made_tokenizer(r"\p{L}+|\p{N}{2}|[^\p{L}\p{N}]+")
    steps = home_made_tokenizer()["pre_tokenizer"]["pretokenizers"]
    odd["pre_tokenizer"]["pretokenizers"] = [steps[0] | {"behavior": "Removed"}, steps[1]]
    (base / "tokenizer.json").write_text(json.dumps(odd), encoding="utf-8")
    message = fails(CheckError, base, None, tmp_path / "out")
    assert "the GGUF's tokenizer gives other ids" in message
    work = tmp_path / "out" / "work"
    assert not list(work.rglob("*.safetensors"))
    assert {path.name for path in work.glob("*.gguf")} == {"header.gguf"}


def test_what_llama_cpp_would_not_load_is_not_published(tmp_path: Path) -> None:
    """The converter writes GPT-2 files of any width of MLP; llama.cpp loads those of one."""
    base = make_model(tmp_path / "base", "gpt2", "home-made", intermediate_size=512)
    message = fails(StageError, base, None, tmp_path / "out")
    assert message.startswith(
        "llama.cpp cannot load the converted model: llama_model_load: error loading model"
    )
    assert "wrong shape" in message


def test_broken_weights_leave_nothing(small: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(small[0], tmp_path / "base")
    shard = sorted(base.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in fails(DataError, base, None, tmp_path / "out")
    shard.unlink()
    assert shard.name in fails(DataError, base, None, tmp_path / "out")


def test_values_that_are_not_finite_leave_nothing(small: tuple[Path, Path], tmp_path: Path) -> None:
    import torch

    base = make_model(tmp_path / "base", "llama", "home-made")
    bad = torch.full((256,), float("inf"), dtype=torch.bfloat16)
    change_tensors(base / "model.safetensors", {"model.norm.weight": bad})
    message = fails(DataError, base, None, tmp_path / "out")
    assert message == "model.safetensors: model.norm.weight has values that are not finite"


def test_an_adapter_of_another_base_is_refused_first(small: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", "home-made", intermediate_size=768)
    message = fails(DataError, other, small[1], tmp_path / "out")
    assert "parts do not fit this base" in message
    assert not list((tmp_path / "out").rglob("*.gguf"))


def test_the_tokenizer_of_training_is_exported(small: tuple[Path, Path], tmp_path: Path) -> None:
    """D12, pitfall 31: an adapter's folder may carry a tokenizer of its own, and the pinned template."""
    base, adapter = small
    own = tmp_path / "own"
    own.mkdir()
    copy_tokenizer(base, own)
    change_json(own / "tokenizer_config.json", chat_template="{# an older one #}", pad_token="<|im_start|>")
    export(base, adapter, tmp_path / "out", quant="f16", tokenizer=own)
    header = read_gguf(tmp_path / "out" / "model.gguf")
    assert header.metadata["tokenizer.ggml.padding_token_id"] == 1
    assert header.chat_template == (base / "chat_template.jinja").read_text(encoding="utf-8")


def test_own_rows_are_compared(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = small
    rows = tmp_path / "rows"
    rows.mkdir()
    messages = [{"role": "user", "content": "Mine"}, {"role": "assistant", "content": "Thine"}]
    (rows / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 7, encoding="utf-8")
    told = export(base, None, tmp_path / "out", quant="f32", data=rows)
    assert told.ids_compared == 7 + sum("\0" not in text for text in proof.test_strings())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Three times the layers in about the same memory; both hold as much as may be made ahead."""
    wide: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048}
    peaks, sizes = [], []
    for layers in (20, 60):
        place = tmp_path / str(layers)
        base = make_model(place / "base", "llama", "home-made", num_hidden_layers=layers, **wide)
        found = export(base, make_adapter(base, place / "adapter"), place / "out")
        peaks.append(found.peak_rss_bytes)
        sizes.append((base / "model.safetensors").stat().st_size)
    assert sizes[1] - sizes[0] > 290e6
    # Held quantized, the layers would take 0.28 of their size more.
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0])
