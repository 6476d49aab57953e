"""What an adapter may be put on in a mixture of experts: not its router, its experts if asked.

transformers joins the experts' tensors, and peft adapts what is joined by `target_parameters`: with no
dropout, and with factors that a GGUF adapter has no place for.

Not covered: experts and routers of families that name them otherwise; peft has the last word in training.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_EXPERT = re.compile(r"\.experts\.")
_ROUTER = re.compile(r"\.(gate|router)$")
# As transformers joins them, whatever the file names them.
_JOINED = {"experts", "gate_up_proj"}
WHY = "a router that moves chooses other experts, and train.lora.experts: true adapts the experts"


def holds_experts(tensors: Collection[str], count: int | None) -> bool:
    """Whether a base of these tensors, whose configuration names `count` experts, is a mixture of them."""
    return (count or 0) > 1 or any(map(_EXPERT.search, tensors))


def adapted_experts(targets: str | Collection[str], tensors: Collection[str]) -> tuple[str, ...]:
    """What of `train.lora.targets` takes in experts or the router of a mixture with these tensors.

    Of a name its last part counts, as for peft; a regular expression is tried on the names in the file and
    on those that transformers has for them.
    """
    if targets in ("auto", "attention"):
        return ()
    if targets == "all-linear":
        return ("all-linear",)
    modules = {name.removesuffix(".weight") for name in tensors}
    inner = {module for module in modules if _EXPERT.search(module) or _ROUTER.search(module)}
    if isinstance(targets, str):
        fits = any(re.fullmatch(targets, name) for module in inner for name in _names(module))
        return (targets,) if fits else ()
    last = {module.rpartition(".")[2] for module in inner} | _JOINED
    return tuple(target for target in targets if target.rpartition(".")[2] in last)


def _names(module: str) -> Iterator[str]:
    """A module's name in the file, with its experts joined, and in the block that transformers has now."""
    joined = re.sub(r"\.experts\.\d+\.", ".experts.", module)
    yield from (module, joined, joined.replace(".block_sparse_moe.", ".mlp."))
