from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command("import")
@click.argument("target")
@click.option("--name", required=True, help="The model's name in Ollama; one that is taken is replaced.")
@click.option("--host", help="Ollama's address; default: OLLAMA_HOST, or 127.0.0.1:11434.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A GGUF LoRA adapter for TARGET.")
@common
def command(target: str, name: str, host: str | None, adapter: Path | None) -> None:
    """Import TARGET, a run or a GGUF file, into Ollama over HTTP, and prove its prompts there.

    The server's own prompts are compared with the chat template's for generated conversations, its
    stops and token counts too, and a run's smoke queries are asked, all under a name that nobody uses.
    Only then does the name become the new model's; whatever fails before leaves it as it was.
    """
    from forge.commands.import_ import import_into_ollama

    report.result(import_into_ollama(target, name, host, adapter))
