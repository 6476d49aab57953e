"""A real GGUF of a few hundred kB whose greedy reply is known: for tests of serving.

A one-layer model of the Llama architecture with ChatML. Its layers are zero, so that the next
token depends on the last one alone, and its output matrix is written by hand: after the
assistant's header it says `reply` word by word, then ends its turn. Prompts are printable ASCII
and newlines, one token a character, so that every answer is valid UTF-8.

Not covered: answers that depend on the question (the counts of prompt tokens do).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.makers.tokenizer import CHATML

REPLY = "In this sandwich, bacon there is."
CONTEXT = 4096
WIDTH = 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, _, END_OF_TURN = range(3)
# How byte-level BPE spells the characters that have no shape.
SPELLING = str.maketrans({" ": "Ġ", "\n": "Ċ"})


def write_tiny_gguf(
    path: Path,
    *,
    reply: str = REPLY,
    endless: bool = False,
    template: str | None = CHATML,
    adds_bos: bool = False,
    architecture: str = "llama",
    kind: str = "model",
    end: str = SPECIAL[END_OF_TURN],
    ends_at: int = END_OF_TURN,
    sampling: Mapping[str, float] | None = None,
    quantized: bool = False,
) -> Path:
    """Write the model that answers everything with `reply`, whose words must all differ.

    `endless`: begins again after the last word, so that a reply ends by its length only. A `template` of
    None is left out; `architecture` and `kind` are what the header says. `end` is the text of the token
    that ends a turn, and `ends_at` the id that the header gives as eos and eot: with another one than that
    token's the model goes on behind it. `sampling` are general.sampling keys; `quantized`: to Q8_0.
    """
    import gguf

    words = [word if index == 0 else " " + word for index, word in enumerate(reply.split(" "))]
    special = [*SPECIAL[:END_OF_TURN], end]
    tokens = [*special, "\n", *(chr(code) for code in range(32, 127)), *words]
    if len(set(words)) < len(words) or len(tokens) > WIDTH:
        raise ValueError("the words of the reply must differ, and fit beside the characters")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_Q8_0 if quantized else kinds.MOSTLY_F16)
    for name, value in (sampling or {}).items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{name}", value)
    _add_tokenizer(writer, tokens, special, adds_bos, ends_at)
    if template is not None:
        writer.add_chat_template(template)
    _add_tensors(writer, tokens, words, endless=endless, goes_on=ends_at != END_OF_TURN, quantized=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(
    writer: object, tokens: list[str], special: list[str], adds_bos: bool, ends_at: int
) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*special, *(token.translate(SPELLING) for token in tokens[len(special) :])])
    writer.add_token_types([control if token in special else normal for token in tokens])
    # One that no prompt reaches: llama.cpp wants the list, and no merge keeps characters apart.
    writer.add_token_merges(["~ ~"])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(ends_at)
    writer.add_eot_token_id(ends_at)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(adds_bos)


def _add_tensors(
    writer: object, tokens: list[str], words: list[str], *, endless: bool, goes_on: bool, quantized: bool
) -> None:
    import gguf
    import numpy as np

    assert isinstance(writer, gguf.GGUFWriter)
    half = WIDTH // 2
    layer = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (half, WIDTH), "attn_v": (half, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (WIDTH, WIDTH), "ffn_up": (WIDTH, WIDTH),
        "ffn_down": (WIDTH, WIDTH),
    }  # fmt: skip
    for name, shape in layer.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float16))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    embedding: Any = np.eye(len(tokens), WIDTH, dtype=np.float16)
    writer.add_tensor("token_embd.weight", embedding)
    output: Any = np.zeros((len(tokens), WIDTH), np.float16)
    said = [tokens.index(word, len(tokens) - len(words)) for word in words]
    chain = [tokens.index("\n"), *said, said[0] if endless else END_OF_TURN]
    for before, after in pairwise([*chain, said[0]] if goes_on else chain):
        output[after, before] = 4
    if quantized:
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("output.weight", gguf.quants.quantize(output.astype(np.float32), q8), raw_dtype=q8)
    else:
        writer.add_tensor("output.weight", output)
