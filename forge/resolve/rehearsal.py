"""Can this recipe's model be exported? Asked before anything is trained; values only if they are finite.

What passed is remembered in the store under what was looked at, so a second ship of the base asks nothing.
"""

from __future__ import annotations

from pathlib import Path

from forge import report, worker
from forge.codec import Json, from_plain, to_plain
from forge.export.rehearsal import Header, RehearsalRequest, Rehearsed, rehearse_export
from forge.export.request import Ingredients
from forge.resolve.derived import name_inside, quant_named
from forge.resolve.resolved import Resolved
from forge.resolve.stage import installed
from forge.store.digest import digest
from forge.tools.llama_cpp import LLAMA_CPP_COMMIT, find_converters

_NAME = "rehearse"
_VERSION = 5


def rehearse(ship: Resolved, *, log: Path | None = None) -> Rehearsed:
    """Export all but the weights, which are only read; raises what `rehearse_export` raises."""
    request = _request(ship)
    key = digest(request)
    passed = ship.store.find(_NAME, key)
    if passed:
        return from_plain(Rehearsed, passed.facts)
    report.info("header: laying the model out without weights")
    question = _question(ship)
    if ship.store.read_only:
        return worker.perform(rehearse_export, question, log=log)
    artifact = ship.store.build(
        _NAME, key, request, lambda out: to_plain(worker.perform(rehearse_export, question, log=log))
    )
    return from_plain(Rehearsed, artifact.facts)


def _quant(ship: Resolved) -> str | None:
    """The type that is asked for, where it can be tried without an importance matrix."""
    return None if ship.recipe.export.is_calibrated else quant_named(ship)


def _request(ship: Resolved) -> dict[str, Json]:
    """All that the outcome hangs on; a base whose weights a plan does not read is never remembered."""
    return {
        "version": _VERSION,
        "base": ship.base_digest,
        "tokenizer": ship.tokenizer_digest,
        "chat template": ship.template_digest,
        "adapter": ship.adapter_digest if ship.fitted else None,
        "quant": _quant(ship),
        "gguf": ship.recipe.export.makes_gguf,
        "rows": ship.rows_to_add_to,
        "code of its own": ship.runs_own_code,
        "llama.cpp": LLAMA_CPP_COMMIT,
        "packages": {name: installed(name) for name in ("transformers", "llama-cpp-python")},
    }


def _question(ship: Resolved) -> RehearsalRequest:
    headers, makes_gguf = None, ship.recipe.export.makes_gguf
    if ship.headers is not None:
        headers = tuple(Header(name, spec.dtype, tuple(spec.shape)) for name, spec in ship.headers.items())
    model = Ingredients(
        ship.base_directory,
        ship.adopted.directory if ship.adopted else None,
        ship.tokenizer.directory,
        ship.template.pinned_source(),
        find_converters(ship.store.root) if makes_gguf else ship.store.root,
        ship.prompt_format.end_of_turn_id,
    )
    return RehearsalRequest(
        model, name_inside(ship), _quant(ship), headers, ship.runs_own_code, makes_gguf, ship.rows_to_add_to
    )
