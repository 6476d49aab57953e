"""The streamed reference gives what transformers and peft give with the whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.export.request import ExportRequest
from forge.export.run import GGUF_FILE, export_gguf
from forge.model.safetensors_header import read_header
from forge.train.arithmetic import Arithmetic
from forge.train.hardware import choose_hardware
from forge.train.model import BaseSettings, arithmetic_of, load_base
from forge.verify.loader import Weights
from forge.verify.measurement import Gates
from forge.verify.reference import logits, with_greedy
from forge.verify.rounding import RoundedTypes
from forge.verify.sample import Sample
from forge.verify.verdict import judge
from tests.exporting import ingredients
from tests.models import PEFT_WARNS, change_tensors, load, make_adapter, make_model
from tests.specimens import make_specimen, source_of
from tests.test_data_tokens import format_of

pytestmark = [pytest.mark.training, pytest.mark.timeout(1500), PEFT_WARNS]

ROWS = ((5, 9, 200, 31, 7, 80), (300, 11, 12), (4, 4, 4, 4, 90, 17, 33, 250, 9))
SAMPLE = Sample(ROWS, ((0, 0), (0, 4), (1, 1), (2, 0), (2, 7)), (True,) * 5, 3)


def _whole(model: Any) -> Any:
    """The same positions from one forward of each row without padding."""
    import torch

    with torch.inference_mode():
        rows = [model(torch.tensor([row])).logits[0] for row in ROWS]
    return torch.stack([rows[row][place] for row, place in SAMPLE.positions]).numpy()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_streamed_is_whole(architecture: str, tmp_path: Path) -> None:
    """In pieces or at once, with the adapter or without; peft's own, active and not merged."""
    import numpy as np

    base = make_model(tmp_path / "base", architecture, "home-made", shards=2)
    # Of experts, which peft adapts fused, the adapter's reader knows nothing.
    targets = ["q_proj", "v_proj"] if architecture in ("mixtral", "qwen3_moe") else "all-linear"
    adapter = make_adapter(base, tmp_path / "adapter", use_rslora=True, target_modules=targets)
    plain = logits(Weights(base), SAMPLE, "base")
    np.testing.assert_allclose(plain, _whole(load(base)), atol=2e-4, rtol=1e-4)
    tuned = logits(Weights(base, adapter), SAMPLE, "tuned")
    np.testing.assert_allclose(tuned, _whole(load(base, adapter, merge=False)), atol=2e-4, rtol=1e-4)
    assert np.abs(tuned - plain).max() > 0.05


def test_dora_is_pefts_own(tmp_path: Path) -> None:
    """Each row of the sum has its learned length; without the magnitudes it would be another model."""
    import numpy as np

    base = make_model(tmp_path / "base", "llama", "home-made")
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True, use_rslora=True)
    tuned = logits(Weights(base, adapter), SAMPLE, "tuned")
    np.testing.assert_allclose(tuned, _whole(load(base, adapter, merge=False)), atol=2e-4, rtol=1e-4)
    magnitudes = [name for name in read_header(adapter / "adapter_model.safetensors") if "magnitude" in name]
    assert len(magnitudes) == 14
    change_tensors(adapter / "adapter_model.safetensors", dict.fromkeys(magnitudes))
    with pytest.raises(DataError, match="peft is not given 14 of its parts"):
        logits(Weights(base, adapter), SAMPLE, "plain")


