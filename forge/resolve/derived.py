"""What follows from a resolved recipe: the name of its file, its type, the context to serve it with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forge.codec import Json
from forge.data.account import Prepared
from forge.recipe.quants import BUDGETED
from forge.recipe.schema import Train
from forge.resolve.resolved import Resolved
from forge.runs.files import run_gguf


def gguf_name(ship: Resolved, quant: str) -> str:
    """What the GGUF is called in the run."""
    return run_gguf(ship.recipe.name, quant)


def name_inside(ship: Resolved) -> str:
    """What the model is called in its GGUF: by its base, since equal files are made once for all recipes."""
    base = Path(ship.base.spec.partition("@")[0].rpartition(":")[2]).name
    return f"{base or ship.base_directory.name}{'-tuned' if ship.recipe.train is not None else ''}"


def prompt_params(ship: Resolved) -> dict[str, Json]:
    """What a rendered prompt and its ids depend on."""
    training = ship.training
    return {
        "base.tokenizer": ship.tokenizer_digest,
        "train.template_variables": dict(training.template_variables) if training else {},
    }


def of_each_type(ship: Resolved) -> tuple[Resolved, ...]:
    """The ship as the stages of each type see it, the served one first."""
    return (ship, *(replace(ship, further_type=quant) for quant in ship.recipe.export.types[1:]))


def quant_named(ship: Resolved) -> str | None:
    """The type that the recipe names, the first of several; None where a budget chooses."""
    return ship.further_type or next(iter(ship.recipe.export.types), None)


def sampling_params(ship: Resolved) -> dict[str, Json]:
    """How servers are to draw tokens, in the requests of what carries it; nothing where nothing is asked."""
    asked = dict(ship.recipe.model.sampling.asked())
    return {"model.sampling": asked} if asked else {}


def quant_asked(ship: Resolved) -> str:
    """The type in a stage's request; one that a budget chose is known by *calibrate*'s digest."""
    return quant_named(ship) or "within a budget"


def keeps_merged(ship: Resolved) -> bool:
    """Whether the merged checkpoint stays: once, whatever the number of types."""
    return ship.recipe.export.keep_merged and ship.further_type is None


def merge_base(ship: Resolved) -> str:
    """original, nf4 or measured: by itself QLoRA's is measured, where rows are held out to measure on.

    With an importance matrix the base must be known before, so there it is the original one.
    """
    recipe = ship.recipe
    if recipe.export.merge_base != "auto":
        return recipe.export.merge_base
    if not recipe.export.makes_gguf:
        return "original"
    trained_in_4bit = isinstance(recipe.train, Train) and recipe.train.method == "qlora"
    can_measure = recipe.data is not None and recipe.data.eval and not recipe.export.is_calibrated
    return "measured" if trained_in_4bit and can_measure else "original"


def largest_type(ship: Resolved) -> str:
    """The type, or the largest that a budget may choose: what there must be room for."""
    return quant_named(ship) or BUDGETED[0]


def context_tokens(ship: Resolved, data: Prepared | None) -> int:
    """The context to serve with: what was asked, else min(model's, max(4096, training + reply))."""
    asked = ship.recipe.deploy.context_tokens
    most = ship.configuration.max_positions or 4096
    wanted = max(4096, (data.max_length if data else 0) + longest_reply(ship))
    return asked or min(most, wanted)


def longest_reply(ship: Resolved) -> int:
    """The tokens to leave for a reply: what the smoke queries ask for, 256 at least."""
    return max([256, *(query.max_tokens for query in ship.recipe.smoke)])
