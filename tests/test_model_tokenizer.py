"""What a base's tokenizer files say, wherever and however they say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.model.tokenizer_files import read_tokenizer

SPECIAL = ("<s>", "</s>", "<pad>", "<|end|>")
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TOKENIZER: dict[str, Any] = {
    "added_tokens": [
        {"id": 3 + place, "content": token, "special": True, **_PLAIN} for place, token in enumerate(SPECIAL)
    ],
    "post_processor": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<unk>": 2}, "merges": []},
}
WITH_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
}


def tokenizer(directory: Path, files: Mapping[str, object]) -> Path:
    for name, content in {"tokenizer.json": TOKENIZER, **files}.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_d1_special_tokens_as_strings_and_as_added_tokens(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"},
        "unk_token": "<unk>",
        "pad_token": None,
        "additional_special_tokens": ["<|end|>"],
    }
    found = read_tokenizer(
        tokenizer(
            tmp_path, {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": [6, 4]}}
        )
    )
    assert found.tokens == {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    assert found.template_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert found.ids == {"bos": 3, "eos": 4, "unk": 2}
    assert (found.eos_ids, found.special_tokens, found.vocabulary_size) == ((6, 4), SPECIAL, 7)
    assert (found.add_bos, found.chat_template, found.sentencepiece) == (False, None, None)


def test_older_special_tokens_map_fills_in(tmp_path: Path) -> None:
    older = {"eos_token": {"content": "<|end|>"}, "pad_token": "<pad>"}
    found = read_tokenizer(tokenizer(tmp_path, {"special_tokens_map.json": older, "tokenizer.model": "x"}))
    assert (found.tokens, found.eos_ids) == ({"eos": "<|end|>", "pad": "<pad>"}, (6,))
    assert found.sentencepiece == tmp_path / "tokenizer.model"


@pytest.mark.parametrize(
    ("told", "positions", "repaired"),
    [
        (10**30, 2048, 2048),
        (1e30, 2048, 2048),
        (4096, 2048, 2048),
        (512, 2048, 512),
        (None, None, None),
        (512, None, 512),
    ],
)
def test_d8_pitfall_4_model_max_length_is_repaired(
    tmp_path: Path, told: float | None, positions: int | None, repaired: int | None
) -> None:
    directory = tokenizer(tmp_path, {"tokenizer_config.json": {"model_max_length": told}})
    assert read_tokenizer(directory, max_positions=positions).model_max_length == repaired


OLD = {"tokenizer_config.json": {"chat_template": "old"}}
NAMED = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({}, {}),
        (OLD, {"default": "old"}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, {"default": "one", "rag": "two"}),
        ({"chat_template.json": {"chat_template": "processor"}}, {"default": "processor"}),
        ({**OLD, "chat_template.jinja": "new"}, {"default": "new"}),
        (
            {"chat_template.jinja": "new", "additional_chat_templates/tools.jinja": "tools"},
            {"default": "new", "tools": "tools"},
        ),
    ],
)
def test_d1_the_chat_template_wherever_it_is_kept(
    tmp_path: Path, files: dict[str, object], templates: dict[str, str]
) -> None:
    found = read_tokenizer(tokenizer(tmp_path, files))
    assert (found.templates, found.chat_template) == (templates, templates.get("default"))


@pytest.mark.training
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("processor", [None, WITH_BOS, {"type": "Sequence", "processors": [WITH_BOS]}])
@pytest.mark.parametrize("told", [None, True, False])
def test_add_bos_is_what_transformers_does(
    tmp_path: Path, name: str, processor: object, told: bool | None
) -> None:
    from transformers import AutoTokenizer

    config: dict[str, object] = {
        "tokenizer_class": name,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    config |= {} if told is None else {"add_bos_token": told}
    files = {
        "tokenizer.json": {"version": "1.0", **TOKENIZER, "post_processor": processor},
        "tokenizer_config.json": config,
        "config.json": {"model_type": "llama"},
    }
    reference = AutoTokenizer.from_pretrained(tokenizer(tmp_path, files))
    assert read_tokenizer(tmp_path).add_bos == (reference("a").input_ids[:1] == [3])
    assert read_tokenizer(tmp_path).vocabulary_size == len(reference)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.model", "only a SentencePiece tokenizer.model is there; tokenizer.json is needed"),
        ("vocab.json", "only vocab.json and merges.txt are there; tokenizer.json is needed"),
        ("tekken.json", "only tekken.json is there; tokenizer.json is needed"),
        ("qwen.tiktoken", "only qwen.tiktoken is there; tokenizer.json is needed"),
        ("config.json", "no tokenizer: tokenizer.json is missing"),
    ],
)
def test_a_missing_tokenizer_json_is_explained(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        read_tokenizer(tmp_path)
    assert caught.value.message == f"{tmp_path}: {message}"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": {"added_tokens": [{"content": "<s>"}]}},
        {"tokenizer.json": {"model": {"vocab": {"a": "first"}}}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default"}]}},
    ],
)
def test_broken_tokenizer_files_are_an_error_that_names_their_place(
    tmp_path: Path, files: dict[str, object]
) -> None:
    with pytest.raises(DataError, match="the tokenizer's files are not as they should be: ") as caught:
        read_tokenizer(tokenizer(tmp_path, files))
    assert caught.value.message.startswith(f"{tmp_path}: ")
