"""What a ship leaves where a person looks: `runs/<name>/`. Written whatever way the ship ended."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.chat.hand_over import MODELFILE, MODELFILE_JINJA
from forge.errors import ForgeError
from forge.export.run import ADAPTER_FILE, GGUF_FILE, MERGED_DIRECTORY
from forge.pipeline.stage import Result
from forge.resolve.derived import gguf_name
from forge.resolve.resolved import Resolved
from forge.runs.files import BESIDE, CALIBRATION, MANIFEST, REPORT, adapter_beside
from forge.runs.manifest import read_manifest
from forge.ship.page import write_page
from forge.stages.calibrate import CALIBRATION_STAGE
from forge.stages.export import adapter_in
from forge.stages.train import ADAPTER_STAGE
from forge.store import durable
from forge.store.artifacts import Artifact
from forge.store.runs import publish
from forge.verify.calibrate import IMPORTANCE_FILE
from forge.verify.verdict import Gates, judge

NOT_VERIFIED = "the ship did not get as far as verify"


def learned(results: Mapping[str, Result]) -> dict[str, Any] | None:
    """The figures before and after: exact answers where there are short ones, else held-out loss.

    `after` is of the shipped file behind its server where one was asked.
    """
    if "evaluate" not in results:
        return None
    facts = results["evaluate"].facts
    if not facts["rows"]:
        return None
    exact = facts.get("exact")
    if not exact:
        return {"metric": "heldout_loss", **facts["loss"], "rows": facts["rows"], "served": False}
    served = results["smoke"].facts.get("heldout") if "smoke" in results else None
    after = served["exact"] if served else exact["after"]
    rows = exact["rows"]
    return {
        "metric": "exact_match",
        "before": round(exact["before"] / rows, 4),
        "after": round(after / rows, 4),
        "rows": rows,
        "served": served is not None,
    }


def certificate(ship: Resolved, results: Mapping[str, Result]) -> dict[str, Any] | None:
    """The verdict on this ship's file, the live server's leg among it where one was asked."""
    if "verify" not in results:
        return None
    verify = ship.recipe.verify
    live = results["deploy"].facts.get("live") if "deploy" in results else None
    return judge(results["verify"].facts, Gates(verify.max_kl, verify.min_top1), live)


def summary(ship: Resolved, results: Mapping[str, Result]) -> dict[str, Any]:
    """The JSON result of `forge ship`; whoever leaves a server running puts its address in."""
    directory = ship.run_directory
    modelfile = results["modelfile"].facts if "modelfile" in results else {}
    smoke = results["smoke"].facts["smoke"] if "smoke" in results else []
    return {
        "run": str(directory),
        "adapter": str(directory / "adapter") if ADAPTER_STAGE in results else None,
        **_weights(ship, results),
        "modelfile": str(directory / MODELFILE) if modelfile.get("modelfile") else None,
        "modelfile_reason": modelfile.get("reason"),
        **({"calibration": dict(results["calibrate"].facts)} if "calibrate" in results else {}),
        **_proofs(ship, results),
        "endpoint": None,
        "smoke": [{key: one[key] for key in ("prompt", "answer", "ok")} for one in smoke],
    }


def _weights(ship: Resolved, results: Mapping[str, Result]) -> dict[str, Any]:
    """The model's GGUF, and the adapter's where it has one; or why it has none where it was to have one."""
    artifact = results["export"].artifact if "export" in results else None
    if artifact is None:
        return {"gguf": None}
    gguf = ship.run_directory / gguf_name(ship, artifact.facts)
    adapter = {"adapter_gguf": str(adapter_beside(gguf))} if adapter_in(artifact) else {}
    reasons = artifact.facts["merged_because"]
    return {"gguf": str(gguf), **adapter, **({"merged_because": reasons} if reasons else {})}


def _proofs(ship: Resolved, results: Mapping[str, Result]) -> dict[str, Any]:
    """What the summary and the manifest both tell."""
    found = certificate(ship, results)
    return {
        "certificate": found,
        "certificate_reason": None if found else NOT_VERIFIED,
        "learned": learned(results),
        "stages": [
            {"name": result.name, "cached": result.cached, "seconds": round(result.seconds, 2)}
            for result in results.values()
        ],
    }


def record(ship: Resolved, results: Mapping[str, Result], failure: BaseException | None = None) -> None:
    """Publish the artifacts that there are into the run's directory, then manifest and report."""
    directory = ship.run_directory
    directory.mkdir(parents=True, exist_ok=True)
    before = read_manifest(directory).get("artifacts", {})
    for result in results.values():
        if result.artifact:
            _publish(ship, result.artifact, before.get(result.name, {}).get("digest"))
    manifest = _manifest(ship, results, failure)
    durable.write_text(directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    write_page(directory / REPORT, manifest, results)


def _publish(ship: Resolved, artifact: Artifact, published: str | None) -> None:
    """Put the artifact's files into the run; `published` is the digest of what lies there."""
    directory = ship.run_directory
    if artifact.stage == ADAPTER_STAGE:
        for name in artifact.outputs:
            _place(artifact, name, artifact.path / name, directory / "adapter" / name, published)
    elif artifact.stage == CALIBRATION_STAGE:
        matrix = directory / CALIBRATION / IMPORTANCE_FILE
        _place(artifact, IMPORTANCE_FILE, artifact.path / IMPORTANCE_FILE, matrix, published)
    elif artifact.stage == "export":
        if not ship.recipe.export.is_calibrated:
            shutil.rmtree(directory / CALIBRATION, ignore_errors=True)  # an earlier ship's
        _publish_gguf(directory / gguf_name(ship, artifact.facts), artifact, published)
        if (artifact.path / MERGED_DIRECTORY).is_dir():
            publish(artifact.path / MERGED_DIRECTORY, directory / MERGED_DIRECTORY)
        else:
            shutil.rmtree(directory / MERGED_DIRECTORY, ignore_errors=True)  # an earlier ship's
    elif artifact.stage == "modelfile":
        for name in (MODELFILE, MODELFILE_JINJA):
            if name in artifact.outputs:
                publish(artifact.path / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)


def _publish_gguf(target: Path, artifact: Artifact, published: str | None) -> None:
    """The model as `target`, its adapter beside it, and no GGUF of an earlier recipe, which would mislead.

    Of two files the model comes last and the one before goes first: whenever this is killed, nobody finds
    a base without its adapter, or an adapter on a model that has it already.
    """
    adapter = {ADAPTER_FILE: adapter_beside(target)} if adapter_in(artifact) else {}
    kept = {*adapter.values(), target}
    if published != artifact.digest and (adapter or adapter_beside(target).exists()):
        kept.remove(target)
    # The model goes before its adapter.
    for old in sorted(set(target.parent.glob("*.gguf")) - kept, key=lambda one: one.name.endswith(BESIDE)):
        old.unlink()
    for name, path in {**adapter, GGUF_FILE: target}.items():
        _place(artifact, name, artifact.path / name, path, published)


def _place(artifact: Artifact, name: str, source: Path, target: Path, published: str | None) -> None:
    """Publish unless this very artifact lies there whole: copying gigabytes again would take long."""
    same_size = target.exists() and target.stat().st_size == artifact.outputs[name].bytes
    if not (same_size and published == artifact.digest):
        publish(source, target)


def _manifest(ship: Resolved, results: Mapping[str, Result], failure: BaseException | None) -> dict[str, Any]:
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
        # The certificate holds what verify found.
        "facts": {result.name: dict(result.facts) for result in results.values() if result.name != "verify"},
        **_proofs(ship, results),
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
