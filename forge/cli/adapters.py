from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import SHARE, base_option, common, named_files
from forge.errors import RecipeError


@click.group()
def command() -> None:
    """Hold several adapters on one base, or merge them with weights into one adapter."""


@command.command(name="list")
@click.argument("adapters", nargs=-1, required=True, metavar="NAME=ADAPTER...", callback=named_files)
@base_option
@common
def list_(adapters: dict[str, Path], base: str | None) -> None:
    """Load the adapters onto --base together, and show what each changes.

    ADAPTER is a directory or a run. Each is switched on, off and taken away, and the model's logits are
    compared with those of the adapter alone and of the base alone: a difference is exit 5.
    """
    from forge.commands.adapters import list_adapters

    report.result(list_adapters(_required(base), adapters))


@command.command(name="merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER=WEIGHT...")
@base_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The directory to write.")
@click.option(
    "--combination",
    type=click.Choice([
        "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
        "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
    ]),
    default="cat",
    show_default=True,
    help="peft's way of merging; cat is the weighted sum exactly.",
)  # fmt: skip
@click.option("--rank", type=click.IntRange(1), help="Of svd: the rank; default: the largest of the ranks.")
@click.option(
    "--density",
    type=SHARE,
    help="Of ties, dare, magnitude_prune: what is kept.",
)
@click.option(
    "--sign", type=click.Choice(["total", "frequency"]), default="total", show_default=True,
    help="Of ties: what the majority is of.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of dare.")
@common
def merge_(adapters: tuple[str, ...], base: str | None, out: Path, **options: Any) -> None:
    """Merge adapters of --base with weights into one adapter, and prove what came out.

    ADAPTER is a directory or a run. peft merges; the adapter that was written is compared with the weighted
    sum of the others' changes, layer by layer. The others stay as they are.
    """
    from forge.commands.adapters import merge_adapters

    report.result(merge_adapters(_required(base), adapters, out, **options))


def _required(base: str | None) -> str:
    if not base:
        raise RecipeError("give the --base that the adapters are for", hint="see: forge adapters --help")
    return base
