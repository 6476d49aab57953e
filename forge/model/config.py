"""What a model's `config.json` says of it, under one set of names.

The same fact has many names (`hidden_size`, `n_embd`, `d_model`), and multimodal configurations
keep theirs in `text_config`. Only facts are read: what follows from them is decided elsewhere.

Not covered: defaults that live in transformers' configuration classes; a fact that the file leaves
out is None, unless every family derives it in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import DataError, Problem

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Those whose layers, but for the output layer, are transformers' Conv1D: weights are (in, out)."""
_VOCABULARY = ("vocab_size", "padded_vocab_size")
# Of families whose public configurations leave it out; transformers' class and the converter have this.
_POSITIONS = {"falcon": 2048}


@dataclass(frozen=True)
class Configuration:
    """The facts of a base; sizes are in elements, `max_positions` in tokens."""

    architecture: str
    model_type: str
    hidden_size: int | None
    layers: int | None
    heads: int | None
    key_value_heads: int | None
    head_size: int | None
    intermediate_size: int | None
    vocabulary_size: int | None
    max_positions: int | None
    tied_embeddings: bool
    dtype: str | None
    encoder_decoder: bool
    quantization: str | None
    experts: int | None
    """Those that a router chooses among, in a layer; None where there is no router."""
    remote_code: bool
    """It names Python files of its own (`auto_map`); transformers may know the architecture anyway."""
    raw: Mapping[str, Any]


def read_configuration(directory: Path) -> Configuration:
    """The facts of the base in `directory`; raises `DataError` when config.json is missing or broken."""
    path = directory / "config.json"
    if directory.is_dir() and not path.exists() and (other := no_base(directory)):
        raise other
    raw = read_json(path)
    return configuration_of(raw, where=str(directory / "config.json"))


