"""What a ship settles before anything runs: the token that pads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.store.artifacts import Store
from tests.conftest import copy_of_tiny

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def ship_of(directory: Path, special: set[str], **tokens: str | None) -> Resolved:
    """A ship of builtin:tiny with the tokenizer changed: its special tokens and its named ones."""
    base = copy_of_tiny(directory / "base")
    _change(base / "tokenizer_config.json", tokens)
    described = json.loads((base / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["special"] = token["content"] in special
    (base / "tokenizer.json").write_text(json.dumps(described))
    (directory / "recipe.yaml").write_text("name: mini\nbase: ./base\ndata: {source: builtin:yoda}\n")
    store = Store(directory / "home")
    return resolve_recipe(load(directory / "recipe.yaml"), store, directory / "runs" / "mini", offline=True)


def _change(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("tokens", "pads"),
    [
        ({"pad_token": PAD}, PAD),
        ({"pad_token": END}, PAD),
        ({"pad_token": None, "unk_token": START}, START),
        ({"pad_token": END, "unk_token": END}, PAD),
        ({"pad_token": None, "bos_token": PAD}, START),
    ],
    ids=["its own", "own is EOS", "unknown", "unknown is EOS", "none, and never BOS"],
)
def test_d3_pads_with_its_pad_else_unk_else_another_never_eos(
    tmp_path: Path, tokens: dict[str, str | None], pads: str
) -> None:
    """pitfall 27 and 11: whatever the tokenizer says, what ends an answer never pads."""
    ship = ship_of(tmp_path, {PAD, START, END}, **tokens)
    assert ship.pad_token == pads
    assert ship.prompt_format.tokenizer.id_to_token(ship.pad_token_id) == pads


def test_d3_nothing_to_pad_with_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no special token besides EOS to pad with") as failed:
        ship_of(tmp_path, {END}, pad_token=END)
    assert failed.value.hint == "add a pad token to the base's tokenizer"
