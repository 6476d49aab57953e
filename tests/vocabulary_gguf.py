"""A GGUF of a checkpoint's vocabulary, without weights.

`python -m tests.vocabulary_gguf TREE DIRECTORY JSON` is a program of its own, because llama.cpp's converters
need their own `gguf` package, and a test session may have imported the other. JSON: {out, name, choices}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from forge import process
from forge.errors import ForgeError, StageError
from forge.export.types import write_sparse
from forge.export.upstream import Choices, convert

ROOT = Path(__file__).parent.parent


def vocabulary_gguf(tree: Path, directory: Path, out: Path, choices: Choices, name: str) -> Path:
    """Write it to `out`; raises `StageError` with what the converter said."""
    asked = json.dumps({"out": str(out), "name": name, "choices": asdict(choices)})
    command = [sys.executable, "-m", "tests.vocabulary_gguf", str(tree), str(directory), asked]
    finished = process.run(command, directory=ROOT, environment={"PYTHONPATH": str(ROOT)})
    if finished.status:
        raise StageError(finished.output)
    return out


def main(tree: str, directory: str, asked: str) -> int:
    wanted = json.loads(asked)
    choices = Choices(**wanted["choices"])
    try:
        converted = convert(
            Path(tree), Path(directory), [], outtype="f16", name=wanted["name"], choices=choices
        )
    except ForgeError as failure:
        sys.stdout.write(f"{failure}\n")
        return failure.code
    write_sparse(converted, Path(wanted["out"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
