"""What is refused before anything runs is refused where a recipe is resolved: a fault for each call."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError, ForgeError
from forge.recipe.load import load
from forge.resolve.recipe import resolve_recipe
from forge.store.artifacts import Store
from tests.conftest import copy_of_tiny
from tests.test_stages_asking import write_adapter

GGUF, MERGED = "", "export: none\n"
ADOPTED, CONTINUED = "train: {from: ./theirs}\n", "train: {continue_from: ./earlier}\n"


def configure(name: str = "config.json", **fields: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "base" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _settings(**fields: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = write_adapter(directory / "theirs") / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _header(
    change: Callable[[dict[str, Any]], Mapping[str, Any]], where: str = "base/model.safetensors"
) -> Any:
    """Rewrite the names and shapes of a safetensors file."""

    def changed(directory: Path) -> None:
        if where.startswith("theirs"):
            write_adapter(directory / "theirs")
        content = (directory / where).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
        (directory / where).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return changed


def _quantized(header: dict[str, Any]) -> Mapping[str, Any]:
    name = next(name for name in header if name.endswith("q_proj.weight"))
    return {
        key.replace(name, f"{name.removesuffix('.weight')}.qweight"): entry for key, entry in header.items()
    }


def _elsewhere(header: dict[str, Any]) -> Mapping[str, Any]:
    return {name.replace("layers.0.", "layers.99."): entry for name, entry in header.items()}


def _more_tokens(directory: Path) -> None:
    """An adapter whose own tokenizer has a token for which there is no row."""
    write_adapter(directory / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / "theirs" / name).write_bytes((directory / "base" / name).read_bytes())
    path = directory / "theirs" / "tokenizer.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    last = described["added_tokens"][-1]
    more = [{**last, "id": last["id"] + number, "content": f"<|{number}|>"} for number in range(1, 200)]
    described["added_tokens"] += more
    path.write_text(json.dumps(described), encoding="utf-8")


def _no_tensors(directory: Path) -> None:
    (directory / "base" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")


def _impure(directory: Path) -> None:
    write_adapter(directory / "theirs", norm=True)


def _dora(directory: Path) -> None:
    """DoRA with its magnitude, which stands where the norm would in the file."""
    theirs = write_adapter(directory / "theirs", norm=True)
    magnitude = "base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector"
    path = theirs / "adapter_model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length].replace(b"base_model.model.model.norm.weight", magnitude.encode())
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    settings = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(
        json.dumps({**settings, "use_dora": True, "modules_to_save": None})
    )


def _nothing(directory: Path) -> None:
    """The recipe itself is at fault."""


@dataclass(frozen=True)
class Case:
    """What is wrong, the recipe's lines that make it matter, and the words of the refusal."""

    fault: Callable[[Path], None]
    recipe: str
    said: str


FAULTY: Mapping[str, Case] = {
    "quantized by its word": Case(
        configure(quantization_config={"quant_method": "awq", "bits": 4}), GGUF, "already quantized"
    ),
    "quantized by its weights": Case(_header(_quantized), GGUF, "its weights are quantized"),
    "no GGUF form": Case(configure(architectures=["OPTForCausalLM"]), GGUF, "OPT has no GGUF form"),
    "no chat model": Case(configure(architectures=["BertForMaskedLM"]), MERGED, "BertForMaskedLM"),
    "unknown to transformers": Case(configure(model_type="own"), GGUF, "has no language model"),
    "code of its own": Case(
        configure(model_type="own", auto_map={"AutoModelForCausalLM": "a.B"}), GGUF, "Python code of its own"
    ),
    "no tensors": Case(_no_tensors, GGUF, "holds no tensors"),
    "targets": Case(_nothing, "train: {lora: {targets: [nowhere]}}\n", "has no module nowhere"),
    "rows beyond its positions": Case(
        _nothing, "train: {max_length: 9999}\n", "9999 tokens is more than the base's 1024 positions"
    ),
    "a context beyond its positions": Case(
        _nothing, "deploy: {context_tokens: 9999}\n", "9999 tokens is more than the base's 1024 positions"
    ),
    "an embedding of its own": Case(
        _nothing, "train: {lora: {targets: [embed_tokens]}}\nexport: {mode: adapter}\n", "for linear layers"
    ),
    "DoRA of an embedding": Case(
        _nothing, "train: {lora: {targets: [embed_tokens], dora: true}}\n", "DoRA is only for linear"
    ),
    "another end in what vLLM reads": Case(
        configure("generation_config.json", eos_token_id=7), "export: {keep_merged: true}\n", "ends a reply"
    ),
    "an adapter of another base": Case(
        _header(_elsewhere, "theirs/adapter_model.safetensors"), ADOPTED, "parts do not fit this base"
    ),
    "an adapter with more tokens": Case(_more_tokens, ADOPTED, "tokens, the embedding 1456 rows"),
    "an adapter with a setting unknown": Case(_settings(what_is_this=1), ADOPTED, "what_is_this"),
    "an adapter of rank nought": Case(_settings(r=0), ADOPTED, "must be a whole number above 0 (got 0)"),
    "an impure adapter of its own": Case(
        _impure, ADOPTED + "export: {mode: adapter}\n", "no GGUF form of its own"
    ),
    "an adapter of another base to go on from": Case(
        _header(_elsewhere, "theirs/adapter_model.safetensors"),
        "train: {continue_from: ./theirs}\n",
        "parts do not fit this base",
    ),
    "DoRA to go on from in 8 bits": Case(
        _dora, "train: {continue_from: ./theirs, method: int8}\n", "the adapter is DoRA"
    ),
    "no adapter to go on from": Case(
        lambda directory: (directory / "earlier").mkdir(), CONTINUED, "earlier"
    ),
}  # fmt: skip


def resolve(directory: Path, lines: str) -> None:
    text = f"name: mini\nbase: ./base\ndata: {{source: builtin:yoda}}\n{lines}"
    (directory / "recipe.yaml").write_text(text)
    place = Store(directory / "home"), directory / "runs" / "mini"
    resolve_recipe(load(directory / "recipe.yaml"), *place, offline=True)


@pytest.mark.parametrize("case", FAULTY)
def test_what_cannot_work_is_refused_before_anything_runs(case: str, tmp_path: Path) -> None:
    faulty = FAULTY[case]
    copy_of_tiny(tmp_path / "base")
    faulty.fault(tmp_path)
    with pytest.raises(ForgeError) as refused:
        resolve(tmp_path, faulty.recipe)
    assert faulty.said in f"{refused.value} {' '.join(map(str, refused.value.problems))}"


def test_what_can_work_is_not(tmp_path: Path) -> None:
    copy_of_tiny(tmp_path / "base")
    write_adapter(tmp_path / "theirs")
    write_adapter(tmp_path / "earlier")
    for lines in (GGUF, MERGED, ADOPTED, CONTINUED, "export: {mode: adapter}\n"):
        resolve(tmp_path, lines)


def test_an_adapter_is_looked_at_though_its_base_is_not_here(tmp_path: Path) -> None:
    _settings(what_is_this=1)(tmp_path)
    text = "name: mini\nbase: someone/away\ndata: {source: builtin:yoda}\n" + ADOPTED
    (tmp_path / "recipe.yaml").write_text(text)
    place = Store(tmp_path / "home"), tmp_path / "runs" / "mini"
    with pytest.raises(DataError):
        resolve_recipe(load(tmp_path / "recipe.yaml"), *place, offline=True, fetch="nothing")
