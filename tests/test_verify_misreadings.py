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
from tests.models import PEFT_WARNS, make_adapter, make_model
from tests.specimens import Specimen, write_rows
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
