from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("run")
@click.option("--to", required=True, metavar="ORG/NAME", help="The repository; made if there is none.")
@click.option(
    "--what",
    multiple=True,
    type=click.Choice(["adapter", "merged", "gguf"]),
    help="Push this, may be repeated; default: the adapter and the GGUFs.",
)
@click.option("--private", "is_private", is_flag=True, help="Only you and your organisation can read it.")
@click.option("--licence", metavar="ID", help="Publish under this one, where the base's files do not say it.")
@click.option(
    "--sign",
    type=click.Path(path_type=Path),
    metavar="PRIVATE.pem",
    help="Push model.sig, too: the files signed with this key.",
)
@click.option("--dry-run", "is_dry", is_flag=True, help="Show the card and name the files; push nothing.")
@common
def command(run: str, to: str, what: tuple[Any, ...], **options: Any) -> None:
    """Push a RUN's adapter, GGUFs or merged model to a model hub, with a card made from its manifest.

    By the hub's own client and login (HF_TOKEN, or hf auth login), in one commit; started again, what
    arrived is not sent again. What the base's licence forbids to pass on is refused, and so are files that
    were changed since the ship or whose certificate is broken. Rows, log and manifest stay here.
    """
    from forge.commands.push import Push, push

    report.result(push(Push(run, to, what, **options)))
