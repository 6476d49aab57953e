from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("name", default="quickstart")
@click.option("--recipe", "kind", metavar="KIND", help="Which recipe to start from; --list shows them.")
@click.option("-C", "directory", type=click.Path(path_type=Path), default=".", help="Where to write it.")
@click.option("--list", "listing", is_flag=True, help="List the kinds of recipe.")
@common
def command(name: str, kind: str | None, directory: Path, listing: bool) -> None:
    """Write NAME.yaml, a commented recipe to start from (the quickstart, unless told)."""
    from forge.commands.init import init, list_kinds

    report.result(list_kinds() if listing else init(name, kind or "quickstart", directory))
