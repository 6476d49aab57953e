"""No false alarm: sound exports of many families and seeds pass, in f16 and quantized from other sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.export.run import GGUF_FILE
from forge.verify.yardstick import make_quantized
from tests.exporting import export_here
from tests.models import PEFT_WARNS
from tests.specimens import Specimen, make_specimen, source_of

pytestmark = [
    pytest.mark.training,
    pytest.mark.programs,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    PEFT_WARNS,
]

# Routers of random weights are so undecided that float16's rounding turns choices at a fifth of positions.
NEAR_TIES: dict[str, Any] = {"num_local_experts": 8, "num_hidden_layers": 6}
# As the hub's Granites have them.
MULTIPLIED: dict[str, Any] = {
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}  # fmt: skip
SOUND: list[tuple[str, int, str, dict[str, Any]]] = [
    ("llama", 1, "q4_k_m", {}),
    ("llama", 2, "q8_0", {"tie_word_embeddings": False}),
    ("llama", 3, "q6_k", {"num_key_value_heads": 4}),
    ("llama", 4, "q5_k_m", {"num_key_value_heads": 1}),
    ("llama", 5, "q4_0", {"num_hidden_layers": 5}),
    ("llama", 6, "bf16", {"attention_bias": True}),
    ("qwen2", 7, "q4_k_m", {}),
    ("qwen2", 8, "q8_0", {"tie_word_embeddings": False}),
    ("qwen2", 9, "q3_k_m", {}),
    ("qwen3", 10, "q4_k_m", {"head_dim": 64}),
    ("qwen3", 11, "q2_k", {"head_dim": 64}),
    ("mistral", 12, "q4_k_m", {"sliding_window": None}),
    ("mistral", 13, "q8_0", {"sliding_window": None, "tie_word_embeddings": False}),
    ("gpt2", 14, "q4_k_m", {"intermediate_size": None}),
    ("gpt2", 15, "f16", {"intermediate_size": None}),
    ("smollm3", 16, "q8_0", {"num_key_value_heads": 4}),
    ("granite", 17, "q4_k_m", {"attention_multiplier": 0.015625}),
    ("smollm3", 18, "q5_k_m", {}),
    ("starcoder2", 19, "q4_k_m", {"sliding_window": None}),
    ("stablelm", 20, "q8_0", {"tie_word_embeddings": False}),
    ("phi3", 21, "q4_k_m", {}),
    ("gemma2", 22, "q4_k_m", {}),
    ("gemma3_text", 23, "q4_k_m", {}),
    ("mixtral", 24, "q4_k_m", {}),
    ("qwen3_moe", 25, "q4_k_m", {"norm_topk_prob": True}),
    ("mixtral", 27, "f16", NEAR_TIES),
    ("granite", 28, "q8_0", {**MULTIPLIED, "dtype": "f16"}),
    ("granite", 29, "f16", {**MULTIPLIED, "dtype": "f32"}),
    ("mixtral", 30, "f16", {"num_local_experts": 8, "dtype": "f32"}),
    ("mixtral", 31, "q4_k_m", {"num_local_experts": 8, "dtype": "f16"}),
]
# Each architecture once and each type; the others in `make campaign`.
EVERY_TIME = {1, 2, 3, 6, 8, 9, 11, 12, 15, 16, 17, 19, 20, 21, 22, 23, 24, 25}


@pytest.mark.parametrize(
    ("architecture", "seed", "quant", "changes"),
    [one if one[1] in EVERY_TIME else pytest.param(*one, marks=pytest.mark.campaign) for one in SOUND],
)
def test_sound(architecture: str, seed: int, quant: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp's own conversion and quantization of an adapted model is what it should be."""
    specimen = make_specimen(tmp_path / "specimen", architecture, seed=seed, **changes)
    f16 = file = specimen.f16(tmp_path / "f16")
    if quant != "f16":
        file = tmp_path / "file.gguf"
        make_quantized(f16, file, quant, 2)
    found = specimen.verify(file, f16=str(f16))
    assert found["ok"], (found["verdict"], found["handovers"])


@pytest.mark.parametrize("quant", ["q4_k_m", "q6_k", "q8_0"])
@pytest.mark.parametrize("source", ["bf16", "f32"])
def test_quantized_from_another_source(source: str, quant: str, tmp_path: Path) -> None:
    """Others quantize from bf16 or f32: other bytes than from f16, and no fault."""
    specimen = make_specimen(tmp_path / "specimen", "llama", seed=30)
    make_quantized(_exported(specimen, source, tmp_path), tmp_path / "file.gguf", quant, 2)
    found = specimen.verify(tmp_path / "file.gguf")
    assert found["ok"], (found["verdict"], found["handovers"])


@pytest.mark.parametrize(("source", "quant"), [("f32", "q6_k"), ("bf16", "q8_0"), ("q8_0", "q8_0")])
def test_a_mixture_quantized_from_another_source(source: str, quant: str, tmp_path: Path) -> None:
    """Its near ties turn otherwise than in llama.cpp's own; forge rounds the merged float32 itself."""
    specimen = make_specimen(tmp_path / "specimen", "mixtral", seed=27, **NEAR_TIES)
    file = _exported(specimen, source, tmp_path)
    if source != quant:
        make_quantized(file, tmp_path / "file.gguf", quant, 2)
        file = tmp_path / "file.gguf"
    found = specimen.verify(file)
    assert found["ok"], (found["verdict"], found["handovers"])


def _exported(specimen: Specimen, quant: str, directory: Path) -> Path:
    """forge's own file of that type."""
    (directory / "exported").mkdir()
    settings = {"name": "yoda", "quant": quant, "keep_merged": False, "threads": 2, "end_of_turn_id": 2}
    export_here(**source_of(specimen), data=None, out=str(directory / "exported"), settings=settings)
    return directory / "exported" / GGUF_FILE
