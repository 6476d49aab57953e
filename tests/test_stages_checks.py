"""A check that a stage calls stops it: each with a fault that passes when the call is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.chat.stops import StopContract
from forge.errors import CheckError
from forge.export.run import GGUF_FILE
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.stages.data import DataStage
from forge.stages.export import EXPORT_STAGE
from forge.stages.modelfile import ModelfileStage
from forge.store.artifacts import Artifact, Store
from tests.conftest import copy_of_tiny
from tests.test_stages_asking import EXPORT_FACTS
from tests.tiny_gguf import write_tiny_gguf

START, END = "<|im_start|>", "<|im_end|>"
RECIPE = (
    "name: mini\nbase: ./base\n"
    "data: {source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}, limit: 8}\n"
)


@pytest.fixture
def ship(tmp_path: Path) -> Resolved:
    copy_of_tiny(tmp_path / "base")
    return resolved(tmp_path)


def resolved(directory: Path) -> Resolved:
    (directory / "recipe.yaml").write_text(RECIPE)
    store = Store(directory / "home")
    return resolve_recipe(load(directory / "recipe.yaml"), store, directory / "runs" / "mini", offline=True)


def _ends_otherwise(ship: Resolved) -> None:
    """A contract that neither the rows nor the GGUF keep: what ends a reply is the start of a turn."""
    start = ship.prompt_format.tokenizer.token_to_id(START)
    assert isinstance(start, int)
    ship.__dict__["stops"] = StopContract(START, {START: start})


def test_pitfall_27_rows_that_do_not_end_as_a_reply_does_are_not_trained_on(
    ship: Resolved, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    DataStage(ship).build({}, tmp_path / "out")
    _ends_otherwise(ship)
    with pytest.raises(CheckError, match="what ends a reply is not the same everywhere: broken at the loss"):
        DataStage(ship).build({}, tmp_path / "out")


def test_a_gguf_that_ends_otherwise_gets_no_modelfile(ship: Resolved, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    write_tiny_gguf(exported / GGUF_FILE)
    made = {EXPORT_STAGE: Artifact(EXPORT_STAGE, "key", "digest", exported, {**EXPORT_FACTS, "quant": "f16"})}
    (tmp_path / "out").mkdir()
    _ends_otherwise(ship)
    with pytest.raises(CheckError, match="what ends a reply is not the same everywhere: broken at the GGUF"):
        ModelfileStage(ship).build(made, tmp_path / "out")


def test_every_eos_of_the_base_ends_a_reply(tmp_path: Path) -> None:
    """generation_config.json has lists: Llama 3 ends at three tokens, of which the tokenizer names one."""
    base = copy_of_tiny(tmp_path / "base")
    ends = resolved(tmp_path).tokenizer.eos_ids
    fields = json.loads((base / "generation_config.json").read_text())
    second = next(number for number in range(3) if number not in ends)
    (base / "generation_config.json").write_text(json.dumps({**fields, "eos_token_id": [*ends, second]}))
    ship = resolved(tmp_path)
    assert second in ship.stops.ids.values()
    assert len(ship.stops.texts) == len({*ends, second})
