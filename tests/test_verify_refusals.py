"""What cannot be compared is refused before anything long: a fault for each refusal of a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.errors import CheckError, DataError
from forge.export.importance import write_importance
from forge.model.estimate import Available
from forge.verify import measure as measuring
from forge.verify.measure import measure
from forge.verify.measurement import VerifyRequest
from forge.verify.session import Session
from tests.model_files import write_safetensors
from tests.specimens import rewrite
from tests.test_stages_deployed import ship_of
from tests.tiny_gguf import CONTEXT, WIDTH, write_tiny_gguf
from tests.vocabularies import converters

pytestmark = pytest.mark.training

Change = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]


def _configuration(**fields: Any) -> Change:
    def change(place: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
        path = place / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return {}

    return change


def _rows(*rows: list[int]) -> Change:
    def change(place: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
        lines = [json.dumps({"input_ids": ids, "labels": ids}) for ids in rows]
        (place / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return {}

    return change


def _other_importance(place: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    import numpy as np

    values: dict[str, Any] = {
        "blk.7.attn_q.weight": (np.ones((1, WIDTH), np.float32), np.ones(1, np.float32))
    }
    write_importance(place / "matrix.gguf", values, 1, 64)
    return {"importance": place / "matrix.gguf"}


def _called(model: str | None) -> Change:
    """The vocabulary by another kind's name."""
    return lambda place, _: {
        "gguf": rewrite(place / "model.gguf", place / "other.gguf", tokenizer__ggml__model=model)
    }


def _no_memory(_: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(measuring, "available", lambda: Available(1000, 1000))
    return {}


def _bias_on_factors(place: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    (place / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_bias": True}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    factors = {f"base_model.model.q_proj.lora_{part}.weight": (8, 8) for part in "AB"}
    write_safetensors(place / "adapter" / "adapter_model.safetensors", factors)
    return {"adapter": place / "adapter"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_configuration(num_hidden_layers=2), "is another model's: llama"),
        (_other_importance, "is another model's importance matrix"),
        (_no_memory, "the base does not fit even in pieces"),
        (_rows([5] * (CONTEXT + 1)), f"every row is longer than the context of {CONTEXT} tokens"),
        (_rows([5, 6, 1000]), "the file is of another vocabulary"),
        (_rows(), "holds no rows: there is nothing to compare on"),
        (_bias_on_factors, "each layer got a bias"),
        (_called("llama"), "tokenizer.ggml.model is llama, the base's tokenizer is gpt2"),
        (_called("nonsense"), "tokenizer.ggml.model is nonsense, the base's tokenizer is gpt2"),
        (_called(None), "tokenizer.ggml.model is missing, the base's tokenizer is gpt2"),
    ],
    ids=[
        "model",
        "matrix",
        "memory",
        "length",
        "vocabulary",
        "no rows",
        "adapter",
        "llama",
        "nonsense",
        "none",
    ],
)
def test_what_cannot_be_compared(
    change: Change, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship = ship_of(tmp_path, "runtime: none")
    _configuration(num_hidden_layers=1, hidden_size=WIDTH, max_position_embeddings=None)(
        tmp_path, monkeypatch
    )
    _rows([5, 6, 7])(tmp_path, monkeypatch)
    (tmp_path / "scratch").mkdir()
    request = VerifyRequest(
        base=tmp_path / "base",
        gguf=write_tiny_gguf(tmp_path / "model.gguf"),
        tokenizer=tmp_path / "base",
        chat_template=ship.template.pinned_source(),
        rows=tmp_path / "rows.jsonl",
        converters=converters(),
        scratch=tmp_path / "scratch",
    )
    request = replace(request, **change(tmp_path, monkeypatch))
    with pytest.raises(CheckError if "tokenizer" in said else DataError) as refused:
        measure(request)
    problems = [str(problem) for problem in refused.value.problems]
    assert said in " ".join([refused.value.message, *problems])
    if "every row" in said:
        before = "the file's header, token ids, prompt and stops"
        assert problems[-1] == f"it failed at: rows drawn; compared before: {before}"


def test_code_of_the_base_runs_where_the_recipe_says_so(tmp_path: Path) -> None:
    """The reference's model is loaded as the ship's base is."""
    nowhere = tmp_path / "nowhere"
    request = VerifyRequest(nowhere, nowhere, nowhere, None, nowhere, nowhere, tmp_path)
    assert Session(replace(request, trust_remote_code=True)).source.trust_remote_code
    assert not Session(request).source.trust_remote_code
