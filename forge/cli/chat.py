from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import FiniteRange, common


@click.command()
@click.argument("target")
@click.option("--system", help="A system prompt.")
@click.option("--context", type=click.IntRange(64), help="Context in tokens; default: up to 4096.")
@click.option("--model", help="Which of a URL's models, an adapter's name too; default: the first listed.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="A file with a URL's key.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=FiniteRange(0), default=0.0, show_default=True, help="0: the likeliest token."
)
@common
def command(
    target: str,
    system: str | None,
    context: int | None,
    model: str | None,
    api_key_file: Path | None,
    max_tokens: int,
    temperature: float,
) -> None:
    """Talk to TARGET: a run, a GGUF file, or the URL of an OpenAI-compatible server."""
    from forge.commands.ask import chat

    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    report.result(chat(target, system, context, api_key_file, sampling, model))
