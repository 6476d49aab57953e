"""What the fields of a training run must agree on, and those that others leave without effect.

Not covered: what hangs on the base (`resolve/shape.py`) or on the machine (`train/speed.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from forge.recipe.fields import values
from forge.recipe.schema import Data, Recipe, Train

Finding = tuple[str, str]
"""A dotted field and what to say about it."""

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


def contradictions_of(recipe: Recipe, train: Train) -> Iterator[Finding]:
    """Fields of a training run that cannot hold together."""
    yield from _not_built(train)
    yield from _of_the_run(recipe, train)
    yield from _of_adapters(recipe, train)
    yield from _fast(recipe, train)
    yield from _devices(train)
    if train.compares:
        yield from _of_preferences(train, recipe.data)


def _not_built(train: Train) -> Iterator[Finding]:
    """What the libraries know and forge refuses, each with its reason."""
    if train.lora.init == "loftq":
        yield (
            "train.lora.init",
            "loftq quantizes the base anew, and its adapter fits no other file of it; take olora",
        )
    if train.lora.init == "eva":
        yield "train.lora.init", "eva needs a pass over the rows before training, not built; take olora"
    if train.continue_from is not None and train.method == "full":
        yield "train.continue_from", "goes on from an adapter, and train.method: full trains none; use lora"


# What the schedules of transformers take besides; those that are not named take nothing.
SCHEDULE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
_PROJECTING = ("galore", "apollo")
_ELSEWHERE = {"adamw_torch_xla": "TPUs", "adamw_torch_npu_fused": "Ascend NPUs"}


def _of_the_run(recipe: Recipe, train: Train) -> Iterator[Finding]:
    """What the settings of the loop leave no room for."""
    if train.evaluation_steps and recipe.data and recipe.data.eval == 0:
        yield "train.evaluation_steps", "there are no held-out rows to measure: data.eval is 0"
    if train.patience and not train.evaluation_steps:
        yield "train.patience", "counts evaluations, and there are none; set train.evaluation_steps"
    if train.warmup_steps and train.max_steps and train.warmup_steps >= train.max_steps:
        yield "train.warmup_steps", f"the run has {train.max_steps} steps: it would never train"
    known = SCHEDULE_OPTIONS.get(train.schedule, ())
    for name in train.schedule_options:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            yield "train.schedule_options", f"{train.schedule} has no {name}; it {takes}"
    least = {"min_lr", "min_lr_rate"} & train.schedule_options.keys()
    if "min_lr" in known and len(least) != 1:
        yield "train.schedule_options", f"{train.schedule} needs min_lr or min_lr_rate, one of the two"
    if "num_decay_steps" in known and "num_decay_steps" not in train.schedule_options:
        yield "train.schedule_options", f"{train.schedule} needs num_decay_steps"
    if train.optimizer.startswith(_PROJECTING):
        why = "projects the gradients of whole matrices, which LoRA has no need of; use adamw_torch"
        yield "train.optimizer", f"{train.optimizer} {why}"
    if where := _ELSEWHERE.get(train.optimizer):
        yield "train.optimizer", f"{train.optimizer} is for {where}; use adamw_torch"
    if train.attention.startswith("flash") and train.dtype == "fp32":
        yield "train.attention", f"{train.attention} calculates in 16 bits only, and train.dtype is fp32"


def _of_adapters(recipe: Recipe, train: Train) -> Iterator[Finding]:
    """What a shape of an adapter cannot be together with; peft would say so at the end, or not at all."""
    lora = train.lora
    if train.method == "full" or train.continue_from is not None:
        return
    if lora.dora and train.method == "int8":
        yield (
            "train.lora.dora",
            "reads the lengths of rows, which 8-bit weights hide; use qlora or lora",
        )
    if lora.experts:
        yield from _of_experts(train)
    odd = [rank for rank in (lora.r, *lora.rank_pattern.values()) if rank % 2]
    if lora.init == "orthogonal" and odd:
        yield "train.lora.init", f"orthogonal begins with even ranks only, not {odd[0]}"
    named = () if isinstance(lora.targets, str) else lora.targets
    if lora.token_indices and any(name in _EMBEDDINGS for name in (*named, *lora.modules_to_save)):
        yield "train.lora.token_indices", "the embedding is trained as a whole already; leave them out"
    if twice := sorted({*named} & {*lora.modules_to_save}):
        yield (
            "train.lora.modules_to_save",
            f"{twice[0]} is in train.lora.targets; name it in one of the two",
        )
    if not lora.moves_base:
        return
    if lora.init.startswith("pissa") and train.method != "lora":
        yield "train.lora.init", f"{lora.init} begins with parts of whole weights; use train.method: lora"
    lost = f"{lora.init} is converted when it is saved, without this; use train.lora.init: default"
    beside = {
        "train.lora.dora": lora.dora,
        "train.lora.modules_to_save": lora.modules_to_save,
        "train.lora.token_indices": lora.token_indices,
        "base.tokens.add": recipe.base.tokens.add,
    }
    yield from ((field, lost) for field, is_asked in beside.items() if is_asked)
    if lora.rslora and (lora.rank_pattern or lora.alpha_pattern):
        yield "train.lora.rslora", f"{lora.init} with patterns cannot be converted beside it; leave it out"


def _of_experts(train: Train) -> Iterator[Finding]:
    """What peft's factors for parameters cannot be together with."""
    lora, field = train.lora, "train.lora.experts"
    if train.method != "lora":
        yield field, f"train.method: {train.method} leaves joined experts as they are; use lora"
    if lora.dropout:
        yield "train.lora.dropout", "experts are adapted without it; set it to 0"
    if lora.dora:
        yield "train.lora.dora", "is for layers, and joined experts are parameters; leave it out"
    if lora.init not in ("default", "gaussian"):
        yield "train.lora.init", f"{lora.init} begins with layers' weights; use default beside experts"
    if lora.layers:
        yield "train.lora.layers", "peft adapts the experts of every layer; leave one of the two out"


