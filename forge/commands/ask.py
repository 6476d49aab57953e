"""What people ask of a served model: a chat, the smoke queries once more, a file of prompts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import CheckError, DataError, RecipeError
from forge.files import small_text
from forge.resolve.queries import queries_in
from forge.runs.find import find_run
from forge.runs.manifest import read_manifest
from forge.serve.client import find
from forge.serve.endpoint import Endpoint
from forge.ship.serving import Wish, open_runtime, read_key, settings


def chat(
    target: str,
    system: str | None,
    context: int | None,
    api_key_file: Path | None = None,
    sampling: Mapping[str, Any] | None = None,
    model: str | None = None,
) -> Mapping[str, object]:
    """Talk to a run, a GGUF or a URL in the terminal; `model` is which of a URL's."""
    from forge.serve.chat import converse
    from forge.serve.wire import Sampling

    with ExitStack() as stack:
        endpoint = _reach(target, context, api_key_file, model, stack)
        report.info(f"talking to {endpoint.model}; /quit ends, /reset forgets, /save FILE keeps")
        chosen = Sampling(**(sampling or {}))
        converse(endpoint, read=_read_line, write=report.write, system=system, sampling=chosen)
    return {"model": endpoint.model}


def _read_line(prompt: str) -> str:
    """`input` alone would put its prompt before the result, where standard output is no terminal."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    report.write(prompt)
    return input()


def _reach(
    target: str, context: int | None, api_key_file: Path | None, model: str | None, stack: ExitStack
) -> Endpoint:
    if target.startswith(("http://", "https://")):
        if context is not None:
            raise RecipeError("--context: whoever started that server has chosen its context")
        return find(target, model=model, api_key=read_key(api_key_file))
    for flag, value in {"--api-key-file": api_key_file, "--model": model}.items():
        if value is not None:
            raise RecipeError(f"{flag} goes with a URL")
    wish = Wish(target, context=context)
    return open_runtime(wish, settings(wish), stack)


def smoke(run: str) -> Mapping[str, object]:
    """Ask a run's smoke queries again, of its file; raises `CheckError` when one fails."""
    from forge.serve.smoke import failure_of_answers, run_smoke

    directory = find_run(run)
    recipe = read_manifest(directory).read_recipe()
    if recipe is None:
        raise DataError(f"{directory} says of no recipe what to ask", hint="ship its recipe again")
    wish = Wish(str(directory))
    with ExitStack() as stack:
        endpoint = open_runtime(wish, settings(wish), stack)
        answers = run_smoke(endpoint, queries_in(recipe))
    for answer in answers:
        report.info(f"  {answer.prompt}\n    → {answer.answer}" + ("" if answer.ok else "   ✗"))
    if failure := failure_of_answers(answers):
        raise failure
    return {"smoke": [{"prompt": item.prompt, "answer": item.answer, "ok": item.ok} for item in answers]}


def generate(
    prompts: Path,
    out: Path,
    urls: Sequence[str],
    api_key_file: Path | None,
    concurrency: str,
    sampling: Mapping[str, Any],
    schema: Path | None = None,
    *,
    model: str | None = None,
    raw: bool = False,
    retry_failed: bool = False,
) -> Mapping[str, object]:
    """`forge generate`; raises `CheckError` when rows failed."""
    from dataclasses import asdict

    from forge.serve.generate import answer_rows
    from forge.serve.wire import Sampling

    if concurrency != "auto" and not (concurrency.isdigit() and int(concurrency) > 0):
        raise RecipeError(f"--concurrency: a number or auto (got {concurrency})")
    if "" in (sampling.get("stop") or ()):
        raise RecipeError("--stop: an empty text would end every answer before it begins")
    if str(out) == "-" or _is_standard_output(out):
        report.keep_output_clear()
    done = answer_rows(
        _endpoints(urls, model, read_key(api_key_file)),
        prompts,
        out,
        sampling=Sampling(**sampling, schema=_schema(schema)),
        raw=raw,
        concurrency=None if concurrency == "auto" else int(concurrency),
        retry_failed=retry_failed,
    )
    report.success(
        f"{done.written} written, {done.skipped} skipped, {done.failed} failed, "
        f"{done.tokens_per_second:.0f} tokens/s"
    )
    if done.cut:
        report.warning(f"{done.cut} answers were cut at --max-tokens (their finish_reason is length)")
    if done.silent:
        report.warning(f"{done.silent} answers have no text, only reasoning_content, tool_calls or nothing")
    if done.failed:
        raise CheckError(
            f"{done.failed} rows failed", hint="look at them in OUT; --retry-failed asks them again"
        )
    return asdict(done)


def _is_standard_output(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def _endpoints(urls: Sequence[str], model: str | None, key: str | None) -> list[Endpoint]:
    """What the URLs name; those that are away for now are asked again later, if one answers at all."""
    from forge.serve.generate import FOR_NOW

    endpoints, away = [], []
    for url in dict.fromkeys(urls):
        try:
            endpoints.append(find(url, model=model, api_key=key))
        except FOR_NOW as failure:
            endpoints.append(Endpoint(url, model or "", key, proved=False))
            away.append(failure)
    if len(away) == len(endpoints):
        raise away[0]
    for absent in away:
        report.warning(f"{absent.message}: it is asked again while others answer")
    return endpoints


def _schema(path: Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    try:
        schema = json.loads(small_text(path))
    except (OSError, ValueError) as wrong:
        raise RecipeError(f"--json-schema: {path} cannot be used: {wrong}") from wrong
    if not isinstance(schema, dict):
        raise RecipeError(f"--json-schema: {path} is no JSON schema: not an object")
    return schema
