"""`base.tokens` and `export: none`: what a recipe may say, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.errors import DataError, RecipeError
from forge.model.architectures import check_writes_text
from forge.model.config import configuration_of
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.resolve.taught import with_tokens
from forge.stages import stages_for
from forge.store.artifacts import open_store
from tests.conftest import copy_of_tiny
from tests.models import change_json

DATA = "data: {source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}}\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return copy_of_tiny(tmp_path / "tiny")


def resolved(tmp_path: Path, text: str) -> Resolved:
    (tmp_path / "r.yaml").write_text(f"name: r\n{text}", encoding="utf-8")
    loaded = load(tmp_path / "r.yaml")
    return resolve_recipe(loaded, open_store(read_only=True), tmp_path / "runs", fetch="nothing")


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises((DataError, RecipeError)) as caught:
        resolved(tmp_path, text)
    return " ".join([caught.value.message, *map(str, caught.value.problems)])


def test_tokens_are_added_behind_the_others(tiny: Path) -> None:
    """Each is one id behind the vocabulary, and special; the source is left as it is."""
    before = read_tokenizer(tiny)
    made = with_tokens(tiny, ["<|a|>", "<|b|>"], "<|b|>")
    after = read_tokenizer(made)
    first = before.vocabulary_size
    assert after.vocabulary_size == first + 2
    assert (after.ids["pad"], after.tokens["pad"]) == (first + 1, "<|b|>")
    assert {"<|a|>", "<|b|>"} < set(after.special_tokens)
    assert first in open_tokenizer(made).encode("x<|a|>y").ids
    assert read_tokenizer(tiny) == before


def test_tokens_that_cannot_be_added(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has <\|im_end\|> already"):
        with_tokens(tiny, ["<|im_end|>"], None)
    with pytest.raises(RecipeError, match="the tokenizer has no <pad>") as caught:
        with_tokens(tiny, [], "<pad>")
    assert "base.tokens.add: ['<pad>']" in caught.value.hint
    asked = "base: {id: ./tiny, tokens: {add: ['<|a|>']}}\n"
    assert "only training can teach" in refused(tmp_path, f"{asked}train: none\n")
    assert "no place in a GGUF adapter" in refused(tmp_path, f"{asked}{DATA}export: {{mode: adapter}}\n")


def test_their_rows_are_trained_with_the_adapter(tiny: Path, tmp_path: Path) -> None:
    ship = resolved(tmp_path, f"base: {{id: ./tiny, tokens: {{add: ['<|a|>']}}}}\n{DATA}")
    assert ship.training is not None
    assert set(ship.training.lora.modules_to_save) == set(ship.token_modules) >= {"embed_tokens"}
    rows = ship.tensors["model.embed_tokens.weight"].shape[0]
    tokens = ship.tokenizer.vocabulary_size
    assert ship.rows_to_add_to == (tokens if tokens > rows else None)
    plain = resolved(tmp_path, f"base: ./tiny\n{DATA}")
    assert plain.training is not None and not plain.training.lora.modules_to_save


def test_no_gguf_is_no_certificate_and_no_server(tiny: Path, tmp_path: Path) -> None:
    """N4: trained, evaluated and merged."""
    ship = resolved(tmp_path, f"base: ./tiny\n{DATA}export: none\n")
    names = [stage.name for stage in stages_for(ship)]
    assert names == ["data", "train", "validate", "evaluate", "merge"]
    for text, said in (
        (f"{DATA}export: {{mode: none, imatrix: true}}\n", "no type to choose"),
        ("train: none\nexport: none\n", "nothing would be left of the ship"),
        (f"{DATA}export: none\nverify: {{max_kl: 0.1}}\n", "has limits for a GGUF"),
    ):
        assert said in refused(tmp_path, f"base: ./tiny\n{text}")


def test_opt_is_let_through_and_an_encoder_is_not(tiny: Path, tmp_path: Path) -> None:
    change_json(tiny / "config.json", architectures=["OPTForCausalLM"], model_type="opt")
    assert "OPT has no GGUF form" in refused(tmp_path, f"base: ./tiny\n{DATA}")
    described = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    check_writes_text(configuration_of(described))
    encoder = configuration_of({**described, "architectures": ["BertForMaskedLM"], "model_type": "bert"})
    with pytest.raises(DataError, match="an encoder"):
        check_writes_text(encoder)