# Settings and kinds of layers, each in peft's own words; what the export does of them is its own affair.
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Conv1D, DoRA": ("gpt2", {"use_dora": True, "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*v_proj": 64}}),
    "whole modules": ("llama", {"modules_to_save": ["input_layernorm", "down_proj"]}),
    "fused experts": (
        "mixtral",
        {"target_modules": ["q_proj"],
         "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "a layer's number": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
def test_whatever_peft_does_is_done(case: str, tmp_path: Path) -> None:
    import numpy as np

    architecture, options = KINDS[case]
    base = make_model(tmp_path / "base", architecture, "home-made")
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    tuned = logits(Weights(base, adapter), SAMPLE, "tuned")
    np.testing.assert_allclose(tuned, _whole(load(base, adapter, merge=False)), atol=2e-4, rtol=1e-4)
    assert np.abs(tuned - logits(Weights(base), SAMPLE, "plain")).max() > 0.02


def test_rounded_is_the_merged_model_rounded(tmp_path: Path) -> None:
    """What a file in BF16 holds is the sum of weight and factors; vectors stay as they are."""
    import numpy as np

    base = make_model(tmp_path / "base", "llama", "home-made")
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = load(base, adapter)
    tuned = _whole(merged)
    for parameter in merged.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16().float()
    rounding, lost = RoundedTypes({}, lambda name: None, "BF16"), dict[str, float]()
    found = logits(Weights(base, adapter, rounding=rounding), SAMPLE, "rounded", lost)
    np.testing.assert_allclose(found, _whole(merged), atol=2e-3)
    assert np.abs(found - tuned).max() > 1e-2
    adapted = [share for name, share in lost.items() if "_proj" in name]
    assert len(adapted) == 14 and all(1e-4 < share < 2**-8 for share in adapted)


def test_what_the_reference_would_have_written(tmp_path: Path) -> None:
    """Two answers to one prompt: its own, and one whose second token is another."""
    import torch

    base = make_model(tmp_path / "base", "llama", "home-made")
    model, prompt = load(base), ROWS[1]
    own = list(prompt)
    for _ in range(3):
        own.append(int(model(torch.tensor([own])).logits[0, -1].argmax()))
    answer = own[len(prompt) :]
    other = [answer[0], answer[1] + 1, answer[2]]
    found, greedy = with_greedy(Weights(base), SAMPLE, [(prompt, answer), (prompt, other)], "greedy")
    assert (greedy.prompts, greedy.same, greedy.first_difference) == (2, 1, (None, 1))
    assert found.shape[0] == len(SAMPLE.positions)


def test_names_that_torch_compile_left_are_pefts(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.torch import load_file

    base = make_model(tmp_path / "base", "llama", "home-made")
    adapter = make_adapter(base, tmp_path / "adapter")
    expected = logits(Weights(base, adapter), SAMPLE, "peft's names")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(".self_attn.", "._orig_mod.self_attn."): one for name, one in tensors.items()}
    change_tensors(adapter / "adapter_model.safetensors", {**dict.fromkeys(tensors), **renamed})
    np.testing.assert_array_equal(logits(Weights(base, adapter), SAMPLE, "wrapped"), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_4_bit_reference_is_what_bitsandbytes_trains_on(training: bool, tmp_path: Path) -> None:
    """In float32 arithmetic, as the base of QLoRA is there, on whatever processor and in either mode."""
    import numpy as np

    base = make_model(tmp_path / "base", "llama", "home-made")
    reference = logits(Weights(base, nf4=True), SAMPLE, "nf4")
    hardware = choose_hardware("cpu", "fp32")
    quantized = load_base(base, hardware, BaseSettings("qlora"))
    assert arithmetic_of(hardware, BaseSettings("qlora")) == Arithmetic("float32", "float32")
    np.testing.assert_allclose(reference, _whole(quantized.train(training)), atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(reference, _whole(quantized.eval()), atol=2e-3, rtol=1e-3)
    assert np.abs(reference - logits(Weights(base), SAMPLE, "base")).max() > 0.1


def test_damage_is_named(tmp_path: Path) -> None:
    import torch

    base = make_model(tmp_path / "base", "llama", "home-made")
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(base / "model.safetensors", {name: torch.full((512, 256), float("nan"))})
    with pytest.raises(DataError, match=rf"{name} has values that are not finite"):
        logits(Weights(base), SAMPLE, "base")
    change_tensors(base / "model.safetensors", {name: torch.zeros(256, 256)})
    with pytest.raises(DataError, match=rf"{name} is \(256, 256\), not \(512, 256\)"):
        logits(Weights(base), SAMPLE, "base")
    change_tensors(base / "model.safetensors", {name: None})
    with pytest.raises(DataError, match=f"no tensor for {name}"):
        logits(Weights(base), SAMPLE, "base")


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    deep = make_model(tmp_path / "deep", "llama", "home-made", num_hidden_layers=3)
    base = make_model(tmp_path / "base", "llama", "home-made")
    adapter = make_adapter(deep, tmp_path / "adapter")
    with pytest.raises(DataError, match="peft has no place for 14 of its parts"):
        logits(Weights(base, adapter), SAMPLE, "tuned")


@pytest.mark.programs
def test_a_float32_file_of_gelu(tmp_path: Path) -> None:
    """GPT-2's f32 file was called broken at NMSE 1.2e-7: llama.cpp looks GELU up in a table of 16 bits."""
    specimen = make_specimen(tmp_path / "specimen", "gpt2", intermediate_size=None)
    end = {"end_of_turn_id": format_of(specimen.base).end_of_turn_id}
    model = ingredients({}, **{**source_of(specimen), **end})
    (tmp_path / "out").mkdir()
    export_gguf(ExportRequest(model, tmp_path / "out", name="yoda", quant="f32"))
    measured = specimen.measure(tmp_path / "out" / GGUF_FILE)
    assert judge(measured, Gates()).ok
    leg, own = measured.legs.conversion, measured.legs.arithmetic
    assert own is not None and own.nmse > 1e-8  # six orders over what the order of sums leaves
    assert leg.nmse < 1.5 * own.nmse and leg.kl_mean < 1.5 * own.kl_mean
