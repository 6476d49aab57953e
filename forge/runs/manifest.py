"""What the last ship of a run wrote down of it: its manifest, and what it tells Ollama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge.chat.hand_over import MODELFILE_JINJA, read_modelfile
from forge.chat.modelfile import Modelfile
from forge.runs.files import MANIFEST


def read_manifest(directory: Path) -> dict[str, Any]:
    """The run's last manifest; empty when there is none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def read_run_modelfile(directory: Path) -> Modelfile | None:
    """What the run tells Ollama: its Modelfile.jinja, and what that cannot hold; None where there is none."""
    path = directory / MODELFILE_JINJA
    if not path.is_file():
        return None
    facts = read_manifest(directory).get("facts", {}).get("modelfile", {})
    return read_modelfile(path, facts.get("left_out"))
