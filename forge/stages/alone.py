"""What can be done with a model without a ship: validate, serve, chat, smoke, generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.errors import CheckError, DataError, InterruptedByUserError, RecipeError
from forge.model.base import resolve
from forge.model.gguf_header import read_gguf
from forge.serve.client import find
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import Settings
from forge.stages.drive import find_gguf, find_run
from forge.stages.record import read_manifest

_DEFAULT_CONTEXT = 4096


def _directory(spec: str) -> Path:
    directory = resolve(spec).directory
    assert directory is not None  # only a plan leaves it open
    return directory


def validate(base: str, adapter: Path) -> dict[str, Any]:
    """`forge validate --base --adapter`; raises what `adapter.status.validate` raises."""
    facts = worker.call("validate", {"base": str(_directory(base)), "adapter": str(adapter.absolute())})
    report.success(
        f"sound: {len(facts['adapted_modules'])} layers, "
        f"{facts['trainable_parameters']:,} parameters, scale {facts['scale']}"
    )
    if not facts["pure"]:
        report.info("not pure: " + "; ".join(facts["impurities"]))
    return {key: facts[key] for key in ("ok", "status", "layers", "pure", "scale", "exports", "problems")}


def settings(
    target: str,
    host: str = "127.0.0.1",
    port: int = 0,
    context: int | None = None,
    parallel: int | None = None,
    threads: int | None = None,
    gpu_layers: int | None = None,
    api_key_file: Path | None = None,
) -> Settings:
    """How to serve a run or a GGUF file: context min(model's, 4096) unless told."""
    path = find_gguf(target)
    header = read_gguf(path)
    most = header.metadata.get(f"{header.architecture}.context_length")
    limit = most if isinstance(most, int) else _DEFAULT_CONTEXT
    return Settings(
        model=path,
        alias=path.stem,
        context_tokens=context or min(limit, _DEFAULT_CONTEXT),
        host=host,
        port=port,
        parallel=parallel,
        threads=threads,
        gpu_layers=gpu_layers,
        api_key=_key(api_key_file),
    )


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise RecipeError(f"--api-key-file: {path}: {error.strerror}") from error
    if not key:
        raise RecipeError(f"--api-key-file: {path} is empty", hint="write the key into it, one line")
    return key


def serve(chosen: Settings, *, ready: Callable[[Mapping[str, object]], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; `ready` hears of the endpoint once it answers."""
    with serve_embedded(chosen) as endpoint:
        report.success(f"serving {endpoint.model} at {endpoint.url}/v1; Ctrl-C stops it")
        report.info(f"context {chosen.context_tokens} tokens, {chosen.slots} requests at once")
        ready({"endpoint": endpoint.url, "model": endpoint.model, "pid": None})
        try:
            while not (why := endpoint.why_gone()):
                time.sleep(1)
        except KeyboardInterrupt:
            raise InterruptedByUserError("stopped serving") from None
        raise DataError(why)


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
    return stack.enter_context(serve_embedded(settings(target, context=context)))


def smoke(run: str) -> dict[str, Any]:
    """Ask a run's smoke queries again, of its file; raises `CheckError` when one fails."""
    from forge.recipe.schema import from_json
    from forge.serve.smoke import run_smoke
    from forge.stages.live import queries_in

    directory = find_run(run)
    recipe = from_json(read_manifest(directory)["recipe"])
    with serve_embedded(settings(str(directory))) as endpoint:
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
    endpoint = find(url, api_key=_key(api_key_file))
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
