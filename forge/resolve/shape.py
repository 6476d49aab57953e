"""What `train.lora` names, held against the base's own tensors: refused by a plan, before anything runs.

peft has the last word in training: it sees the modules, this the names in the file, which transformers
changes for some families. So regular expressions are tried on the usual other spellings too, and not at all
where the base has other towers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from forge.adapter.experts import can_be_merged
from forge.adapter.read import EMBEDDINGS
from forge.adapter.vocabulary import is_of_tokens
from forge.errors import Problem, RecipeError
from forge.model.config import CONV1D_FAMILIES
from forge.model.estimate import linear_tensors, target_tensors
from forge.recipe.load import Loaded
from forge.recipe.training import Train
from forge.resolve.experts import WHY, adapted_experts

if TYPE_CHECKING:
    from forge.resolve.resolved import Resolved

_TOWER = re.compile(r"(^|\.)(vision|visual|audio)")
_HEAD = "lm_head"
_OF_LAYERS = ("targets", "_pattern", "modules_to_save")


def located(loaded: Loaded, field: str, message: str) -> Problem:
    place, _, line = loaded.sources[field].where.rpartition(":")
    where = (place, int(line)) if line.isdigit() else (loaded.sources[field].where, 0)
    return Problem(message, field, *where)


def check_shape(ship: Resolved) -> None:
    """Raise `RecipeError` with all of the adapter's shape that this base has no place for."""
    train = ship.training
    if train is None or train.continue_from is not None:
        return
    if train.method == "full":
        findings = list(_full(ship))
    else:
        if ship.holds_experts:
            _refuse_experts(ship, adapted_experts(train.lora.targets, ship.tensors))
        findings = [
            *_layers(ship, train),
            *_targets(ship, train),
            *_experts(ship, train),
            *_beside(ship, train),
        ]
    if findings:
        linear = sorted({name.split(".")[-2] for name in linear_tensors(ship.tensors) if "." in name})
        field, message = findings[0]
        others = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise RecipeError(
            f"{field}: {message}{others}",
            hint=(
                f"its linear layers are {', '.join(linear)}"
                if field.endswith(_OF_LAYERS)
                else f"leave {field} out for its default, or take another base"
            ),
            problems=[located(ship.loaded, *finding) for finding in findings],
        )


def _refuse_experts(ship: Resolved, inner: Sequence[str]) -> None:
    field = "train.lora.targets"
    if inner:
        raise RecipeError(
            f"{field}: experts and routers are not named here: {WHY}",
            hint=f"set {field}: attention, which auto means here",
            problems=[
                located(ship.loaded, field, f"{target} takes in experts or the router") for target in inner
            ],
        )


def _full(ship: Resolved) -> Iterator[tuple[str, str]]:
    if ship.tied_embedding not in (None, "embed_tokens"):
        yield (
            "train.method",
            f"full: {ship.base.spec} ties its output layer to the embedding {ship.tied_embedding}, and peft "
            "would train the two apart; use lora",
        )


def _layers(ship: Resolved, train: Train) -> Iterator[tuple[str, str]]:
    count = ship.configuration.layers or 0
    absent = sorted(number for number in set(train.lora.layers) if count and number >= count)
    if absent:
        numbers = ", ".join(map(str, absent))
        yield "train.lora.layers", f"{ship.base.spec} has no layer {numbers}; its layers are 0 to {count - 1}"


def _targets(ship: Resolved, train: Train) -> Iterator[tuple[str, str]]:
    """Names are matched as peft does, whole or behind a dot.

    Left to peft where transformers joins the experts' tensors under names that no file has.
    """
    lora, field, spec = train.lora, "train.lora.targets", ship.base.spec
    if ship.holds_experts:
        return
    tensors = {name.removesuffix(".weight"): ship.tensors[name] for name in _weights(ship)}
    if not isinstance(lora.targets, str):
        for target in lora.targets:
            shapes = [len(spec.shape) for name, spec in tensors.items() if f".{name}".endswith(f".{target}")]
            if not shapes:
                yield field, f"{spec} has no module {target}"
            elif max(shapes) < 2:
                yield field, f"{target} is no linear layer"
    if any(map(_TOWER.search, tensors)):
        return
    if isinstance(lora.targets, str) and lora.targets not in ("auto", "all-linear", "attention"):
        adapted = [name for name in tensors if any(re.fullmatch(lora.targets, way) for way in _ways(name))]
        if not adapted:
            yield field, f"{lora.targets} fits no module of {spec}"
    else:
        adapted = [name.removesuffix(".weight") for name in target_tensors(ship.tensors, lora.targets)]
        named = () if isinstance(lora.targets, str) else lora.targets
        adapted += [name for name in tensors if name.endswith(named) and name.endswith(EMBEDDINGS)]
    for kind, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            whole = rf"(.*\.)?({pattern})$"
            if adapted and not any(re.match(whole, way) for name in adapted for way in _ways(name)):
                yield f"train.lora.{kind}", f"{pattern} fits no module that is adapted"
    if lora.moves_base:
        ranks = [lora.r, *lora.rank_pattern.values()]
        sizes = [min(tensors[name].shape) for name in adapted if len(tensors[name].shape) == 2]
        if sizes and max(ranks) > min(sizes):
            yield (
                "train.lora.init",
                f"{lora.init} takes rank {max(ranks)} out of a matrix that has {min(sizes)}; use default",
            )


