"""The names of an adapter's tensors: what peft writes, and what wraps them in other tools' files.

A state dict that was saved without peft's save_pretrained has the adapter's own name in it
(`lora_A.default.weight`: DeepSpeed, FSDP, swift); torch.compile, FSDP, checkpointing and DataParallel put a
part of their own around modules. All of these only add parts, so taking them out is safe; any other name is
left as it is, and then has no place in the base.
"""

from __future__ import annotations

import re

PREFIX = "base_model.model."
_AROUND = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OUTSIDE = ("module.", PREFIX)
# (pattern, part): the adapter's own name may stand behind the part.
_FACTORS = (
    (re.compile(r"^(.+)\.lora_A(?:\.([^.]+))?\.weight$"), "A"),
    (re.compile(r"^(.+)\.lora_B(?:\.([^.]+))?\.weight$"), "B"),
    (re.compile(r"^(.+)\.lora_embedding_A(?:\.([^.]+))?$"), "embedding A"),
    (re.compile(r"^(.+)\.lora_embedding_B(?:\.([^.]+))?$"), "embedding B"),
    (re.compile(r"^(.+)\.lora_magnitude_vector(?:\.weight)?$"), "magnitude"),
    (re.compile(r"^(.+)\.lora_magnitude_vector\.([^.]+)(?:\.weight)?$"), "magnitude"),
    (re.compile(r"^(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.([^.]+))?$"), "rows"),
)
_COPIES = re.compile(r"\.modules_to_save\.(?:default\.)?")


def bare(name: str) -> str:
    """The tensor's name in the model: nothing around it, and without peft's prefix."""
    for part in _AROUND:
        name = name.replace(part, "")
    while name.startswith(_OUTSIDE):
        for part in _OUTSIDE:
            name = name.removeprefix(part)
    return name


def factor(name: str) -> tuple[str, str, str] | None:
    """Of a tensor that peft's layers own: module, part, the adapter's name ("" where there is none)."""
    for pattern, part in _FACTORS:
        if match := pattern.match(bare(name)):
            module, *own = match.groups()
            return module, part, (own[0] if own else "") or ""
    return None


def whole(name: str) -> str:
    """Of a tensor that is saved whole: its name in the model, without peft's wrappers."""
    name = _COPIES.sub(".", bare(name))
    return name.replace(".base_layer.", ".").replace(".token_adapter.", ".")


def as_peft_writes(name: str) -> str:
    """The name that peft's save_pretrained gives to this tensor."""
    if (parts := factor(name)) is None:
        return PREFIX + _COPIES.sub(".", bare(name))
    module, part, _ = parts
    return f"{PREFIX}{module}.{_WRITTEN[part]}"


_WRITTEN = {
    "A": "lora_A.weight", "B": "lora_B.weight", "embedding A": "lora_embedding_A",
    "embedding B": "lora_embedding_B", "magnitude": "lora_magnitude_vector",
    "rows": "token_adapter.trainable_tokens_delta",
}  # fmt: skip
