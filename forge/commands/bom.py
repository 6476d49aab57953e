"""`forge show RUN --bom FILE`: what a run was made of, as a CycloneDX bill of materials.

Specification: https://cyclonedx.org/docs/1.6/json/. Not covered: what the packages themselves depend on, and
signing, which is `forge sign`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from forge import report
from forge.files import write_text
from forge.resolve.stage import NOT_INSTALLED
from forge.runs.manifest import Manifest, read_manifest
from forge.ship.lock import packages_of

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROGRAMS = ("python", "llama.cpp")


def write_bom(directory: Path, out: Path) -> None:
    """Write `out` from the manifest in `directory`, the same bytes for the same manifest."""
    manifest = read_manifest(directory)
    components = list(_components(manifest))
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(manifest.as_json(), sort_keys=True)).urn,
        "version": 1,
        "metadata": {
            "tools": {"components": [_named("application", "forge-ship", manifest.forge)]},
            "component": _model(manifest),
        },
        "components": components,
        "dependencies": [
            {"ref": "model", "dependsOn": [part["bom-ref"] for part in components if "bom-ref" in part]}
        ],
    }
    write_text(out, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    report.success(f"wrote {out}: a CycloneDX bill of materials of {len(components)} components")


def _model(manifest: Manifest) -> dict[str, object]:
    figures = manifest.read_certificate()
    measured = {
        name: value
        for name in ("kl_mean", "top1", "perplexity_gguf")
        if figures and (value := getattr(figures.logits, name)) is not None
    }
    metrics = [{"type": name, "value": str(value)} for name, value in measured.items()]
    return {
        **_named("machine-learning-model", manifest.name, None, "model", manifest.base.licence),
        "modelCard": {
            "modelParameters": {"task": "text-generation", "approach": {"type": "supervised"}},
            "quantitativeAnalysis": {"performanceMetrics": metrics},
        },
    }


def _components(manifest: Manifest) -> Iterator[dict[str, object]]:
    base = manifest.base
    made = _named("machine-learning-model", base.spec or "base", base.revision, "base", base.licence)
    yield made | _digest(base.digest)
    if manifest.data:
        yield _named("data", "training rows", None, "data") | _digest(manifest.data.digest)
    for name, versions in packages_of(manifest).items():
        for version in versions:
            if name in _PROGRAMS:
                yield _named("application", name, version)
            elif version and version != NOT_INSTALLED:
                named = f"{name}@{version}"
                yield _named("library", name, version, f"pypi/{named}") | {"purl": f"pkg:pypi/{named}"}
    for stage, artifact in manifest.artifacts.items():
        for name, file in artifact.files.items():
            yield _named("file", f"{stage}/{name}", None) | _hash(file.sha256)


def _named(
    kind: str, name: str, version: str | None, reference: str | None = None, licence: str | None = None
) -> dict[str, object]:
    return {
        "type": kind,
        "name": name,
        **({"bom-ref": reference} if reference else {}),
        **({"version": version} if version else {}),
        **({"licenses": [{"license": {"name": licence}}]} if licence else {}),
    }


def _hash(sha256: str) -> dict[str, object]:
    known = _SHA256.fullmatch(sha256)
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]} if known else {}


def _digest(digest: str | None) -> dict[str, object]:
    """forge's own digest of several files, which is the hash of none of them."""
    return {"properties": [{"name": "forge:digest", "value": digest}]} if digest else {}
