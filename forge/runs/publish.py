"""How an artifact's files get to where a person looks for them."""

from __future__ import annotations

from pathlib import Path

from forge.store.artifacts import Artifact
from forge.store.runs import publish


def publish_output(artifact: Artifact, name: str, target: Path, published: str | None) -> None:
    """Publish an output as `target`, unless this very artifact (digest `published`) lies there whole.

    Copying gigabytes again would take long.
    """
    same_size = target.exists() and target.stat().st_size == artifact.outputs[name].bytes
    if not (same_size and published == artifact.digest):
        publish(artifact.path / name, target)
