"""The names of a run's files, and of the files that lie beside any GGUF."""

from __future__ import annotations

from pathlib import Path

from forge.recipe.quants import QUANTS

RUNS = "runs"
ADAPTER = "adapter"
MANIFEST = "manifest.json"
LOCK = "forge.lock"
REPORT = "report.html"
CERTIFICATE = "certificate.json"
SIGNATURE = "model.sig"
# Where the importance matrix lies that `forge verify` asks for; beside the model it could be taken for one.
CALIBRATION = "calibration"
ADAPTER_SUFFIX = "-adapter.gguf"
IMPORTANCE_SUFFIX = "-imatrix.gguf"
BESIDE = (ADAPTER_SUFFIX, IMPORTANCE_SUFFIX)
"""What a GGUF's name ends with that lies beside a model and is none."""


def run_gguf(name: str, quant: str) -> str:
    """What the GGUF of a type is called in the run `name`."""
    return f"{name}-{quant}.gguf"


def of_type(file: str, quant: str | None) -> str:
    """What `file` is called for a further type, such as Modelfile-q8_0.jinja; the first's stays as it is."""
    stem, dot, suffix = file.partition(".")
    return f"{stem}-{quant}{dot}{suffix}" if quant else file


def withdraw_types(file: str, run: Path) -> None:
    """Take away what an earlier ship of `run` left of `file` for further types."""
    for quant in QUANTS:
        (run / of_type(file, quant)).unlink(missing_ok=True)


def adapter_beside(gguf: Path) -> Path:
    """Where the adapter lies that goes on the model `gguf`: beside it, under its name."""
    return gguf.with_name(f"{gguf.stem}{ADAPTER_SUFFIX}")
