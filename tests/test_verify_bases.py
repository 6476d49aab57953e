"""`export.merge_base: measured`: held-out rows decide, and they can decide either way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from forge import worker
from forge.model.base import BUILTIN
from forge.verify.bases import BasesRequest, ChosenBase, choose_base
from tests.makers.make_tiny import encode
from tests.makers.tasks import exam_rows
from tests.models import PEFT_WARNS, change_tensors

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(900), PEFT_WARNS]

TINY = BUILTIN / "tiny"
WIDTH = 256
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]  # those with inputs of WIDTH


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in base's own exam, which it answers well."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    with path.open("w", encoding="utf-8") as stream:
        for row in exam_rows():
            ids, labels = encode(row, tokenizer)
            stream.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return path


def _write_adapter(directory: Path, deltas: dict[str, Any]) -> Path:
    """An adapter whose product is `deltas` (module -> (out, WIDTH)): B is the delta, A the identity."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    tensors = {}
    for module, delta in deltas.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.eye(WIDTH)
        tensors[f"base_model.model.{module}.lora_B.weight"] = delta.float().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": WIDTH, "lora_alpha": WIDTH, "target_modules": list(deltas)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def _through_nf4(weight: Any) -> Any:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state)


def _choose(base: Path, adapter: Path, rows: Path) -> ChosenBase:
    return worker.perform(choose_base, BasesRequest(base, adapter, rows, "held-out", False))


def test_an_adapter_that_mends_what_nf4_lost_goes_into_nf4(tmp_path: Path, rows: Path) -> None:
    """Pitfall 22: this base has an outlier in every block, which costs NF4 all precision around it."""
    import torch
    from safetensors.torch import load_file

    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    changed, deltas = {}, {}
    for name, weight in load_file(TINY / "model.safetensors").items():
        if name.split(".")[-2] in ADAPTED:
            spoilt = weight.float()
            spoilt[:, ::64] += 4.0
            spoilt = spoilt.to(torch.bfloat16)
            changed[name] = spoilt
            deltas[name.removesuffix(".weight")] = weight.float() - _through_nf4(spoilt.float())
    change_tensors(base / "model.safetensors", changed)
    measured = _choose(base, _write_adapter(tmp_path / "adapter", deltas), rows)
    assert measured.chosen == "nf4"
    assert measured.error and measured.loss.original > measured.loss.nf4 + 2 * measured.error
    assert "worse than chance explains" in measured.why and "not worse" not in measured.why
    assert measured.tokens > 100 and measured.kl_mean > 0


def test_an_adapter_that_owes_nothing_to_nf4_goes_into_the_original(tmp_path: Path, rows: Path) -> None:
    import torch

    nothing = {"model.layers.0.self_attn.q_proj": torch.full((WIDTH, WIDTH), 1e-6)}
    measured = _choose(TINY, _write_adapter(tmp_path / "adapter", nothing), rows)
    assert measured.chosen == "original"
    assert "not worse than chance explains" in measured.why
