"""What is refused before anything runs: a recipe, base or adapter that cannot become what is asked for.

Not covered: tools that are missing (`preflight`), the disk (`space`) and the rows (the stage *data*).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forge import report
from forge.adapter.places import other_base, place
from forge.adapter.read import Adapter, read_adapter
from forge.adapter.vocabulary import check_tokenizer, fit
from forge.chat.beginning import refuse_unwritten
from forge.chat.stops import GENERATION, require
from forge.errors import DataError, RecipeError
from forge.export.adapter_only import refuse_impure, why_merged
from forge.model.architectures import check_exportable, check_trainable, check_writes_text
from forge.model.checkpoint import refuse_packed
from forge.model.config import check_numbers, check_unquantized, read_json
from forge.resolve.shape import check_linear, check_shape, located

if TYPE_CHECKING:
    from forge.resolve.resolved import Resolved


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
    check_shape(ship)
    check_linear(ship)
    _check_lengths(ship)
    _check_generation(ship)
    _check_tokens(ship)
    if ship.beginning != (None, ()):
        refuse_unwritten(ship.template, *ship.beginning)
    if ship.continued:
        _check_continued(ship, ship.continued)
    if ship.fitted:
        place(ship.fitted)
        _warn_of_other_base(ship, ship.fitted.adapter)
        check_tokenizer(ship.fitted, ship.tokenizer.directory)
        if ship.recipe.export.mode == "adapter":
            refuse_impure(why_merged(ship.fitted))


def _check_continued(ship: Resolved, directory: Path) -> None:
    """The adapter that training goes on from is one of this base, and of what the base is held in."""
    adapter = read_adapter(directory)
    place(fit(adapter, ship.checkpoint))
    _warn_of_other_base(ship, adapter)
    if adapter.configuration.get("use_dora") and ship.training and ship.training.method == "int8":
        raise RecipeError(
            "train.continue_from: the adapter is DoRA, which reads lengths of rows that 8-bit weights hide",
            hint="use train.method: qlora or lora",
            problems=[located(ship.loaded, "train.continue_from", "cannot be trained further in 8 bits")],
        )


def _warn_of_other_base(ship: Resolved, adapter: Adapter) -> None:
    """Base against Instruct, or another revision: the shapes fit, so nothing else would show it."""
    spec = ship.base.spec
    if another := other_base(adapter, spec, read_json(ship.base_directory / "config.json")):
        report.warning(another)
    trained, here = adapter.configuration.get("revision"), ship.base.revision
    if here and trained and len(str(trained)) == len(here) and trained != here:
        report.warning(f"the adapter was trained on revision {trained} of {spec}, the base here is {here}")


def _check_lengths(ship: Resolved) -> None:
    """Neither trained nor served beyond the base's positions (pitfall 4)."""
    most, deploy, train = ship.configuration.max_positions, ship.recipe.deploy, ship.training
    asked = {
        "train.max_length": train.max_length if train else None,
        "deploy.context_tokens": deploy.context_tokens if deploy.runtime != "none" else None,
    }
    problems = [
        located(ship.loaded, field, f"{tokens} tokens is more than the base's {most} positions")
        for field, tokens in asked.items()
        if most and tokens and tokens > most
    ]
    if problems:
        raise RecipeError(
            f"{ship.base.spec} was made for {most} tokens at a time",
            hint=f"ask for at most {most}",
            problems=problems,
        )


def _check_tokens(ship: Resolved) -> None:
    """Tokens are added where their rows can be trained, and a PAD is one of the tokenizer's."""
    if not ship.recipe.base.tokens.add or ship.training is None or ship.training.method == "full":
        return
    if not ship.token_modules:
        raise DataError(
            f"base.tokens.add: {ship.base.spec} has no embedding that forge knows",
            hint="take a chat template of tokens that the base has, such as alpaca",
        )
    if (tied := ship.tied_embedding) not in (None, "embed_tokens"):
        raise RecipeError(
            f"base.tokens.add: {ship.base.spec} ties its output layer to the embedding {tied}, and peft "
            "would train the two apart",
            hint="take a chat template of tokens that the base has, such as base.chat_template: alpaca",
            problems=[located(ship.loaded, "base.tokens.add", "cannot be trained on this base")],
        )


def _check_generation(ship: Resolved) -> None:
    """A merged checkpoint is served by what reads its generation_config.json; the GGUF by its own ids."""
    path = ship.base_directory / GENERATION
    broken = ship.stops.in_generation_config(read_json(path)) if path.is_file() else []
    if ship.recipe.export.keep_merged:
        require(broken)
    for problem in broken:
        report.warning(f"{problem}: transformers would not stop there, the GGUF does")
