"""What a ship settles before anything runs: the token that pads, the chat template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError, RecipeError
from forge.model.base import UNKNOWN
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.resolve.resolved import Resolved
from forge.resolve.taught import trained_tokenizer
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


@pytest.mark.parametrize("pad", [END, "[PAD]"], ids=["EOS", "not in tokenizer.json"])
def test_d3_a_tokenizer_with_one_special_token_pads_with_it(tmp_path: Path, pad: str) -> None:
    """ibm-granite/granite-3.1 #2, huggingface/smol-course #159: padding has the label -100, any id serves."""
    ship = ship_of(tmp_path, {END}, pad_token=pad)
    assert ship.pad_token == END
    assert ship.pad_token_id == ship.prompt_format.end_of_turn_id


@pytest.mark.training
def test_pitfall_27_padding_with_eos_leaves_every_eos_in_the_loss() -> None:
    """The training library pads labels by position; a row's own labels stay as they are."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7, 2], "labels": [7, 2]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=2).torch_call(rows)
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


OWN = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def taught(directory: Path, template: str, **changes: Any) -> Resolved:
    """builtin:tiny without a template of its own, and a recipe that names one beside it."""
    base = copy_of_tiny(directory / "base")
    (base / "chat_template.jinja").unlink()
    _change(base / "tokenizer_config.json", changes)
    fields = json.dumps({"id": "./base", "chat_template": template})
    (directory / "recipe.yaml").write_text(f"name: mini\nbase: {fields}\ndata: {{source: builtin:yoda}}\n")
    loaded = load(directory / "recipe.yaml")
    return resolve_recipe(loaded, Store(directory / "home"), directory / "runs" / "mini", offline=True)


@pytest.mark.parametrize("asked", ["alpaca", "own.jinja", OWN, "rag"])
def test_a_base_is_given_a_chat_template_by_its_recipe(tmp_path: Path, asked: str) -> None:
    """gpt2, Llama-2-7b have none: a shipped one, a file, the text, one that the tokenizer names."""
    (tmp_path / "own.jinja").write_text(OWN, encoding="utf-8-sig")
    ship = taught(tmp_path, asked, chat_template=[{"name": "rag", "template": OWN}])
    prompt = ship.template.render([{"role": "user", "content": "Hi."}], add_generation_prompt=True)
    assert prompt.startswith("Below is an instruction" if asked == "alpaca" else "Hi.<|im_end|>")
    assert (ship.tokenizer.directory / "chat_template.jinja").is_file()
    assert not (tmp_path / "base" / "chat_template.jinja").exists()


def test_named_templates_without_a_default_are_said_by_name(tmp_path: Path) -> None:
    named = [{"name": name, "template": OWN} for name in ("tool_use", "rag")]
    with pytest.raises(RecipeError, match="neither a shipped template nor a file") as failed:
        taught(tmp_path, "missing", chat_template=named)
    assert "alpaca" in failed.value.hint and "rag, tool_use" in failed.value.hint
    (tmp_path / "recipe.yaml").write_text("name: mini\nbase: ./base\ndata: {source: builtin:yoda}\n")
    loaded = load(tmp_path / "recipe.yaml")
    with pytest.raises(DataError, match="templates named rag, tool_use and no default one"):
        resolve_recipe(loaded, Store(tmp_path / "home"), tmp_path / "runs" / "mini", offline=True)


@pytest.mark.parametrize("vocabulary", ["the base's", "another"])
def test_an_adapter_s_tokenizer_without_a_template_takes_the_base_s(
    tmp_path: Path, vocabulary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaMA-Factory #8399, #5836, ms-swift #4358: chat_template.jinja is not copied along.

    Of another vocabulary it may have been trained with any template; that the base has one is said.
    """
    base, adapter = copy_of_tiny(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, adapter / name)
    template = (base / "chat_template.jinja").read_text()
    _change(adapter / "tokenizer_config.json", {"pad_token": END})
    if vocabulary == "another":
        described = json.loads((adapter / "tokenizer.json").read_text())
        described["added_tokens"].append({**described["added_tokens"][0], "id": 9999, "content": "<new>"})
        (adapter / "tokenizer.json").write_text(json.dumps(described))
    files = trained_tokenizer(base, adapter)
    told = "".join(capsys.readouterr())
    assert files.tokens["pad"] == END  # the adapter's own
    if vocabulary == "another":
        assert files.chat_template is None and files.directory == adapter
        assert "its vocabulary is not that of" in told and "which has one" in told
    else:
        assert files.chat_template == template
        assert "taking the base's" in told
    assert not (adapter / "chat_template.jinja").exists()


def test_a_plan_reads_no_gigabytes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing nothing, it would read them again at every call; what a ship remembered is used."""
    monkeypatch.setattr("forge.resolve.resolved._READ_BY_A_PLAN", 1000)
    base = copy_of_tiny(tmp_path / "base")
    for path in base.iterdir():
        os.utime(path, (1, 1))  # settled long ago, so that digests are remembered
    (tmp_path / "recipe.yaml").write_text("name: mini\nbase: ./base\ndata: {source: builtin:yoda}\n")
    loaded, home, run = load(tmp_path / "recipe.yaml"), tmp_path / "home", tmp_path / "runs" / "mini"
    planned = resolve_recipe(loaded, Store(home, read_only=True), run, offline=True)
    assert planned.base_digest == UNKNOWN
    assert "a plan does not read" in planned.notes[-1]
    shipped = resolve_recipe(loaded, Store(home), run, offline=True).base_digest
    again = resolve_recipe(loaded, Store(home, read_only=True), run, offline=True)
    assert (again.base_digest, again.notes) == (shipped, [])
