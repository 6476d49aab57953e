"""Mistakes of the export's reading of an adapter: the certificate catches each, as its reference is peft's.

The reading is changed in memory, where the export takes it; peft reads the same files as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.read import Adapter, LoraLayer, read_adapter
from forge.adapter.vocabulary import Fitted
from forge.export import run as export_run
from forge.export.run import GGUF_FILE
from forge.verify.yardstick import make_quantized
from tests.models import PEFT_WARNS, make_adapter, make_model
from tests.specimens import Specimen, rewrite, write_rows
from tests.test_resized import export_of

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500), PEFT_WARNS]

Misread = Callable[[Adapter], Adapter]
TARGETS = ["q_proj", "o_proj", "up_proj"]


def _each(change: Callable[[LoraLayer], LoraLayer]) -> Misread:
    return lambda adapter: replace(
        adapter, layers={name: change(layer) for name, layer in adapter.layers.items()}
    )


def _scaled(scale: Callable[[LoraLayer], float]) -> Misread:
    return _each(lambda layer: replace(layer, scale=scale(layer)))


def _factors_of_the_other_layer(adapter: Adapter) -> Adapter:
    other = {name: adapter.layers[name.translate({ord("0"): "1", ord("1"): "0"})] for name in adapter.layers}
    return replace(adapter, layers={name: replace(one, module=name) for name, one in other.items()})


def _first_factor_of_the_other_layer(adapter: Adapter) -> Adapter:
    other = _factors_of_the_other_layer(adapter).layers
    return replace(
        adapter, layers={name: replace(one, a=other[name].a) for name, one in adapter.layers.items()}
    )


def _without_a_layer(adapter: Adapter) -> Adapter:
    dropped = next(name for name in adapter.layers if name.endswith("up_proj"))
    return replace(adapter, layers={name: one for name, one in adapter.layers.items() if name != dropped})


SEEDED: Mapping[str, tuple[Mapping[str, Any], Misread]] = {
    "scale": ({}, _scaled(lambda layer: 8 * layer.scale)),
    "rslora": ({"use_rslora": True}, _scaled(lambda layer: 16 / layer.rank)),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 128}}, _scaled(lambda layer: 16 / layer.rank)),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, _scaled(lambda layer: 16 / 8)),
    "transposed": ({"target_modules": ["o_proj"]}, lambda adapter: adapter),
    "A of another layer": ({}, _first_factor_of_the_other_layer),
    "wrong layer": ({}, _factors_of_the_other_layer),
    "dropped layer": ({}, _without_a_layer),
    "dora magnitude": ({"use_dora": True}, _each(lambda layer: replace(layer, magnitude=None))),
    "modules_to_save": ({"modules_to_save": ["down_proj"]}, lambda adapter: replace(adapter, replaced={})),
    "token rows": (
        {"trainable_token_indices": {"embed_tokens": list(range(3, 60))}},
        lambda adapter: replace(adapter, rows={}),
    ),
    "doubled": ({}, _scaled(lambda layer: 2 * layer.scale)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("misread") / "base"
    return make_model(directory, "llama", "home-made", tie_word_embeddings=False)


@pytest.mark.parametrize("case", [*SEEDED, "none"])
def test_the_certificate_catches_it(
    case: str, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """G1, silent wrongs 8 and 9. Read rightly, the same adapter is certified."""
    options, misread = SEEDED.get(case, ({}, lambda adapter: adapter))
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": TARGETS, **options})
    specimen = Specimen(base, adapter, write_rows(base, tmp_path), tmp_path)
    monkeypatch.setattr(export_run, "read_adapter", lambda directory: misread(read_adapter(directory)))
    if case == "transposed":
        monkeypatch.setattr(Fitted, "is_transposed", lambda fitted, layer: True)
    export_of(base, adapter, tmp_path / "out", tokenizer=base)
    found = specimen.verify(tmp_path / "out" / GGUF_FILE)
    if case == "none":
        assert found["ok"], found["problems"]
    else:
        assert (found["ok"], found["broken_stage"]) == (False, "merge"), found["verdict"]


TOKEN = 19_000


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No text has the last tokens, and the output layer is another tensor: no logit says anything of them."""
    directory = tmp_path_factory.mktemp("many") / "base"
    return make_model(directory, "llama", "home-made", tie_word_embeddings=False, vocab_size=20_000)


@pytest.mark.parametrize("quant", ["f16", "q4_k_m"])
@pytest.mark.parametrize("case", ["none", "dropped", "of another token"])
def test_one_row_of_a_large_vocabulary(
    case: str, quant: str, many_tokens: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Silent wrong 6: the row of one token that was trained alone, which no sampled logit depends on."""
    rows = {"embed_tokens": [TOKEN]}
    adapter = make_adapter(
        many_tokens, tmp_path / "adapter", target_modules=TARGETS, trainable_token_indices=rows
    )
    specimen = Specimen(many_tokens, adapter, write_rows(many_tokens, tmp_path), tmp_path)
    misread: Mapping[str, Misread] = {
        "none": lambda adapter: adapter,
        "dropped": lambda adapter: replace(adapter, rows={}),
        "of another token": lambda adapter: replace(
            adapter, rows={name: replace(one, tokens=(TOKEN - 1,)) for name, one in adapter.rows.items()}
        ),
    }
    monkeypatch.setattr(export_run, "read_adapter", lambda directory: misread[case](read_adapter(directory)))
    export_of(many_tokens, adapter, tmp_path / "out", tokenizer=many_tokens)
    file = tmp_path / "out" / GGUF_FILE
    beside = {}
    if quant != "f16":  # beside a sound f16: the quantized file alone can say it
        monkeypatch.undo()
        beside = {"f16": str(specimen.f16(tmp_path / "sound"))}
        file = make_quantized(file, tmp_path / "file.gguf", quant, 2)
    found = specimen.verify(file, **beside)
    assert all(one["ok"] for one in found["handovers"]), found["verdict"]
    if case == "none":
        assert found["ok"], found["problems"]
    else:
        assert (found["ok"], found["broken_stage"]) == (False, "merge"), found["verdict"]
        assert f"trained tokens' {TOKEN}" in found["verdict"]


@pytest.mark.parametrize(("quant", "stage"), [("f16", "convert"), ("q4_k_m", "quantize")])
def test_a_row_that_was_damaged_on_the_way(quant: str, stage: str, many_tokens: Path, tmp_path: Path) -> None:
    """Of a token that nothing trained and no text has: its row is further off than its like are."""
    import gguf
    import numpy as np

    specimen = Specimen(many_tokens, None, write_rows(many_tokens, tmp_path), tmp_path)
    f16 = specimen.f16(tmp_path / "sound")
    embedding = next(one for one in gguf.GGUFReader(str(f16)).tensors if one.name == "token_embd.weight")
    values = np.array(embedding.data)
    values[TOKEN, :128] = values[TOKEN, :128][::-1].copy()
    file = rewrite(f16, tmp_path / "damaged.gguf", {"token_embd.weight": values})
    if quant != "f16":
        file = make_quantized(file, tmp_path / "file.gguf", quant, 2)
    found = specimen.verify(file, f16=str(f16))
    assert all(one["ok"] for one in found["handovers"]), found["verdict"]
    assert (found["ok"], found["broken_stage"]) == (False, stage)
    assert f"rows {TOKEN} of token_embd.weight" in found["verdict"]
