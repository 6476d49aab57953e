"""Rows to ids and masks against `datasets.map` with `apply_chat_template` and a batched fast tokenizer.

20,000 conversations of four turns, made of the words of this project's own documents, with SmolLM2's
tokenizer and template. Both begin with the file of rows and end with a file of ids (`rows_to_ids.py`);
imports are not timed. Not covered: how much memory a million rows take.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench import rows_to_ids
from bench.measure import BenchmarkError, Outcome, Run, interleaved, median_ratio, run
from bench.workplace import Workplace
from forge.errors import ForgeError
from forge.resolve.bases import SMOLLM2, directory_of

RATIO = 1.2
ROWS = 20_000
_WORDS = Path(__file__).parent.parent / "docs"


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """The median ratios of `pairs` pairs, of seconds and of processor time."""
    try:
        base = directory_of(SMOLLM2)
    except ForgeError as error:
        raise BenchmarkError(str(error)) from error
    rows = place.directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations(ROWS)), encoding="utf-8")
    once = {way: partial(_once, place, way, base, rows) for way in ("forge", "datasets")}
    done = interleaved(pairs, once["forge"], once["datasets"])
    value, samples = median_ratio([(ours[0], usual[0]) for ours, usual in done])
    note = f"forge {done[0][0][0]:.1f} s, datasets {done[0][1][0]:.1f} s in the first of {pairs} pairs"
    yield Outcome("data: rows to ids and masks", value, "x", RATIO, samples, note)
    whole = [(ours[1].seconds, usual[1].seconds) for ours, usual in done]
    value, samples = median_ratio(whole)
    yield Outcome("data: whole program, imports too", value, "x", None, samples)


def conversations(count: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Rows of four turns, some 260 tokens each; the same ones every time."""
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(_WORDS.glob("*.md")))
    words = [word for word in text.split() if "<" not in word]
    chance = random.Random(1)
    for _ in range(count):
        turns = []
        for role, most in (("user", 40), ("assistant", 60)) * 2:
            length = chance.randrange(8, most)
            start = chance.randrange(len(words) - length)
            turns.append({"role": role, "content": " ".join(words[start : start + length])})
        yield {"messages": turns}


def _once(place: Workplace, way: str, base: Path, rows: Path) -> tuple[float, Run]:
    with tempfile.TemporaryDirectory(dir=place.directory) as out:
        command = [sys.executable, rows_to_ids.__file__, way, str(base), str(rows), out]
        program = run(command, directory=place.directory, environment=place.environment)
    answer = json.loads(program.output.splitlines()[-1])
    if answer["rows"] != ROWS:
        raise BenchmarkError(f"{way} made {answer['rows']} rows of {ROWS}")
    return float(answer["seconds"]), program
