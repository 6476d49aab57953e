from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--endpoint", required=True, help="URL of an OpenAI-compatible server.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file with the server's key.")
@click.option("--concurrency", default="auto", show_default=True, help="Requests at once: a number, or auto.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--retry-failed", is_flag=True, help="Ask the rows again that failed before.")
@common
def command(
    prompts: Path,
    out: Path,
    endpoint: str,
    api_key_file: Path | None,
    concurrency: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    retry_failed: bool,
) -> None:
    """Answer PROMPTS (JSONL rows with id and prompt, or id and messages) into OUT, each id once.

    Started again it goes on where it stopped. Any failed row is exit 5.
    """
    from forge.stages.asking import generate

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    report.result(generate(prompts, out, endpoint, api_key_file, concurrency, sampling, retry_failed))
