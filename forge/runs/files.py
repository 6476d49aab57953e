"""The names of a run's files, and of the files that lie beside any GGUF."""

from __future__ import annotations

from pathlib import Path

RUNS = "runs"
ADAPTER = "adapter"
MANIFEST = "manifest.json"
REPORT = "report.html"
CERTIFICATE = "certificate.json"
# Where the importance matrix lies that `forge verify` asks for; beside the model it could be taken for one.
CALIBRATION = "calibration"
ADAPTER_SUFFIX = "-adapter.gguf"
IMPORTANCE_SUFFIX = "-imatrix.gguf"
BESIDE = (ADAPTER_SUFFIX, IMPORTANCE_SUFFIX)
"""What a GGUF's name ends with that lies beside a model and is none."""


def adapter_beside(gguf: Path) -> Path:
    """Where the adapter lies that goes on the model `gguf`: beside it, under its name."""
    return gguf.with_name(f"{gguf.stem}{ADAPTER_SUFFIX}")
