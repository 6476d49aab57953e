"""Tokenizer files as any version of transformers writes them, made whole for the converters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge import worker
from forge.errors import DataError
from forge.export.checkpoint import MergeRequest, merge
from forge.export.reading import settle_reading
from forge.export.run import export_gguf
from forge.export.tokenizer import MODEL, repair_tokenizer
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import open_tokenizer
from tests.exporting import export_request
from tests.models import PEFT_WARNS, change_json, make_adapter, make_model
from tests.vocabularies import converters, write_tokenizer


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def added(directory: Path, *texts: str) -> list[dict[str, Any]]:
    """Add tokens to tokenizer.json, past those that it has; returns all of its added tokens."""
    path = directory / "tokenizer.json"
    stated = read(path)
    after = 1 + max(*stated["model"]["vocab"].values(), *(token["id"] for token in stated["added_tokens"]))
    flags = {key: value for key, value in stated["added_tokens"][0].items() if key not in ("id", "content")}
    stated["added_tokens"] += [{"id": after + n, "content": text, **flags} for n, text in enumerate(texts)]
    path.write_text(json.dumps(stated), encoding="utf-8")
    tokens: list[dict[str, Any]] = stated["added_tokens"]
    return tokens


def test_what_the_converters_read_is_made_from_tokenizer_json(tmp_path: Path) -> None:
    """ggml-org/llama.cpp #5838, #15842: added tokens that no other file names. PAD is no token."""
    write_tokenizer(tmp_path, "home-made")
    tokens = added(tmp_path, "<|new|>")
    change_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=None, pad_token="[PAD]")
    (tmp_path / "added_tokens.json").write_text('{"<|stale|>": 7}')
    assert repair_tokenizer(tmp_path, None) == []
    fields = read(tmp_path / "tokenizer_config.json")
    assert {int(number): one["content"] for number, one in fields["added_tokens_decoder"].items()} == {
        token["id"]: token["content"] for token in tokens
    }
    assert "pad_token" not in fields and fields["eos_token"] == "<|im_end|>"
    assert not (tmp_path / "added_tokens.json").exists()
    assert not (tmp_path / MODEL).exists(), "no SentencePiece"


def test_tokens_without_a_row_are_named_and_left_out(tmp_path: Path) -> None:
    """Gemma 3: 262,145 tokens, 262,144 rows. A vocabulary that is longer is of another model."""
    rows = write_tokenizer(tmp_path, "home-made")
    added(tmp_path, "<image_soft_token>")
    assert repair_tokenizer(tmp_path, rows) == [
        f"the embedding has {rows} rows: the tokenizer's <image_soft_token> have none and are left out"
    ]
    assert "<image_soft_token>" not in (tmp_path / "tokenizer.json").read_text()
    assert repair_tokenizer(tmp_path, rows) == []
    with pytest.raises(DataError, match="the embedding 100 rows"):
        repair_tokenizer(tmp_path, 100)


def read_otherwise(checkpoint: Path) -> list[str]:
    """Texts of which a user of the checkpoint gets other ids than its tokenizer.json has."""
    import transformers

    reader = transformers.AutoTokenizer.from_pretrained(checkpoint)
    written = open_tokenizer(checkpoint)
    texts = (
        "Hello",
        " Hello",
        "1234 It's",
        "<|im_start|>user\nHello<|im_end|>\n",
        "<s> [INST] a",
        "don't  x",
    )
    return [text for text in texts if reader.encode(text) != written.encode(text).ids]


@pytest.mark.training
def test_a_family_that_no_file_has_read_as_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers 5 takes Qwen2's class, whatever stands there: DeepSeek-R1-Distill-Qwen is not split so."""
    base = make_model(tmp_path, "qwen2", "home-made")
    change_json(base / "tokenizer.json", normalizer={"type": "Lowercase"})
    settle_reading(base)
    said = capsys.readouterr().err
    assert read_otherwise(base) and "its Qwen2Tokenizer has" in said
    assert "PreTrainedTokenizerFast.from_pretrained reads it so" in said
    change_json(base / "config.json", model_type="qwen3")
    settle_reading(base)
    assert capsys.readouterr().err == "" and read_otherwise(base) == []


@pytest.mark.training
@pytest.mark.programs
@PEFT_WARNS
def test_a_sentencepiece_base_as_transformers_5_saves_it_is_exported(tmp_path: Path) -> None:
    """ggml-org/llama.cpp #5838, #8682: tokenizer.json only, and a configuration without added tokens.

    The export compares the ids of its tokenizer with those of tokenizer.json.
    """
    base = make_model(tmp_path / "base", "llama", "llama-spm")
    change_json(base / "tokenizer_config.json", added_tokens_decoder=None)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter)
    alone = Path(shutil.copytree(base, tmp_path / "alone"))
    (alone / MODEL).unlink()
    for number, (start, factors) in enumerate(((base, adapter), (alone, None))):
        out = tmp_path / f"out{number}"
        out.mkdir()
        settings = {
            "name": "m", "quant": "q8_0", "keep_merged": True, "threads": 1, "end_of_turn_id": 32001,
        }  # fmt: skip
        request = export_request(
            base=str(start), adapter=str(factors) if factors else None, tokenizer=str(factors or start),
            chat_template=(base / "chat_template.jinja").read_text(encoding="utf-8"),
            out=str(out), converters=str(converters()), settings=settings,
        )  # fmt: skip
        exported = worker.perform(export_gguf, request)
        assert exported.ids_compared > 200
        # Llama's class of transformers 5 puts no space after a special token; the file and llama.cpp do.
        assert exported.misread and "LlamaTokenizer has" in exported.misread
        assert read_otherwise(out / "merged") == []
        tokens = read_gguf(out / "model.gguf").array("tokenizer.ggml.tokens")
        assert list(tokens)[32000:32002] == ["<|im_start|>", "<|im_end|>"]
    # As `export: none` writes the same model.
    (tmp_path / "none").mkdir()
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    merge(MergeRequest(base, adapter, adapter, template, tmp_path / "none"))
    assert read_otherwise(tmp_path / "none" / "merged") == []
