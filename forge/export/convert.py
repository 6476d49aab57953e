"""llama.cpp's converter, in a process of its own with its own gguf-py. Runs in a worker."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from forge import process, report
from forge.errors import StageError


@dataclass(frozen=True)
class Choices:
    """What forge decides of the vocabulary; None leaves a thing to the converter.

    `pre_tokenizer` is used where the converter's table has no name. `adds_bos`: servers put BOS
    before a prompt. `space_prefix`: SentencePiece puts a space before each stretch of text.
    `end_of_turn` is the id that ends an answer.
    """

    pre_tokenizer: str = ""
    adds_bos: bool | None = None
    space_prefix: bool | None = None
    end_of_turn: int | None = None


class Converter:
    """`name` becomes the GGUF's general.name."""

    def __init__(self, tree: Path, choices: Choices, name: str) -> None:
        entry = Path(__file__).with_name("convert_entry.py")
        self._command = [sys.executable, "-I", str(entry), str(tree), json.dumps(asdict(choices))]
        self._name = name

    def run(self, source: Path, target: Path, *options: str) -> Path:
        """Convert the checkpoint in `source` to the GGUF `target`; raises `StageError`."""
        command = [*self._command, str(source), "--outfile", str(target), "--model-name", self._name]
        label = "convert the vocabulary" if "--vocab-only" in options else "convert"
        report.advance(label, 0, 1)
        finished = process.run([*command, *options], log=sys.stderr, environment={"HF_HUB_OFFLINE": "1"})
        if finished.status or not target.is_file():
            target.unlink(missing_ok=True)
            lines = [line for line in finished.output.splitlines() if line.strip()]
            raise StageError(
                f"llama.cpp's converter failed: {lines[-1] if lines else 'no output'}",
                hint="its whole output is in the run's log",
            )
        report.advance(label, 1, 1)
        return target
