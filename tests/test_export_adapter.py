"""The adapter as a GGUF of its own: the true scale, nothing of this machine in it, or merged and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge import worker
from forge.errors import DataError
from forge.export.request import Exported
from forge.export.run import export_gguf as make_gguf
from forge.model.gguf_header import read_gguf
from tests.exporting import export_request
from tests.models import load, make_adapter, make_model
from tests.vocabularies import converters

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500)]

PURE: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 64, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "alpha_pattern": {"q_proj": 64, r"layers\.1\.mlp\.down_proj": 4},
        "rank_pattern": {"k_proj": 16},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("base") / "base", "llama", "home-made", tie_word_embeddings=False
    )


def export(base: Path, adapter: Path, out: Path, mode: str, *, keep_merged: bool = False) -> Exported:
    out.mkdir()
    arguments: dict[str, Any] = {
        "base": str(base), "adapter": str(adapter), "tokenizer": str(base), "data": None, "out": str(out),
        "chat_template": (base / "chat_template.jinja").read_text(encoding="utf-8"),
        "converters": str(converters()),
        "settings": {
            "name": "yoda", "quant": "f32", "keep_merged": keep_merged, "threads": 1, "mode": mode,
        },
    }  # fmt: skip
    return worker.perform(make_gguf, export_request(**arguments), log=out.with_suffix(".log"))


def logits_error(base: Path, adapter: Path, out: Path, scale: float = 1.0) -> float:
    """Error of llama.cpp's logits, base and adapter loaded apart, over the variance of peft's in fp32."""
    import llama_cpp
    import numpy as np
    import torch

    ids = [int(number) for number in np.random.default_rng(0).integers(3, 300, 48)]
    with torch.inference_mode():
        expected = load(base, adapter, merge=False)(torch.tensor([ids])).logits[0].numpy()
    model = llama_cpp.Llama(
        str(out / "model.gguf"), logits_all=True, n_ctx=64, verbose=False, n_threads=1,
        lora_path=str(out / "adapter.gguf"), lora_scale=scale,
    )  # fmt: skip
    try:
        model.eval(ids)
        found = np.array(model.scores[: len(ids), : expected.shape[1]])
    finally:
        model.close()
    return float(((found - expected) ** 2).mean() / expected.var())


@pytest.mark.parametrize("case", PURE)
def test_the_adapter_beside_its_base_is_the_trained_model(case: str, base: Path, tmp_path: Path) -> None:
    """N1, N4; silent wrong 9: rsLoRA and alpha_pattern at their true scale, by logits at load."""
    adapter = make_adapter(base, tmp_path / "adapter", **PURE[case])
    told = export(base, adapter, tmp_path / "out", "adapter")
    assert told.mode == "adapter"
    assert told.merged_because == ()
    assert logits_error(base, adapter, tmp_path / "out") < 1e-5
    assert logits_error(base, adapter, tmp_path / "out", scale=0.5) > 1e-4, "the scale changes nothing"
    header = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert header.metadata["general.type"] == "adapter"
    assert header.metadata["general.name"] == "Yoda"
    for word in (str(tmp_path), str(base), tmp_path.name, "base_model", "/tmp"):
        assert word not in repr(header.metadata)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "adapter.gguf"}


def test_the_merged_checkpoint_beside_an_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    """Its GGUF is the plain base; the checkpoint that is kept is base and adapter, as peft merges them."""
    import torch

    adapter = make_adapter(base, tmp_path / "adapter")
    export(base, adapter, tmp_path / "out", "adapter", keep_merged=True)
    found, expected = load(tmp_path / "out" / "merged").state_dict(), load(base, adapter).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_what_is_not_pure_is_merged_and_says_why(base: Path, tmp_path: Path) -> None:
    """N4, D13; pitfall 52 and silent wrong 8."""
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(DataError, match="no GGUF form of its own") as caught:
        export(base, adapter, tmp_path / "refused", "adapter")
    (problem,) = caught.value.problems
    assert str(problem) == "it carries whole tensors: lm_head.weight"
    told = export(base, adapter, tmp_path / "out", "auto")
    assert told.mode == "merged"
    assert told.merged_because == ("it carries whole tensors: lm_head.weight",)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf"}