def no_base(directory: Path) -> DataError | None:
    """What the directory holds where that is an adapter or a GGUF, not a checkpoint."""
    if (directory / "adapter_config.json").exists():
        return DataError(
            f"{directory}: this is an adapter, not a base",
            hint="name its base as `base` and this directory as `train: {from: DIRECTORY}`",
        )
    if any(directory.glob("*.gguf")):
        return DataError(
            f"{directory}: only a GGUF is there; a base must be the original checkpoint in safetensors",
            hint="name the hub id that the GGUF was made from",
        )
    return None


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file of the base; raises `DataError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file",
            hint="the directory of a base holds config.json, the tokenizer's files and the weights",
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON: {error}", hint="download or copy this file again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object", hint="download or copy this file again")
    return content


def configuration_of(raw: Mapping[str, Any], *, where: str = "config.json") -> Configuration:
    """The facts in a parsed configuration; raises `DataError` naming `where` if it has no architecture."""
    text = _text_part(raw)
    architectures = raw.get("architectures") or text.get("architectures") or []
    if not architectures or not isinstance(architectures, list):
        raise DataError(
            f"{where}: it names no architecture", hint='add "architectures", such as ["LlamaForCausalLM"]'
        )
    hidden = _count(text, "hidden_size", "n_embd", "d_model", "model_dim")
    heads = _count(text, "num_attention_heads", "n_head", "num_heads", "n_heads")
    head_size = _count(text, "head_dim", "attention_head_dim")
    if head_size is None and hidden and heads:
        head_size = hidden // heads
    return Configuration(
        architecture=str(architectures[0]),
        model_type=str(raw.get("model_type", "")),
        hidden_size=hidden,
        layers=_count(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        heads=heads,
        key_value_heads=_key_value_heads(text, heads),
        head_size=head_size,
        intermediate_size=_intermediate(text, hidden),
        vocabulary_size=_count(text, *_VOCABULARY) or _count(raw, "vocab_size"),
        max_positions=_count(
            text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"
        )
        or _POSITIONS.get(str(raw.get("model_type", ""))),
        tied_embeddings=ties_embeddings(raw) is not False,
        dtype=_dtype(raw, text),
        encoder_decoder=bool(raw.get("is_encoder_decoder", False)),
        quantization=_quantization(raw, text),
        experts=_experts(text),
        remote_code=bool(raw.get("auto_map")),
        raw=raw,
    )


def check_unquantized(configuration: Configuration, where: str) -> None:
    """Raise `DataError` if the base is stored quantized: an adapter merges into full weights only."""
    if configuration.quantization is None:
        return
    raise DataError(
        f"{where}: this base is already quantized ({configuration.quantization}); "
        "an adapter can only be merged into the unquantized one",
        hint="use the model that it was quantized from (its README names it); "
        "`train.method: qlora` quantizes by itself while training",
    )


def check_numbers(configuration: Configuration, where: str) -> None:
    """Raise `DataError` for numbers that no token's position, or no norm, can be calculated with.

    transformers and llama.cpp take a rotation's factor of zero or below, and calculate on with no numbers.
    """
    problems = [
        Problem(f"must be a number above 0 (got {json.dumps(value)})", name)
        for name, value in _above_zero(configuration.raw)
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf)
    ]
    if problems:
        raise DataError(
            f"{where}: no model can be calculated with these numbers",
            hint="compare config.json with the one on the hub",
            problems=list(dict.fromkeys(problems)),
        )


_ABOVE_ZERO = (
    "max_position_embeddings", "n_positions", "rope_theta", "rope_local_base_freq", "rotary_emb_base",
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "short_factor", "long_factor", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
)  # fmt: skip
_ROTATIONS = ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention")


def _above_zero(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each of those numbers, whatever part of the text model's configuration it is in."""
    for name, value in part.items():
        if name in _ABOVE_ZERO:
            yield from ((name, number) for number in (value if isinstance(value, list) else [value]))
        elif name in (*_TEXT_PARTS, *_ROTATIONS) and isinstance(value, dict):
            yield from _above_zero(value)


def rope_types(raw: Mapping[str, Any]) -> set[str]:
    """The kinds of rotary scaling that a parsed configuration asks for, `su` by its later name."""
    kinds = set()
    for part in (raw, _text_part(raw)):
        for name in ("rope_parameters", "rope_scaling"):
            scaling = part.get(name)
            if not isinstance(scaling, dict):
                continue
            # One for all layers, or one for each kind of layer.
            for each in [each for each in scaling.values() if isinstance(each, dict)] or [scaling]:
                if kind := each.get("rope_type") or each.get("type"):
                    kinds.add("longrope" if kind == "su" else str(kind).lower())
    return kinds


def with_vocabulary(raw: Mapping[str, Any], rows: int) -> Mapping[str, object]:
    """A parsed configuration with an embedding of `rows` rows, in the part that says it now."""

    def changed(part: Mapping[str, Any]) -> dict[str, object]:
        resized = {name: rows if name in _VOCABULARY else value for name, value in part.items()}
        if isinstance(pad := resized.get("pad_token_id"), int) and pad >= rows:
            resized["pad_token_id"] = None  # transformers builds no embedding with such a one
        return resized

    parts = {name: changed(part) for name in _TEXT_PARTS if isinstance(part := raw.get(name), dict)}
    whole = {**changed(raw), **parts}
    if not any(name in part for part in (whole, *parts.values()) for name in _VOCABULARY):
        whole["vocab_size"] = rows
    return whole


def with_own_head(raw: Mapping[str, Any]) -> Mapping[str, object]:
    """A parsed configuration whose output layer is not tied to the embedding."""
    parts = {name: {**part} for name in _TEXT_PARTS if isinstance(part := raw.get(name), dict)}
    for part in parts.values():
        part["tie_word_embeddings"] = False
    return {**raw, **parts, "tie_word_embeddings": False}


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in _TEXT_PARTS:
        part = raw.get(name)
        if isinstance(part, dict):
            return part
    return raw


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _experts(text: Mapping[str, Any]) -> int | None:
    part = text.get("ffn_config")  # DBRX keeps them there
    return _count(text, *_EXPERTS) or (_count(part, *_EXPERTS) if isinstance(part, dict) else None)


def _key_value_heads(text: Mapping[str, Any], heads: int | None) -> int | None:
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        return 1  # Falcon and StarCoder share one key and value head.
    return _count(text, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num") or heads


def _intermediate(text: Mapping[str, Any], hidden: int | None) -> int | None:
    size = _count(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
    # GPT-2 and its relatives leave it out and mean four times the hidden size.
    return size or (4 * hidden if hidden else None)


def ties_embeddings(raw: Mapping[str, Any]) -> bool | None:
    """Whether a parsed configuration has one tensor for embedding and output layer; None where it is silent.

    transformers 5 then does as the family does; before it tied, and the families that untie wrote it down.
    """
    for config in (raw, _text_part(raw)):
        if isinstance(config.get("tie_word_embeddings"), bool):
            return bool(config["tie_word_embeddings"])
    return None


def _dtype(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    for config in (raw, text):
        for name in ("dtype", "torch_dtype"):
            if isinstance(config.get(name), str):
                return str(config[name]).removeprefix("torch.")
    return None


def _quantization(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    settings = raw.get("quantization_config") or text.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method") or "unknown method")
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return f"{method}, 4 bits"
    bits = settings.get("bits") or settings.get("w_bit")
    return f"{method}, {bits} bits" if bits else method
