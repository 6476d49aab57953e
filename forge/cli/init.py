from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common, overrides_option


@click.command()
@click.argument("name", default="quickstart")
@click.option("--recipe", "kind", metavar="KIND", help="Which recipe to start from; --list shows them.")
@click.option("-C", "directory", type=click.Path(path_type=Path), default=".", help="Where to write it.")
@click.option("--base", metavar="ID", help="Base to train: hub id, directory or builtin:tiny; with --data.")
@click.option("--data", metavar="ROWS", help="Rows to learn from: file, directory, hub id; with --base.")
@overrides_option
@click.option("--list", "listing", is_flag=True, help="List the kinds of recipe.")
@common
def command(
    name: str,
    kind: str | None,
    base: str | None,
    data: str | None,
    directory: Path,
    overrides: tuple[str, ...],
    listing: bool,
) -> None:
    """Write NAME.yaml, a commented recipe to start from (default: the quickstart).

    With --base and --data it is the recipe that fits both, each choice with its reason; -o sets
    what of the rows is to be used, such as -o data.split=test or -o data.ignore=[tools].
    """
    from forge.commands.init import init, init_for, list_kinds

    if (base is None) != (data is None) or (base and kind):
        raise click.UsageError("--base and --data go together, and without --recipe")
    of_data = [text for text in overrides if text.startswith("data.") and not text.startswith("data.source")]
    if overrides and not (base and of_data == list(overrides)):
        raise click.UsageError("-o sets fields of data, with --base and --data; the rest is in the recipe")
    if base and data:
        report.result(init_for(name, base, data, directory, overrides))
        return
    report.result(list_kinds() if listing else init(name, kind or "quickstart", directory))
