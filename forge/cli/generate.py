from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import FiniteRange, common


@click.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--endpoint", "urls", required=True, multiple=True,
    help="URL of an OpenAI-compatible server; several share the rows.",
)  # fmt: skip
@click.option("--model", help="Which of its models, an adapter's name too; default: the first listed.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file with the servers' key.")
@click.option("--concurrency", default="auto", show_default=True, help="Requests at once: a number, or auto.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=FiniteRange(0), default=0.0, show_default=True, help="0: the likeliest token."
)
@click.option("--top-p", type=FiniteRange(0, 1), help="Share of likely tokens; default: the server's.")
@click.option("--top-k", type=click.IntRange(0), help="Most tokens to choose from; default: the server's.")
@click.option("--min-p", type=FiniteRange(0, 1), help="Least share of the likeliest; default: the server's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--stop", multiple=True, help="Text that ends an answer.")
@click.option("--json-schema", "schema", type=click.Path(path_type=Path), help="What every answer must meet.")
@click.option("--raw", is_flag=True, help="Send each prompt as it is, without the chat template.")
@click.option("--retry-failed", is_flag=True, help="Ask the rows again that failed before.")
@common
def command(
    prompts: Path,
    out: Path,
    urls: tuple[str, ...],
    model: str | None,
    api_key_file: Path | None,
    concurrency: str,
    schema: Path | None,
    raw: bool,
    retry_failed: bool,
    **sampling: Any,
) -> None:
    """Answer PROMPTS (JSONL rows with id and prompt, or id and messages) into OUT, each id once.

    Started again it goes on where it stopped. Any failed row is exit 5.
    """
    from forge.commands.ask import generate

    done = generate(
        prompts, out, urls, api_key_file, concurrency, sampling, schema,
        model=model, raw=raw, retry_failed=retry_failed,
    )  # fmt: skip
    report.result(done)
