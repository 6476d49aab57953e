"""Tiny real models and adapters: random weights of a fixed seed, saved as Hugging Face saves them.

Hidden size 256 (K-quants need it), two layers, a real tokenizer (`tests.vocabularies`). Runs torch,
so only tests marked `training` call this.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.chat.template import ChatTemplate
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE, Settings, prepare
from forge.data.prompt_format import prompt_format
from forge.data.reading import Source
from forge.train.arithmetic import Arithmetic
from forge.train.evaluate import Evaluated, EvaluateRequest
from forge.train.figures import Change
from forge.train.model import BaseSettings
from tests.vocabularies import write_tokenizer

# peft (github.com/huggingface/peft) asks transformers for a name that it deprecates.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
ADDED = ("<|turn|>", "<|stop|>")
VOCABULARIES = {"llama": "llama-bpe", "qwen2": "qwen2", "phi3": "phi-3", "gpt2": "gpt-2"}
# transformers' prefix of the classes, by the name used here.
KINDS = {
    "llama": "Llama", "qwen2": "Qwen2", "phi3": "Phi3", "gpt2": "GPT2", "mistral": "Mistral",
    "ministral3": "Ministral3",
    "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe", "olmoe": "Olmoe",
    "cohere": "Cohere", "granite": "Granite", "smollm3": "SmolLM3", "stablelm": "StableLm",
    "cohere2": "Cohere2", "gpt_neox": "GPTNeoX",
    "starcoder2": "Starcoder2", "gpt_oss": "GptOss", "granitemoe": "GraniteMoe",
}  # fmt: skip
_OWN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "phi3": {"original_max_position_embeddings": 512, "sliding_window": None},
    "qwen3": {"head_dim": 64},
    "cohere2": {"head_dim": 64},
    # Gemma's own have the head's size for both; llama.cpp takes that for granted.
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    "qwen3_moe": {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
}  # fmt: skip
ROWS = {
    "There is bacon.": "Bacon, there is.",
    "A cat sees a dog.": "A dog, a cat sees.",
    "The house is red.": "Red, the house is.",
    "I see the river.": "The river, I see.",
}
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def make_model(
    directory: Path,
    architecture: str = "llama",
    vocabulary: str | None = None,
    *,
    shards: int = 1,
    seed: int = 0,
    template: str | None = None,
    dtype: str = "bf16",
    **changes: Any,
) -> Path:
    """Write a model of `architecture` (a key of `KINDS`) in bfloat16; returns `directory`.

    `dtype` may be f16 or f32 too. `changes` are fields of its configuration; `tie_word_embeddings` is true
    unless changed, as in the small models of these families (Phi-3 excepted).
    """
    rows = write_tokenizer(
        directory, vocabulary or VOCABULARIES.get(architecture, "home-made"), template=template
    )
    model = _model(architecture, -(-rows // 32) * 32, seed, changes, dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=size // shards + 1024 if shards > 1 else "10GB")
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)
    return directory


def _model(architecture: str, rows: int, seed: int, changes: Mapping[str, Any], dtype: str) -> Any:
    import torch
    import transformers

    fields: dict[str, Any] = {
        **SIZES, "vocab_size": rows, "tie_word_embeddings": architecture != "phi3", "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.08,
        **_OWN_FIELDS.get(architecture, {}), **changes,
    }  # fmt: skip
    if architecture == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names |= {"max_position_embeddings": "n_positions"}
        fields = {names.get(name, name): value for name, value in fields.items()}
        fields.pop("num_key_value_heads")
        fields["n_inner"] = fields.pop("intermediate_size")
    configuration = getattr(transformers, f"{KINDS[architecture]}Config")(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(configuration)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
                parameter.data += torch.randn_like(parameter) * 0.1
    return model.to({"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype])


def make_adapter(base: Path, directory: Path, *, seed: int = 1, **options: Any) -> Path:
    """Write a LoRA adapter for `base` with random factors, B too; returns `directory`.

    `options` are peft's LoraConfig fields; modules_to_save are moved away from the base's values.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return _save_adapter(model, directory, seed, options)


def make_resized(
    base: Path, directory: Path, *, added: Sequence[str] = ADDED, multiple: int = 64, **options: Any
) -> Path:
    """Write an adapter for `base` with the tokens `added`, as its users do; its tokenizer is beside it.

    The embedding has a row for each token, rounded up to a `multiple`.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(added), special_tokens=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
    _save_adapter(model, directory, 1, options)
    tokenizer.save_pretrained(directory)
    return directory


def _save_adapter(model: Any, directory: Path, seed: int, options: Mapping[str, Any]) -> Path:
    import peft
    import torch

    fields = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft warns of embeddings and tied weights, which is what some tests are about.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.data.normal_(std=0.02)
            elif any(part in name for part in ("modules_to_save", "magnitude", "trainable_tokens")):
                parameter.data += torch.randn_like(parameter) * 0.02
        adapted.save_pretrained(directory)
    (directory / "adapter_model.safetensors").chmod(0o644)
    (directory / "README.md").unlink()
    return directory


def load(base: Path, adapter: Path | None = None, *, merge: bool = True, rows: int | None = None) -> Any:
    """The model in float32, with the adapter merged by peft, or active if `merge` is false.

    `rows` are those of the embedding where it was resized.
    """
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
        return adapted.merge_and_unload() if merge else adapted


def change_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file, or remove those that are given as None."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def change_tensors(path: Path, changes: Mapping[str, Any]) -> None:
    """Replace tensors of a safetensors file; a change to None removes one."""
    from safetensors.torch import load_file, save_file

    tensors = {**load_file(path), **changes}
    scratch = path.with_suffix(".new")
    save_file({name: one for name, one in tensors.items() if one is not None}, scratch, {"format": "pt"})
    scratch.replace(path)


def prepare_rows(base: Path, directory: Path) -> Path:
    """`ROWS` as training rows; they are the held-out rows too, so that learning them by heart shows."""
    from tokenizers import Tokenizer

    source = directory / "rows.json"
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS.items()]
    source.write_text(json.dumps(rows), encoding="utf-8")
    template = ChatTemplate((base / "chat_template.jinja").read_text(encoding="utf-8"))
    form = prompt_format(template, Tokenizer.from_file(str(base / "tokenizer.json")))
    prepare(Settings([Source((source,))], 0), form, 512, directory)
    (directory / HELDOUT_FILE).write_bytes((directory / TRAIN_FILE).read_bytes())
    return directory


def evaluation(base: Path, adapter: Path, data: Path, *, quantize: bool = False) -> EvaluateRequest:
    """As the stage asks for it, for the home-made vocabulary."""
    return EvaluateRequest(
        base,
        adapter,
        data,
        tokenizer=base,
        loading=BaseSettings("qlora" if quantize else "lora"),
        device="cpu",
        dtype="bf16" if quantize else "fp32",
        end_of_turn_id=2,
        pad_token_id=0,
    )


def evaluated(before: float = 2.0, after: float = 1.0, **others: Any) -> Evaluated:
    """Held-out figures with these losses."""
    measured = Evaluated(
        rows=20,
        vocabulary=1456,
        device="cpu",
        compute="float32",
        arithmetic=Arithmetic("float32", "float32"),
        loss=Change(before, after),
        loss_error=0.01,
        perplexity=Change(math.exp(before), math.exp(after)),
        exact=None,
    )
    return replace(measured, **others)