def _experts(ship: Resolved, train: Train) -> Iterator[tuple[str, str]]:
    family, field = ship.configuration.model_type, "train.lora.experts"
    if train.lora.experts and not ship.holds_experts:
        yield field, f"{ship.base.spec} is no mixture of experts"
    elif train.lora.experts and not can_be_merged(ship.tensors, family):
        yield (
            field,
            f"forge does not know how {family} stores its experts, and could not merge them",
        )


def _beside(ship: Resolved, train: Train) -> Iterator[tuple[str, str]]:
    """What is trained beside the factors: whole modules, and rows of the embedding."""
    lora, spec, tied = train.lora, ship.base.spec, ship.tied_embedding
    parts = [name.split(".") for name in ship.tensors]
    modules = {".".join(name[:end]) for name in parts for end in range(1, len(name))} | {_HEAD}
    linear = [name.removesuffix(".weight") for name in linear_tensors(ship.tensors)]
    for named in lora.modules_to_save:
        if not any(module.endswith(named) for module in modules):
            yield "train.lora.modules_to_save", f"{spec} has no module {named}"
        elif train.method in ("qlora", "int8") and any(
            name.endswith(named) or f"{named}." in name for name in linear
        ):
            yield (
                "train.lora.modules_to_save",
                f"train.method: {train.method} quantizes {named}, which is not trained whole then; use lora",
            )
    if lora.token_indices:
        rows = max(
            (tensor.shape[0] for name, tensor in ship.tensors.items() if is_of_tokens(name)), default=0
        )
        if absent := [index for index in lora.token_indices if rows and index >= rows]:
            numbers = ", ".join(map(str, absent))
            yield "train.lora.token_indices", f"the embedding has no row {numbers}, but {rows}"
        if tied:
            yield (
                "train.lora.token_indices",
                f"{spec} ties its output layer to the embedding; name {tied} in train.lora.modules_to_save",
            )


def check_linear(ship: Resolved) -> None:
    """DoRA is merged, OLoRA begins, and an adapter has a GGUF of its own, on linear layers only.

    Of DoRA a row is an output, whose length was learned. Named targets are looked at; `auto` takes linear
    layers and nothing else, except of Conv1D.
    """
    lora = ship.training.lora if ship.training else None
    if lora is None:
        return
    asked = {
        "train.lora.dora": ("DoRA", lora.dora),
        "train.lora.init": ("OLoRA", lora.init == "olora"),
        "export.mode": ("an adapter of its own", ship.recipe.export.mode == "adapter"),
    }
    field, what = next(((field, what) for field, (what, is_asked) in asked.items() if is_asked), ("", ""))
    if not field:
        return
    problems = []
    if ship.configuration.model_type in CONV1D_FAMILIES:
        problems.append(f"the layers of {ship.configuration.model_type} are Conv1D, not linear")
    named = () if isinstance(lora.targets, str) else lora.targets
    problems += [
        f"{target} is an embedding, not a linear layer"
        for target in named
        if target.rpartition(".")[2] in EMBEDDINGS
    ]
    if problems:
        raise RecipeError(
            f"{field}: {what} is only for linear layers",
            hint=f"leave {field} out, or take other train.lora.targets or another base",
            problems=[located(ship.loaded, field, problem) for problem in problems],
        )


def _weights(ship: Resolved) -> list[str]:
    return [name for name in ship.tensors if name.endswith(".weight")]


def _ways(name: str) -> Iterator[str]:
    """How transformers may call a module that the file calls `name`."""
    yield from (name, f"model.{name}", f"transformer.{name}", name.partition(".")[2])
