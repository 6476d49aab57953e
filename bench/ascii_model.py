"""A GGUF in the shape of a 0.5B model (Qwen2.5-0.5B's) whose every token is ASCII, with random weights.

For measuring how fast a server is: what it says means nothing, but is valid text, and takes as long
as that of a real model. About half a gigabyte (q8_0).
"""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tests.makers.tokenizer import CHATML

LAYERS, WIDTH, FEED, HEADS, KEY_HEADS, VOCABULARY, CONTEXT = 24, 896, 4864, 14, 2, 151_936, 32_768
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_ascii_model(path: Path) -> Path:
    """Write it to `path`; the same bytes every time."""
    import gguf
    import numpy as np
    from gguf.quants import quantize

    random = np.random.default_rng(0)
    # One matrix of noise serves all: what is computed with it is as much work as with any other.
    noise: Any = random.standard_normal((VOCABULARY, WIDTH), dtype=np.float32) * 0.02
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "qwen2")
    _describe(writer)
    writer.add_tensor("token_embd.weight", quantize(noise, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    key_width = WIDTH // HEADS * KEY_HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (key_width, WIDTH), "attn_v": (key_width, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH),
        "ffn_down": (WIDTH, FEED),
    }  # fmt: skip
    quantized = {
        name: quantize(noise.reshape(-1)[: rows * width].reshape(rows, width), kind)
        for name, (rows, width) in shapes.items()
    }
    for layer in range(LAYERS):
        for name, tensor in quantized.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensor, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name, size in (("attn_q", WIDTH), ("attn_k", key_width), ("attn_v", key_width)):
            writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: Any) -> None:
    import gguf

    characters = [chr(code) for code in range(33, 127)]
    made = ("".join(letters) for length in (2, 3, 4) for letters in product(ascii_lowercase, repeat=length))
    known = [*_SPECIAL, "Ċ", "Ġ", *characters]
    tokens = [*known, *islice(made, VOCABULARY - len(known))]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in _SPECIAL else normal for token in tokens])
    writer.add_token_merges(["~ ~"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