def _devices(train: Train) -> Iterator[Finding]:
    """What several devices leave no room for."""
    several = train.processes != 1
    if isinstance(train.devices, tuple) and train.device in ("cpu", "mps"):
        yield "train.devices", f"numbers are those of GPUs, and train.device is {train.device}; say how many"
    if train.device == "mps" and several:
        yield "train.devices", "a Mac has one GPU; leave it out"
    if train.nodes > 1 and train.retry_smaller:
        yield "train.retry_smaller", "the other machines would not hear of it; leave it out with train.nodes"
    if train.nodes > 1 and train.devices == "auto":
        yield "train.devices", "say how many, the same on each machine"
    if train.objective == "kto" and several:
        yield "train.objective", "kto compares answers of one step on one device; leave train.devices out"
    if train.compile is True and several:
        yield "train.compile", "is for one device; leave it out"
    if train.strategy != "ddp":
        if not several:
            yield (
                "train.strategy",
                f"{train.strategy} shares a model among devices; name train.devices, two or more",
            )
        for holds, field, why in _not_shared(train):
            if holds:
                yield f"train.{field}", f"train.strategy: {train.strategy}: {why}"


def _not_shared(train: Train) -> Iterator[tuple[bool, str, str]]:
    """What stands in the way of sharing a model's parts among devices: whether, the field and why."""
    lora, qlora = train.lora, train.method == "qlora"
    together = "is not put together again; leave it out"
    yield train.method == "int8", "method", "8-bit weights cannot be cut; use qlora or lora"
    yield train.method == "auto", "method", "say which: what fits one GPU says nothing of several"
    yield train.method == "full", "method", "a module saved whole is not put together again; use lora"
    yield train.compares, "objective", f"{train.objective} compares with the whole model"
    yield lora.dora, "lora.dora", "the length of a row is not known where it is cut; leave it out"
    yield lora.experts, "lora.experts", "joined experts are not cut with their factors; leave it out"
    yield lora.init != "default", "lora.init", f"{lora.init} is made of whole weights; use default"
    yield bool(lora.modules_to_save), "lora.modules_to_save", together
    yield bool(lora.token_indices), "lora.token_indices", together
    yield bool(train.evaluation_steps), "evaluation_steps", f"the best adapter {together}"
    yield train.device == "cpu", "device", "is for GPUs; on a CPU use ddp"
    if qlora and train.strategy == "fsdp":
        kinds = "packed weights can be cut only as numbers of the compute type; use bfloat16"
        yield train.quant_storage == "uint8", "quant_storage", kinds
    if qlora and train.strategy == "deepspeed":
        yield True, "method", "ZeRO 3 cannot cut 4-bit weights; use lora, or train.strategy: fsdp"


