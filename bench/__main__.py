"""`python -m bench [NAME...]`: measure, print a table, exit 5 when a limit is missed.

Exit codes: 0 every limit held, 2 wrong arguments, 4 something measured failed, 5 a limit was missed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import data, export, front, gpu, kernels, serve, ship, startup, training, validate, verify
from bench.measure import BenchmarkError, Outcome
from bench.workplace import Workplace, workplace
from forge.process import signals_as_interrupt

Benchmark = Callable[[Workplace, int], Iterator[Outcome]]
Facts = Mapping[str, str | int]
BENCHMARKS: Mapping[str, Benchmark] = {
    "startup": startup.measure,
    "training": training.measure,
    "ship": ship.measure,
    "export": export.measure,
    "data": data.measure,
    "export-large": export.measure_large,
    "export-ggml": export.measure_without_kernels,
    "validate": validate.measure,
    "verify": verify.measure,
    "verify-files": verify.measure_files,
    "serve": serve.measure,
    "generate": serve.measure_generate,
    "front": front.measure,
    "busy": front.measure_busy,
    "kernels": kernels.measure,
    "gpu": gpu.measure,
}
PAIRS = 5
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "llama-cpp-python", "xllamacpp")


def main(arguments: Sequence[str]) -> int:
    """Measure what `arguments` name and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there is {', '.join(BENCHMARKS)}")
    if options.list:
        for name in BENCHMARKS:
            print(f"{name:12} {_first_line(BENCHMARKS[name])}")
        return 0
    facts = machine()
    outcomes: list[Outcome] = []
    failures: dict[str, str] = {}
    for name in options.names or BENCHMARKS:
        print(f"{name} ...", flush=True)
        try:
            with workplace(small=options.small) as place:
                for outcome in BENCHMARKS[name](place, options.pairs):
                    print("  " + row(outcome), flush=True)
                    outcomes.append(outcome)
        except BenchmarkError as error:
            print(f"  failed: {error}", flush=True)
            failures[name] = str(error)
    return finish(facts, outcomes, failures, options.out)


def finish(facts: Facts, outcomes: Sequence[Outcome], failures: Mapping[str, str], out: Path | None) -> int:
    """Print the table, write `out`, and return the exit code."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    for outcome in outcomes:
        print(row(outcome))
    for name in failures:
        print(f"FAILED   {name}")
    if out:
        found = [asdict(outcome) | {"ok": outcome.ok} for outcome in outcomes]
        when = datetime.now(UTC).isoformat(timespec="seconds")
        text = {"when": when, "machine": dict(facts), "outcomes": found, "failures": dict(failures)}
        out.write_text(json.dumps(text, indent=2) + "\n")
    if failures:
        return 4
    return 0 if all(outcome.ok for outcome in outcomes) else 5


def row(outcome: Outcome) -> str:
    """One line of the table: whether it held, what, how much of how much allowed, and how it was found."""
    if outcome.value is None:
        return f"none     {outcome.name:36} {'':10}  {'':14} {outcome.note}".rstrip()
    verdict = "told" if outcome.limit is None else "ok" if outcome.ok else "MISSED"
    limit = "" if outcome.limit is None else f"limit {outcome.limit:g} {outcome.unit}"
    value = f"{outcome.value:.3f} {outcome.unit}"
    return f"{verdict:8} {outcome.name:36} {value:>10}  {limit:14} {outcome.note}".rstrip()


def machine() -> Facts:
    """The facts of this machine that the figures depend on."""
    facts: dict[str, str | int] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        # Figures of a machine that was busy before say little.
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    return facts


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def _first_line(benchmark: Benchmark) -> str:
    return (sys.modules[benchmark.__module__].__doc__ or "").partition("\n")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure forge against its limits.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all when none is named"
    )
    parser.add_argument(
        "--pairs", type=_positive, default=PAIRS, metavar="N", help=f"pairs of a comparison ({PAIRS})"
    )
    parser.add_argument("--small", action="store_true", help="gpu: a tiny model on the processor")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")
    parser.add_argument("--list", action="store_true", help="say what there is and measure nothing")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    try:
        with signals_as_interrupt():
            status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
