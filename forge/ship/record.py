"""What a ship leaves where a person looks: `runs/<name>/`. Written whatever way the ship ended."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from forge.errors import ForgeError
from forge.pipeline.stage import Action, Result, Step
from forge.resolve.resolved import Resolved
from forge.runs.files import MANIFEST, REPORT
from forge.runs.manifest import read_manifest
from forge.ship.page import write_page
from forge.store import durable
from forge.store.artifacts import Artifact

NOT_VERIFIED = "the ship did not get as far as verify"


def findings(stages: Sequence[Step], results: Mapping[str, Result]) -> dict[str, Any]:
    """What the ship's JSON and the manifest both hold: each stage's findings, in their order."""
    found: dict[str, Any] = {"certificate": None, "certificate_reason": NOT_VERIFIED, "learned": None}
    for stage in stages:
        if stage.name in results:
            found |= stage.findings(results)
    found["stages"] = [
        {"name": result.name, "cached": result.cached, "seconds": round(result.seconds, 2)}
        for result in results.values()
    ]
    return found


def summary(ship: Resolved, stages: Sequence[Step], results: Mapping[str, Result]) -> dict[str, Any]:
    """The JSON result of `forge ship`; whoever leaves a server running puts its address in."""
    fields: dict[str, Any] = {
        "run": str(ship.run_directory), "adapter": None, "gguf": None, "modelfile": None,
        "modelfile_reason": None, **findings(stages, results), "endpoint": None, "smoke": [],
    }  # fmt: skip
    for stage in stages:
        if stage.name in results:
            fields |= stage.summary(results[stage.name], ship.run_directory)
    return fields


def record(
    ship: Resolved,
    stages: Sequence[Step],
    results: Mapping[str, Result],
    failure: BaseException | None = None,
) -> None:
    """Publish the artifacts that there are into the run's directory, then manifest and report."""
    directory = ship.run_directory
    directory.mkdir(parents=True, exist_ok=True)
    before = read_manifest(directory).get("artifacts", {})
    for stage in stages:
        artifact = results[stage.name].artifact if stage.name in results else None
        if artifact and not isinstance(stage, Action):
            stage.publish(artifact, directory, before.get(stage.name, {}).get("digest"))
    manifest = _manifest(ship, stages, results, failure)
    durable.write_text(directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    write_page(directory / REPORT, manifest, stages, results)


def _manifest(
    ship: Resolved, stages: Sequence[Step], results: Mapping[str, Result], failure: BaseException | None
) -> dict[str, Any]:
    listed = [stage.name for stage in stages if stage.lists_facts and stage.name in results]
    return {
        "format": 1,
        "name": ship.recipe.name,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "forge": version("forge-ship"),
        "outcome": _outcome(failure),
        "recipe": ship.recipe.as_json(),
        "recipe_file": str(ship.loaded.path),
        "pins": ship.pins(),
        "base": {
            "spec": ship.base.spec,
            "revision": ship.base.revision,
            "licence": ship.base.licence,
            "digest": ship.base_digest,
        },
        "data": {"digest": ship.file_digest(ship.data_files)} if ship.data_files else None,
        "prompt": {
            "end_of_turn": ship.prompt_format.end_of_turn,
            "variables": dict(ship.template.variables),
            "variables_read": list(ship.template.variables_read()),
        },
        # Not `platform.platform`: that starts a program.
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "artifacts": {result.name: _made(result.artifact) for result in results.values() if result.artifact},
        "facts": {name: dict(results[name].facts) for name in listed},
        **findings(stages, results),
    }


def _made(artifact: Artifact) -> dict[str, Any]:
    return {
        "key": artifact.key,
        "digest": artifact.digest,
        "recorded": dict(artifact.recorded),
        "tools": artifact.request.get("tools"),
        "files": {
            name: {"sha256": output.sha256, "bytes": output.bytes}
            for name, output in artifact.outputs.items()
        },
    }


def _outcome(failure: BaseException | None) -> str:
    if failure is None:
        return "shipped"
    return failure.message if isinstance(failure, ForgeError) else type(failure).__name__
