"""What a recipe's sections must agree on, what looks wrong, and whether the files it names exist.

Not covered: what those files hold; that is found when they are read, before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from forge.recipe.explain import nearest
from forge.recipe.fields import values
from forge.recipe.quants import NEED_IMATRIX
from forge.recipe.schema import Adopted, Data, Recipe, Train
from forge.recipe.tree import Node
from forge.recipe.words import BUILTIN_BASES, BUILTIN_DATA, DATA_SUFFIXES

Finding = tuple[str, str]
"""A dotted field and what to say about it."""

_LOW_LEARNING_RATE = 5e-5
_NAMED: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("base", "id"), "directory", BUILTIN_BASES),
    (("data", "source"), "file", BUILTIN_DATA),
    (("data", "eval"), "file", BUILTIN_DATA),
    (("train", "from"), "directory", ()),
    (("train", "continue_from"), "directory", ()),
)
_EIGHT_BIT = ("adamw_bnb_8bit", "paged_adamw_8bit")


def local_path(named: str, directory: Path) -> Path | None:
    """The local path that `named` means, relative to the recipe's `directory`; None for a hub id.

    A path starts with `/`, `./`, `../` or `~`, ends like a data file, or is there.
    """
    if named.startswith("builtin:"):
        return None
    try:
        path = directory / Path(named).expanduser()
        there = path.exists()
    except (OSError, RuntimeError):  # a name too long for a file; `~` of an unknown user
        path, there = directory / named, False
    looks_local = named.startswith(("/", "./", "../", "~")) or named in (".", "..")
    return path if there or looks_local or path.suffix in DATA_SUFFIXES else None


def _beside(path: Path) -> list[str]:
    try:
        return [item.name for item in path.parent.iterdir()]
    except OSError:
        return []


def _is(path: Path, what: Callable[[Path], bool]) -> bool:
    try:
        return what(path)
    except OSError:
        return False


def _builtin(field: str, named: str, known: tuple[str, ...]) -> Iterator[Finding]:
    word = named.removeprefix("builtin:")
    if named.startswith("builtin:") and word not in known:
        there_is = ", ".join("builtin:" + name for name in known) or "none here"
        yield field, f"there is no builtin:{word}; there is {there_is}"


def _missing(field: str, named: str, directory: Path, *, kind: str) -> Iterator[Finding]:
    path = local_path(named, directory)
    is_pattern = kind == "file" and any(letter in named for letter in "*?[")  # `data.sources` looks for those
    if path is None or is_pattern:
        return
    if kind == "directory" and _is(path, Path.is_file):
        yield field, f"must be a directory, not a file: {named}"
    elif not _is(path, Path.exists):
        meant = nearest(path.name, _beside(path))
        asked = f"; did you mean {meant}?" if meant else f" (looked in {path.parent.resolve()})"
        yield field, f"no such {kind}: {named}{asked}"


def missing_files(root: Node, directory: Path) -> Iterator[Finding]:
    """The local files and directories that the recipe names and that are not there.

    Reads the tree, not the recipe, so that a fault elsewhere does not hide them.
    """
    for path, kind, builtin in _NAMED:
        node, depth = root.follow(path)
        if isinstance(node.value, str) and (depth == len(path) or path[-1] in ("id", "source")):
            field = ".".join(map(str, path[:depth]))
            yield from _builtin(field, node.value, builtin)
            yield from _missing(field, node.value, directory, kind=kind)


def lacks_data(root: Node) -> bool:
    """Whether something is to be trained and no data is named (reported before the schema looks)."""
    train, data = root.child("train"), root.child("data")
    value = {} if train is None else train.value
    trains = isinstance(value, dict) and "from" not in value
    return trains and (data is None or data.value is None)


def contradictions(recipe: Recipe) -> Iterator[Finding]:
    """Fields that cannot hold together."""
    train = recipe.train
    yield from _calibration(recipe)
    if isinstance(train, Train):
        yield from _not_built(train)
        yield from _fast(recipe, train)
        yield from _devices(train)
        if train.compares:
            yield from _of_preferences(train, recipe.data)
    if recipe.deploy.runtime == "container" and recipe.deploy.gpu_layers:
        yield (
            "deploy.gpu_layers",
            "a recipe's container is the CPU's; leave it out, and serve with forge serve --image afterwards",
        )
    yield from _without_gguf(recipe)
    if recipe.base.tokens.add:
        if not isinstance(train, Train):
            yield "base.tokens.add", "only training can teach what they mean; train, or leave them out"
        elif train.continue_from:
            yield "base.tokens.add", "an adapter that is trained further keeps its own tokens; leave them out"
        if recipe.export.mode == "adapter":
            yield "base.tokens.add", "their rows have no place in a GGUF adapter; use export.mode: merged"
    if recipe.export.mode == "adapter":
        if train is None:
            yield "export.mode", "train is none, so there is no adapter to export; use merged"
        if isinstance(train, Train) and train.lora.modules_to_save:
            yield "train.lora.modules_to_save", "cannot be exported as an adapter; use export.mode: merged"
        if isinstance(train, Train) and train.lora.dora:
            yield "train.lora.dora", "cannot be exported as an adapter; use export.mode: merged"
    if recipe.export.merge_base in _NEAR_NF4 and isinstance(train, Train) and train.method != "qlora":
        yield (
            "export.merge_base",
            "train.method is not qlora, so training never saw an NF4 base; use original",
        )
    if recipe.export.merge_base in _NEAR_NF4 and train is None:
        yield "export.merge_base", "train is none, so there is nothing to merge; use original"
    if recipe.data and recipe.data.columns.messages:
        for name in ("prompt", "completion", "text"):
            if getattr(recipe.data.columns, name):
                yield f"data.columns.{name}", "messages holds whole conversations; name one or the other"


def _not_built(train: Train) -> Iterator[Finding]:
    """What the libraries know and forge refuses, each with its reason."""
    if train.lora.init == "loftq":
        yield (
            "train.lora.init",
            "loftq quantizes the base anew, and its adapter fits no other file of it; take pissa",
        )
    if train.lora.init == "eva":
        yield "train.lora.init", "eva needs a pass over the rows before training, not built; take pissa"
    if train.continue_from is not None and train.method == "full":
        yield "train.continue_from", "goes on from an adapter, and train.method: full trains none; use lora"


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
    if train.has_reference and train.lora.init.startswith(("pissa", "olora")):
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


_NEAR_NF4 = ("nf4", "measured")


def _without_gguf(recipe: Recipe) -> Iterator[Finding]:
    """What needs a GGUF, where the recipe makes none."""
    if recipe.export.makes_gguf:
        return
    if recipe.export.is_calibrated:
        yield "export.mode", "none makes no GGUF, so there is no type to choose or to round"
    if recipe.train is None:
        yield "export.mode", "none makes no GGUF, and train is none: nothing would be left of the ship"
    if recipe.verify.max_kl is not None or recipe.verify.min_top1 is not None:
        yield "verify", "has limits for a GGUF, and export is none"


def _calibration(recipe: Recipe) -> Iterator[Finding]:
    export = recipe.export
    for quant in export.types:
        if quant in NEED_IMATRIX and not export.imatrix:
            yield "export.quant", f"{quant} needs an importance matrix; set export.imatrix: true"
        if export.imatrix and quant in ("f16", "bf16", "f32"):
            yield "export.imatrix", f"{quant} is not rounded by importance; leave it out"
    if export.is_calibrated:
        asked = "export.imatrix" if export.imatrix else "export.quant"
        if recipe.data is None:
            yield asked, "is made from the rows of data, and there are none; name data.source"
        if export.mode != "merged":
            yield asked, "looks at one merged model; use export.mode: merged"
        if export.merge_base == "measured":
            yield "export.merge_base", f"{asked} needs to know the base before; name original or nf4"


def doubts(recipe: Recipe, root: Node) -> Iterator[Finding]:
    """What is allowed and seldom meant."""
    train = recipe.train
    if isinstance(train, Train):
        if train.learning_rate < _LOW_LEARNING_RATE and not train.compares:
            yield (
                "train.learning_rate",
                f"{train.learning_rate:g} is too low for LoRA, which often learns nothing below 5e-5; "
                "1e-4 to 3e-4 is usual",
            )
        if train.optimizer in _EIGHT_BIT and train.preset is None:
            yield "train.optimizer", "8-bit states save next to nothing with LoRA: few parameters are trained"
        if train.continue_from is not None and root.follow(("train", "lora"))[1] == 2:
            yield "train.lora", "is not used: train.continue_from has its own shape"
        if train.max_steps is not None and root.follow(("train", "epochs"))[1] == 2:
            yield "train.epochs", "is not used: train.max_steps decides"
    elif recipe.verify.learned == "required" and isinstance(train, Adopted) and not recipe.data:
        yield "train.from", "without data nothing can show that the adapter does better than the base"
    if recipe.export.merge_base == "measured" and not (recipe.data and recipe.data.eval):
        yield (
            "export.merge_base",
            "without held-out rows (data.eval) the measure favours the base of training",
        )
    if recipe.base.trust_remote_code:
        yield (
            "base.trust_remote_code",
            "runs the base's own Python code where transformers lacks its family",
        )
    if recipe.smoke and (recipe.deploy.runtime == "none" or not recipe.export.makes_gguf):
        why = "deploy.runtime is none" if recipe.export.makes_gguf else "export is none"
        yield "smoke", f"is not asked: {why}"