def _fast(recipe: Recipe, train: Train) -> Iterator[Finding]:
    """Ways to be fast that stand in each other's way."""
    if train.compile is True:
        if train.liger is True:
            yield "train.liger", "torch.compile joins the same layers; take one of the two"
        if train.offload_activations is True:
            yield (
                "train.offload_activations",
                "torch.compile keeps what it saves to itself, nothing would be moved; take one of the two",
            )
        if train.method == "int8":
            yield "train.compile", "bitsandbytes' 8-bit layers cannot be compiled; use qlora or lora"
        if train.device == "mps":
            yield "train.compile", "torch.compile is not made for mps yet; leave it out"
    if train.backend == "unsloth":
        if train.devices_each != 1:
            yield "train.devices", "train.backend: unsloth is used here on one device"
        leaves = values(recipe)
        for field, allowed, why in _OF_UNSLOTH:
            if leaves[field] not in allowed:
                yield field, f"train.backend: unsloth {why}"


# Field, the values that it may have, and why no others.
_OF_UNSLOTH: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("base.tokens.add", ([],), "adds tokens its own way; leave them out"),
    ("train.attention", ("auto",), "has its own; leave it out"),
    ("train.compile", ("auto", False), "compiles by itself; leave it out"),
    ("train.continue_from", (None,), "starts anew; leave it out"),
    ("train.double_quantization", (True,), "quantizes the scales too; leave it out"),
    ("train.evaluation_steps", (None,), "answers questions from another form of the model; leave it out"),
    ("train.four_bit_type", ("nf4",), "knows nf4 only"),
    ("train.liger", ("auto", False), "has kernels of its own; leave it out"),
    ("train.lora.alpha_pattern", ({},), "gives every module the same; leave it out"),
    ("train.lora.dora", (False,), "has no fast way for dora; leave it out"),
    ("train.lora.experts", (False,), "takes experts its own way; leave it out"),
    ("train.lora.init", ("default",), "starts factors the usual way; use default"),
    ("train.lora.modules_to_save", ([],), "saves them its own way; leave it out"),
    ("train.lora.rank_pattern", ({},), "gives every module the same; leave it out"),
    ("train.lora.token_indices", ([],), "has no rows of their own; leave it out"),
    ("train.method", ("auto", "lora", "qlora"), "is used here for lora and qlora only"),
    ("train.nodes", (1,), "is used here on one device"),
    ("train.objective", ("sft",), "is used here for sft only"),
    ("train.offload_activations", ("auto", False), "has its own; leave it out"),
    ("train.packing", (False,), "packs its own way; leave it out"),
    ("train.quant_storage", ("uint8",), "packs weights in uint8; leave it out"),
)


def _of_preferences(train: Train, data: Data | None) -> Iterator[Finding]:
    """What learning from good and bad answers leaves no room for."""
    objective = train.objective
    if train.has_reference and train.method == "full":
        yield "train.method", f"full and {objective} would hold the model three times; use lora or qlora"
    if train.has_reference and train.lora.moves_base:
        yield (
            "train.lora.init",
            f"{train.lora.init} moves the base, which {objective} compares with; use default",
        )
    if train.packing:
        yield "train.packing", f"{objective} compares whole rows and packs none; leave it out"
    if train.length_groups:
        why = "takes its rows in an order of its own" if objective == "kto" else "takes its rows in pairs"
        yield "train.length_groups", f"{objective} {why}; leave it out"
    if train.batch_size != "auto" and train.batch_size < train.least_batch:
        yield (
            "train.batch_size",
            "kto compares each answer with another's of the same step on the device; 2 at least",
        )
    if objective == "orpo" and train.offload_activations is True:
        yield "train.offload_activations", "trl's trainer for orpo has no such option; leave it out"
    if data and data.overlong in ("truncate", "chunk"):
        yield "data.overlong", "an answer that is cut is not the one that was judged; use error or drop"


def unused(train: Train) -> Mapping[str, tuple[bool, str]]:
    """Fields of a training that others leave without effect, and why."""
    has_no_4_bits, other = train.method not in ("qlora", "auto"), f"train.method is {train.method}"
    is_constant, without_warmup = train.schedule == "constant", "constant has none; constant_with_warmup has"
    return {
        "epochs": (train.max_steps is not None, "train.max_steps decides"),
        "lora": (
            train.continue_from is not None or train.method == "full",
            other if train.method == "full" else "train.continue_from has its own shape",
        ),
        "four_bit_type": (has_no_4_bits, other),
        "double_quantization": (has_no_4_bits, other),
        "quant_storage": (has_no_4_bits, other),
        "beta": (not train.compares, f"train.objective is {train.objective}"),
        "keep": (not train.evaluation_steps, "without train.evaluation_steps there is one adapter to keep"),
        "warmup_fraction": (
            train.warmup_steps is not None or is_constant,
            without_warmup if is_constant else "train.warmup_steps decides",
        ),
        "warmup_steps": (is_constant, without_warmup),
    }
