"""What a ship and `forge import` do with Ollama beyond serving: the proof against training, a run's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from forge import report, worker
from forge.chat.hand_over import hand_over_of
from forge.errors import CheckError, MissingToolError, RecipeError, StageError
from forge.recipe.schema import Recipe
from forge.resolve.queries import ask_anything, smoke_passes
from forge.runs.files import adapter_beside
from forge.runs.manifest import read_manifest, read_run_modelfile
from forge.verify.vocabulary import CountRequest, count


def import_into_ollama(
    target: str, name: str, host: str | None, adapter: Path | None
) -> Mapping[str, object]:
    """`forge import`: a run or a GGUF file becomes the model `name`; returns the contract's fields."""
    from forge.runs.find import find_model
    from forge.serve.ollama import import_model, named
    from forge.tools.ollama import server_url
    from forge.tools.ollama_server import reach

    gguf, own = find_model(target)
    if own and adapter:
        raise RecipeError(
            f"--adapter: {target} has one of its own, and Ollama takes one",
            hint=f"name the base to put another on it: forge import {gguf}",
        )
    handed = hand_over_of(gguf)
    # The base of a run, without the adapter that was trained on it, is no model of that run's.
    is_bare = own is None and adapter_beside(gguf).is_file()
    written = None if is_bare else read_run_modelfile(gguf.parent)
    # One of another model that lies there by chance says nothing of this one.
    if written and Path(written.base).name == gguf.name:
        handed = handed.with_parameters_of(written)
    recipe = None if is_bare else _recipe_of(gguf)
    with reach(server_url(host)) as server:
        done = import_model(
            server,
            name,
            gguf,
            handed,
            adapter=adapter or own,
            count=partial(_count, gguf),
            ask=partial(smoke_passes, recipe) if recipe else ask_anything,
        )
    report.success(
        f"{done.name}: {done.prompts} prompts compared, the tokens of {done.counted} counted, "
        f"written by {named(done.way)}"
    )
    for what in done.differ:
        report.info(f"not the same {what}: hardly anybody writes such a text")
    if done.left_out:
        report.info(f"not compared: {'; '.join(done.left_out)}")
    report.info(f"talk to it: ollama run {done.name}")
    return {
        "name": done.name,
        "digest": done.digest,
        "prompt_checked": done.prompts,
        "tokens_checked": done.counted,
        "way": done.way,
        "differ": list(done.differ),
        "not_compared": list(done.left_out),
    }


def _count(gguf: Path, texts: Sequence[str]) -> Sequence[int]:
    """By the file's own vocabulary; nothing, and said so, where llama-cpp-python is not here or cannot."""
    try:
        return worker.perform(count, CountRequest(gguf, tuple(texts))).counts
    except (MissingToolError, StageError, CheckError) as unknown:
        report.warning(f"token counts are not compared, so a second BOS would not show: {unknown.message}")
        return []


def _recipe_of(gguf: Path) -> Recipe | None:
    """The recipe of the run in whose directory the file lies."""
    return read_manifest(gguf.parent).read_recipe()
