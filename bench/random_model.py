"""A Llama of random weights and a LoRA adapter for it: `python -m bench.random_model DIR SIZE [TOKENIZER]`.

A program of its own, so that the measuring process stays small. bfloat16, one file, the vocabulary and
the pre-tokenizer of GPT-2, which llama.cpp's converter knows, or the files in the directory TOKENIZER, which
need no download, with as many rows. Written slab by slab, so memory is small.
Of 7B the base's weights are a hole in a sparse file: for what reads its headers alone.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.adapter.tokenizer import copy_tokenizer
from forge.export.tensors import LazyTensor, write_safetensors

RANK = 16
_ROWS = 50304  # of GPT-2's vocabulary, a multiple of 64


@dataclass(frozen=True)
class Size:
    """The shape of a Llama, its output layer not tied to its embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    sparse: bool = False


SIZES = {
    "0.1B": Size(768, 2048, 6, 12),
    "0.5B": Size(1280, 3584, 20, 20),
    "2B": Size(2048, 5632, 40, 32),
    "7B": Size(4096, 12288, 32, 32, sparse=True),
    "1B": Size(2048, 8192, 16, 32),
    "tiny": Size(256, 512, 2, 4),
}


def main(directory: Path, name: str, tokenizer: Path | None = None) -> None:
    """Write `directory/base` and `directory/adapter`."""
    size, base, adapter = SIZES[name], directory / "base", directory / "adapter"
    adapter.mkdir(parents=True)
    rows = _ROWS
    if tokenizer:
        base.mkdir()
        copy_tokenizer(tokenizer, base)
    else:
        from tests.vocabularies import write_tokenizer

        rows = -(-write_tokenizer(base, "gpt-2") // 64) * 64
    (base / "config.json").write_text(json.dumps(_configuration(size, rows), indent=1))
    tensors = [random_tensor(tensor, "BF16", shape) for tensor, shape in _tensors(size, rows)]
    if size.sparse:
        _write_hole(base / "model.safetensors", tensors)
    else:
        write_safetensors(base / "model.safetensors", tensors, lambda done, total: None)
    layers = [tensor for tensor in tensors if "_proj" in tensor.name]
    targets = sorted({tensor.name.split(".")[-2] for tensor in layers})
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": targets,
        "bias": "none",
    }
    fields |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    factors = [factor for layer in layers for factor in _factors(layer)]
    write_safetensors(adapter / "adapter_model.safetensors", factors, lambda done, total: None)
    sys.stdout.write(json.dumps({"parameters": sum(math.prod(tensor.shape) for tensor in tensors)}) + "\n")


def _write_hole(path: Path, tensors: Sequence[LazyTensor]) -> None:
    """A safetensors file that has the size of `tensors`, and on the disk that of its header."""
    header, end = {}, 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    told = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(told)) + told)
        stream.truncate(stream.tell() + end)


def _configuration(size: Size, rows: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.heads // 2, "vocab_size": rows,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _tensors(size: Size, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, half = size.hidden, size.hidden // 2
    yield "model.embed_tokens.weight", (rows, hidden)
    for number in range(size.layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name, out in (("q", hidden), ("k", half), ("v", half), ("o", hidden)):
            yield f"{layer}.self_attn.{name}_proj.weight", (out, hidden)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (size.intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, size.intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (rows, hidden)


def _factors(layer: LazyTensor) -> Iterator[LazyTensor]:
    module = f"base_model.model.{layer.name.removesuffix('.weight')}"
    yield random_tensor(f"{module}.lora_A.weight", "F32", (RANK, layer.shape[1]))
    yield random_tensor(f"{module}.lora_B.weight", "F32", (layer.shape[0], RANK))


def random_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    """A tensor of normally distributed values; its name and shape decide them."""

    def read(start: int, stop: int) -> Any:
        import torch

        torch.manual_seed(zlib.crc32(f"{name} {start}".encode()))
        values = torch.randn(stop - start, shape[-1]) * 0.02
        return values.to(torch.bfloat16 if dtype == "BF16" else torch.float32)

    return LazyTensor(name, dtype, shape, read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
