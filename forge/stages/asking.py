"""What people ask of a served model: a chat, the smoke queries once more, a file of prompts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import CheckError, RecipeError
from forge.serve.client import find
from forge.serve.endpoint import Endpoint
from forge.stages.drive import find_run
from forge.stages.record import read_manifest
from forge.stages.serving import Wish, open_runtime, read_key


def chat(target: str, system: str | None, context: int | None) -> dict[str, Any]:
    """Talk to a run, a GGUF or a URL in the terminal."""
    from forge.serve.chat import converse

    with ExitStack() as stack:
        endpoint = _reach(target, context, stack)
        report.info(f"talking to {endpoint.model}; /quit ends, /reset forgets, /save FILE keeps")
        converse(endpoint, read=_read_line, write=report.write, system=system)
    return {"model": endpoint.model}


def _read_line(prompt: str) -> str:
    """`input` alone would put its prompt before the result, where standard output is no terminal."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    report.write(prompt)
    return input()


def _reach(target: str, context: int | None, stack: ExitStack) -> Endpoint:
    if target.startswith(("http://", "https://")):
        return find(target)
    return open_runtime(Wish(target, context=context), stack)[1]


def smoke(run: str) -> dict[str, Any]:
    """Ask a run's smoke queries again, of its file; raises `CheckError` when one fails."""
    from forge.recipe.schema import from_json
    from forge.serve.smoke import run_smoke
    from forge.stages.live import queries_in

    directory = find_run(run)
    recipe = from_json(read_manifest(directory)["recipe"])
    with ExitStack() as stack:
        _, endpoint = open_runtime(Wish(str(directory)), stack)
        answers = run_smoke(endpoint, queries_in(recipe))
    for answer in answers:
        report.info(f"  {answer.prompt}\n    → {answer.answer}" + ("" if answer.ok else "   ✗"))
    failed = [answer for answer in answers if not answer.ok]
    if failed:
        raise CheckError(f"{len(failed)} of {len(answers)} smoke queries failed")
    return {"smoke": [{"prompt": one.prompt, "answer": one.answer, "ok": one.ok} for one in answers]}


def generate(
    prompts: Path,
    out: Path,
    url: str,
    api_key_file: Path | None,
    concurrency: str,
    sampling: Mapping[str, Any],
    retry_failed: bool,
) -> dict[str, Any]:
    """`forge generate`; raises `CheckError` when rows failed."""
    from dataclasses import asdict

    from forge.serve.generate import generate as run
    from forge.serve.wire import Sampling

    if concurrency != "auto" and not (concurrency.isdigit() and int(concurrency) > 0):
        raise RecipeError(f"--concurrency: a number or auto (got {concurrency})")
    endpoint = find(url, api_key=read_key(api_key_file))
    done = run(
        endpoint,
        prompts,
        out,
        sampling=Sampling(**sampling),
        concurrency=None if concurrency == "auto" else int(concurrency),
        retry_failed=retry_failed,
    )
    report.success(
        f"{done.written} written, {done.skipped} skipped, {done.failed} failed, "
        f"{done.tokens_per_second:.0f} tokens/s"
    )
    if done.failed:
        raise CheckError(
            f"{done.failed} rows failed", hint="look at them in OUT; --retry-failed asks them again"
        )
    return asdict(done)
