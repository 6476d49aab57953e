"""What a ship leaves where a person looks: `runs/<name>/`. Written whatever way the ship ended."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from forge.errors import ForgeError
from forge.files import write_text
from forge.pipeline.stage import Action, Result, Step
from forge.resolve.resolved import Resolved
from forge.runs.files import MANIFEST, REPORT
from forge.runs.manifest import (
    ArtifactRecord,
    BaseMade,
    DataMade,
    FileMade,
    Manifest,
    Prompt,
    StageRun,
    read_manifest,
)
from forge.ship.page import write_page
from forge.store.artifacts import Artifact

_NOT_VERIFIED = "the ship did not get as far as verify"


def summary(
    ship: Resolved, stages: Sequence[Step], results: Mapping[str, Result], manifest: Manifest
) -> Mapping[str, object]:
    """The JSON result of `forge ship`; whoever leaves a server running puts its address in."""
    recorded = manifest.as_json()
    shown = ("certificate", "certificate_reason", "learned", *manifest.others, "stages")
    fields: dict[str, object] = {
        "run": str(ship.run_directory), "adapter": None, "gguf": None, "modelfile": None,
        "modelfile_reason": None, **{name: recorded[name] for name in shown}, "endpoint": None, "smoke": [],
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
) -> Manifest:
    """Publish the artifacts that there are into the run's directory, then manifest and report."""
    directory = ship.run_directory
    directory.mkdir(parents=True, exist_ok=True)
    before = read_manifest(directory).artifacts
    for stage in stages:
        artifact = results[stage.name].artifact if stage.name in results else None
        if artifact and not isinstance(stage, Action):
            published = before.get(stage.name)
            stage.publish(artifact, directory, published.digest if published else None)
    manifest = _manifest(ship, stages, results, failure)
    plain = manifest.as_json()
    write_text(directory / MANIFEST, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    write_page(directory / REPORT, plain, stages, results)
    return manifest


def _manifest(
    ship: Resolved, stages: Sequence[Step], results: Mapping[str, Result], failure: BaseException | None
) -> Manifest:
    listed = [stage.name for stage in stages if stage.lists_facts and stage.name in results]
    manifest = Manifest(
        name=ship.recipe.name,
        written=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        forge=version("forge-ship"),
        outcome=_outcome(failure),
        recipe=ship.recipe.as_json(),
        recipe_file=str(ship.loaded.path),
        pins=ship.pins(),
        base=BaseMade(ship.base.spec, ship.base.revision, ship.base.licence, ship.base_digest),
        data=DataMade(ship.file_digest(ship.data_files)) if ship.data_files else None,
        prompt=Prompt(
            ship.prompt_format.end_of_turn,
            variables=dict(ship.template.variables),
            variables_read=ship.template.variables_read(),
        ),
        # Not `platform.platform`: that starts a program.
        machine={
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        artifacts={result.name: _made(result.artifact) for result in results.values() if result.artifact},
        facts={name: dict(results[name].facts) for name in listed},
        certificate_reason=_NOT_VERIFIED,
        stages=tuple(
            StageRun(result.name, result.cached, round(result.seconds, 2)) for result in results.values()
        ),
    )
    for stage in stages:
        if stage.name in results:
            manifest = manifest.with_findings(stage.findings(results))
    return manifest


def _made(artifact: Artifact) -> ArtifactRecord:
    tools = artifact.request.get("tools")
    return ArtifactRecord(
        artifact.key,
        artifact.digest,
        recorded=dict(artifact.recorded),
        tools={name: str(release) for name, release in tools.items()} if isinstance(tools, Mapping) else None,
        files={name: FileMade(output.sha256, output.bytes) for name, output in artifact.outputs.items()},
    )


def _outcome(failure: BaseException | None) -> str:
    if failure is None:
        return "shipped"
    return failure.message if isinstance(failure, ForgeError) else type(failure).__name__
