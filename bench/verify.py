"""What `forge verify` takes: seconds for the quickstart's model, memory for one of 2 billion parameters.

The large model has random weights: memory does not depend on what they are. What counts is memory
that the system cannot take back (anonymous pages, of all processes together, sampled twenty times a
second): the files themselves are mapped, and their pages are dropped where memory is short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.measure import FORGE, Outcome, peak_of, run
from bench.workplace import QUICKSTART, Workplace, random_model

SECONDS = 90.0
GIGABYTES = 3.0
REAL_SECONDS, HALF_SECONDS = 30.0, 90.0
_SHORT = ("-o", "train.max_steps=4", "-o", "verify.learned=off")
_ROWS = 8


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Seconds of the verify stage on the quickstart's files, and the peak memory for 2 billion parameters."""
    command = [FORGE, "ship", str(QUICKSTART), *_SHORT, "--until", "modelfile", "--json"]
    run(command, directory=place.directory, environment=place.environment)
    command = [FORGE, "verify", str(QUICKSTART), *_SHORT, "--json"]
    verified = run(command, directory=place.directory, environment=place.environment)
    yield Outcome("forge verify, quickstart", verified.seconds, "s", SECONDS)
    (large, parameters), rows = random_model(place, "2B"), place.directory / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"Is it {n}?", "completion": f"It is {n}."}) + "\n" for n in range(_ROWS)
        )
    )
    base, file = large / "base", large / "large.gguf"
    export = [FORGE, "export", "--base", str(base), "--out", str(file), "--quant", "q4_k_m"]
    run(export, directory=place.directory, environment=place.environment)
    command = [FORGE, "verify", "--base", str(base), "--gguf", str(file), "--data", str(rows)]
    peak, seconds = peak_of(command, directory=place.directory, environment=place.environment)
    note = f"{parameters / 1e9:.2f} billion parameters, {seconds:.0f} s"
    yield Outcome("forge verify, memory", peak / 1e9, "GB", GIGABYTES, note=note)


def measure_files(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Seconds of `forge verify` on a real model, and on a random one of half a billion parameters."""
    real = place.directory / "smollm2"
    command = [sys.executable, "-m", "bench.real_model", str(real)]
    run(command, directory=Path(__file__).parent.parent, environment=place.environment)
    half, _ = random_model(place, "0.5B")
    for name, base, adapter, limit in (
        ("SmolLM2-135M q8_0", real, None, REAL_SECONDS),
        ("0.5B and its adapter, q8_0", half / "base", half / "adapter", HALF_SECONDS),
    ):
        source = ["--base", str(base), *(["--adapter", str(adapter)] if adapter else [])]
        file = place.directory / f"{base.parent.name}-{base.name}.gguf"
        export = [FORGE, "export", *source, "--out", str(file), "--quant", "q8_0"]
        run(export, directory=place.directory, environment=place.environment)
        command = [FORGE, "verify", *source, "--gguf", str(file), "--json"]
        verified = run(command, directory=place.directory, environment=place.environment)
        sample = json.loads(verified.output.splitlines()[-1])["sample"]
        note = f"{sample['positions']} positions, look {sample['looks']}"
        yield Outcome(f"forge verify, {name}", verified.seconds, "s", limit, note=note)
