"""What is refused before anything runs: a recipe, base or adapter that cannot become what is asked for.

Not covered: tools that are missing (`preflight`), the disk (`space`) and the rows (the stage *data*).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forge import report
from forge.adapter.places import other_base, place
from forge.adapter.read import EMBEDDINGS, Adapter
from forge.adapter.vocabulary import check_tokenizer
from forge.chat.beginning import refuse_unwritten
from forge.chat.stops import GENERATION, require
from forge.errors import DataError, Problem, RecipeError
from forge.export.adapter_only import refuse_impure, why_merged
from forge.model.architectures import check_exportable, check_trainable, check_writes_text
from forge.model.checkpoint import refuse_packed
from forge.model.config import check_numbers, check_unquantized, read_json
from forge.model.estimate import linear_tensors
from forge.recipe.load import Loaded
from forge.resolve.experts import WHY, adapted_experts

if TYPE_CHECKING:
    from forge.resolve.resolved import Resolved


def _located(loaded: Loaded, field: str, message: str) -> Problem:
    place, _, line = loaded.sources[field].where.rpartition(":")
    where = (place, int(line)) if line.isdigit() else (loaded.sources[field].where, 0)
    return Problem(message, field, *where)


def check_base(ship: Resolved) -> None:
    """Raise `DataError` for a base that cannot become what the recipe asks for."""
    directory = ship.base_directory
    check_unquantized(ship.configuration, str(directory))
    check_numbers(ship.configuration, str(directory / "config.json"))
    if ship.recipe.export.makes_gguf:
        check_exportable(ship.configuration)
    else:
        check_writes_text(ship.configuration)
    check_trainable(ship.configuration, trust_remote_code=ship.recipe.base.trust_remote_code)
    if not ship.tensors:
        raise DataError(f"{directory} holds no tensors")
    refuse_packed(ship.checkpoint)
    _check_targets(ship)
    _check_linear(ship)
    _check_generation(ship)
    _check_tokens(ship)
    if ship.beginning != (None, ()):
        refuse_unwritten(ship.template, *ship.beginning)
    if ship.fitted:
        place(ship.fitted)
        _warn_of_other_base(ship, ship.fitted.adapter)
        check_tokenizer(ship.fitted, ship.tokenizer.directory)
        if ship.recipe.export.mode == "adapter":
            refuse_impure(why_merged(ship.fitted))


def _warn_of_other_base(ship: Resolved, adapter: Adapter) -> None:
    """Base against Instruct, or another revision: the shapes fit, so nothing else would show it."""
    spec = ship.base.spec
    if another := other_base(adapter, spec, read_json(ship.base_directory / "config.json")):
        report.warning(another)
    trained, here = adapter.configuration.get("revision"), ship.base.revision
    if here and trained and len(str(trained)) == len(here) and trained != here:
        report.warning(f"the adapter was trained on revision {trained} of {spec}, the base here is {here}")


def _check_targets(ship: Resolved) -> None:
    """Names that fit no module, reported before training; matched as peft does, whole or behind a dot.

    Left to peft where transformers joins the experts' tensors under names that no file has; those of
    experts and routers are refused.
    """
    if ship.training is None or ship.training.method == "full":
        return
    named = ship.training.lora.targets
    if ship.holds_experts:
        _refuse_experts(ship, adapted_experts(named, ship.tensors))
        return
    if isinstance(named, str):
        return
    modules = {f".{name.removesuffix('.weight')}" for name in ship.tensors if name.endswith(".weight")}
    absent = [target for target in named if not any(module.endswith(f".{target}") for module in modules)]
    if absent:
        linear = sorted({name.split(".")[-2] for name in linear_tensors(ship.tensors) if "." in name})
        raise RecipeError(
            f"train.lora.targets: {ship.base.spec} has no module {', '.join(absent)}",
            hint=f"its linear layers are {', '.join(linear)}",
            problems=[
                _located(ship.loaded, "train.lora.targets", f"the base has no module {target}")
                for target in absent
            ],
        )


def _refuse_experts(ship: Resolved, inner: Sequence[str]) -> None:
    field = "train.lora.targets"
    if inner:
        raise RecipeError(
            f"{field}: experts and routers cannot be adapted: {WHY}",
            hint=f"set {field}: attention, which auto means here",
            problems=[
                _located(ship.loaded, field, f"{target} takes in experts or the router") for target in inner
            ],
        )


def _check_tokens(ship: Resolved) -> None:
    """Tokens are added where their rows can be trained, and a PAD is one of the tokenizer's."""
    if not ship.recipe.base.tokens.add or ship.training is None or ship.training.method == "full":
        return
    modules = ship.token_modules
    if not modules:
        raise DataError(
            f"base.tokens.add: {ship.base.spec} has no embedding that forge knows",
            hint="take a chat template of tokens that the base has, such as alpaca",
        )
    if len(modules) == 1 and modules[0] != "embed_tokens":
        raise RecipeError(
            f"base.tokens.add: {ship.base.spec} ties its output layer to the embedding {modules[0]}, and "
            "peft would train the two apart",
            hint="take a chat template of tokens that the base has, such as base.chat_template: alpaca",
            problems=[_located(ship.loaded, "base.tokens.add", "cannot be trained on this base")],
        )


def _check_linear(ship: Resolved) -> None:
    """DoRA is merged, and an adapter has a GGUF of its own, on linear layers only.

    Of DoRA a row is an output, whose length was learned. Named targets are looked at; `auto` takes linear
    layers and nothing else, except of Conv1D.
    """
    lora = ship.training.lora if ship.training else None
    if lora is None or not (lora.dora or ship.recipe.export.mode == "adapter"):
        return
    field = "train.lora.dora" if lora.dora else "export.mode"
    problems = []
    if ship.configuration.model_type == "gpt2":
        problems.append("the layers of GPT-2 are Conv1D, not linear")
    named = () if isinstance(lora.targets, str) else lora.targets
    problems += [
        f"{target} is an embedding, not a linear layer"
        for target in named
        if target.rpartition(".")[2] in EMBEDDINGS
    ]
    if problems:
        raise RecipeError(
            f"{field}: {'DoRA' if lora.dora else 'an adapter of its own'} is only for linear layers",
            hint=f"leave {field} out, or take other train.lora.targets or another base",
            problems=[_located(ship.loaded, field, problem) for problem in problems],
        )


def _check_generation(ship: Resolved) -> None:
    """A merged checkpoint is served by what reads its generation_config.json; the GGUF by its own ids."""
    path = ship.base_directory / GENERATION
    broken = ship.stops.in_generation_config(read_json(path)) if path.is_file() else []
    if ship.recipe.export.keep_merged:
        require(broken)
    for problem in broken:
        report.warning(f"{problem}: transformers would not stop there, the GGUF does")
