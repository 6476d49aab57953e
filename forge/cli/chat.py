from __future__ import annotations

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("target")
@click.option("--system", help="A system prompt.")
@click.option("--context", type=click.IntRange(64), help="Context in tokens; up to 4096 unless told.")
@common
def command(target: str, system: str | None, context: int | None) -> None:
    """Talk to TARGET: a run, a GGUF file, or the URL of an OpenAI-compatible server."""
    from forge.stages.asking import chat

    report.result(chat(target, system, context))
