"""`forge export` against the usual three steps: peft merge and save, convert, quantize."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import FORGE, Outcome, Run, interleaved, median_ratio, run
from bench.workplace import Workplace, random_model
from forge.export.kernels import CHOICE
from forge.tools.llama_cpp import find_converters

QUANT = "q4_k_m"
SLOWEST = {"0.5B": 1 / 3, "2B": 1 / 5}
SLOWEST_WITHOUT_KERNELS = 1 / 1.7
MOST_MEMORY = {"0.5B": 800e6}
# Of the final file's: the header alone is written twice, once as the sparse file that llama.cpp looks at.
MOST_WRITTEN = {"0.5B": 1.01, "2B": 1.01}
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Exported:
    """One export, the bytes that it wrote, and those of the file."""

    run: Run
    bytes_written: int
    bytes_of_file: int


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """0.1B and 0.5B parameters; the ratio of the second is held against its limit."""
    for name in ("0.1B", "0.5B"):
        yield from _compare(place, name, pairs)


def measure_large(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """2B parameters: 16 GB of disk, and minutes a pair."""
    yield from _compare(place, "2B", pairs)


def measure_without_kernels(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """0.5B parameters with ggml's own kernels, as on a computer without a C++ compiler."""
    directory, _ = random_model(place, "0.5B")
    with_ggml = replace(place, more={CHOICE: "ggml"})
    found = interleaved(pairs, lambda: _ours(with_ggml, directory), lambda: _usual(place, directory))
    value, samples = median_ratio([(one.run.seconds, two.run.seconds) for one, two in found])
    best = [min(pair[side].run.seconds for pair in found) for side in (0, 1)]
    note = f"best {best[0]:.1f} s of {best[1]:.1f} s, {pairs} pairs"
    limit = SLOWEST_WITHOUT_KERNELS
    yield Outcome("export 0.5B, wall, ggml's kernels", value, "x", limit, samples, note)
    shutil.rmtree(directory)


def _compare(place: Workplace, name: str, pairs: int) -> Iterator[Outcome]:
    directory, parameters = random_model(place, name)
    found = interleaved(pairs, lambda: _ours(place, directory), lambda: _usual(place, directory))
    ours, usual = [pair[0] for pair in found], [pair[1] for pair in found]
    note = f"{parameters / 1e6:.0f}M parameters, {QUANT}, {pairs} pairs"
    value, samples = median_ratio([(one.run.seconds, two.run.seconds) for one, two in found])
    yield Outcome(f"export {name}, wall", value, "x", SLOWEST.get(name), samples, note)
    value, samples = median_ratio([(one.run.cpu_seconds, two.run.cpu_seconds) for one, two in found])
    yield Outcome(f"export {name}, processor", value, "x", None, samples)
    yield _megabytes(name, ours, usual)
    written, theirs = ours[0].bytes_written, usual[0].bytes_written
    note = f"{written / 1e6:.0f} MB of {theirs / 1e6:.0f} MB"
    yield Outcome(f"export {name}, bytes written", written / theirs, "x", note=note)
    share = written / ours[0].bytes_of_file
    yield Outcome(f"export {name}, bytes written, to the file's own", share, "x", MOST_WRITTEN.get(name))
    for whose, runs in (("forge", ours), ("the usual way", usual)):
        seconds = [one.run.seconds for one in runs]
        note = f"best; {min(seconds) / parameters * 1e9:.1f} s for a billion parameters"
        yield Outcome(f"export {name}, {whose}", min(seconds), "s", None, seconds, note)
    shutil.rmtree(directory)


def _megabytes(name: str, ours: Sequence[Exported], usual: Sequence[Exported]) -> Outcome:
    peak = median(one.run.peak_rss_bytes for one in ours)
    theirs = median(one.run.peak_rss_bytes for one in usual)
    limit = MOST_MEMORY[name] / theirs if name in MOST_MEMORY else None
    note = f"{peak / 1e6:.0f} MB of {theirs / 1e6:.0f} MB"
    return Outcome(f"export {name}, peak memory", peak / theirs, "x", limit, note=note)


def _ours(place: Workplace, directory: Path) -> Exported:
    out = directory / "forge.gguf"
    command = [FORGE, "export", "--base", "base", "--adapter", "adapter", "--quant", QUANT, "--out", str(out)]
    done = run([*command, "--json"], directory=directory, environment=place.environment)
    return _exported(done, out)


def _usual(place: Workplace, directory: Path) -> Exported:
    out = directory / "usual.gguf"
    command = [sys.executable, str(_HERE / "vendor_chain.py"), str(find_converters(place.home))]
    done = run(
        [*command, "base", "adapter", str(out), QUANT], directory=directory, environment=place.environment
    )
    return _exported(done, out)


def _exported(done: Run, out: Path) -> Exported:
    told: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    size = out.stat().st_size
    out.unlink()
    return Exported(done, told["bytes_written"], size)
