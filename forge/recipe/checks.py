"""What a recipe's sections must agree on, what looks wrong, and whether the files it names exist.

Not covered: what those files hold; that is found when they are read, before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from forge.recipe.explain import nearest
from forge.recipe.quants import NEED_IMATRIX
from forge.recipe.schema import Adopted, Recipe, Train
from forge.recipe.training_checks import Finding, contradictions_of, unused
from forge.recipe.tree import Node
from forge.recipe.words import BUILTIN_BASES, BUILTIN_DATA, DATA_SUFFIXES

_LOW_LEARNING_RATE, _HIGH_LEARNING_RATE = 5e-5, 1e-2
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
    elif _is(path, Path.is_symlink) and not _is(path, Path.exists):
        yield field, f"{named} is a link to nothing: {path.readlink()}"
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
    if recipe.base.revision and recipe.base.id.startswith("builtin:"):
        yield "base.revision", f"{recipe.base.id} has none, only a model of the hub does; leave it out"
    if isinstance(train, Train):
        yield from contradictions_of(recipe, train)
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
        if isinstance(train, Train) and train.lora.experts:
            yield "train.lora.experts", "cannot be exported as an adapter; use export.mode: merged"
        if isinstance(train, Train) and train.lora.token_indices:
            yield "train.lora.token_indices", "cannot be exported as an adapter; use export.mode: merged"
        if isinstance(train, Train) and train.method == "full":
            yield "train.method", "full leaves no adapter to export; use export.mode: merged"
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
        if train.learning_rate > _HIGH_LEARNING_RATE:
            yield (
                "train.learning_rate",
                f"{train.learning_rate:g} is high: training may diverge; 1e-4 to 3e-4 is usual",
            )
        if train.optimizer in _EIGHT_BIT and train.preset is None:
            yield "train.optimizer", "8-bit states save next to nothing with LoRA: few parameters are trained"
        for name, (is_unused, why) in unused(train).items():
            if is_unused and root.follow(("train", name))[1] == 2:
                yield f"train.{name}", f"is not used: {why}"
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
    if not recipe.export.makes_gguf and recipe.deploy.runtime != "none" and root.child("deploy") is not None:
        yield "deploy", "is not used: export is none"
    if recipe.smoke and (recipe.deploy.runtime == "none" or not recipe.export.makes_gguf):
        why = "deploy.runtime is none" if recipe.export.makes_gguf else "export is none"
        yield "smoke", f"is not asked: {why}"
