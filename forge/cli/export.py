from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import (
    base_option,
    common,
    merge_base_option,
    optional_recipe,
    overrides_option,
)
from forge.errors import RecipeError


@click.command()
@optional_recipe
@overrides_option
@base_option
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA adapter to merge.")
@click.option("--quant", show_default="q4_k_m", help="Type of the weights.")
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    help="The smallest type within this mean KL divergence (nats) from F16, instead.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Rows (JSONL) to round and measure by; leaves NAME-imatrix.gguf.",
)
@click.option(
    "--mode",
    type=click.Choice(["merged", "adapter", "auto"]),
    default="merged",
    show_default=True,
    help="One model; the base and the adapter as two files; or the second where it can be.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--threads", type=click.IntRange(1), help="Threads; all cores unless told.")
@merge_base_option
@click.option("--keep-merged", is_flag=True, help="Write the merged checkpoint too, beside the file.")
@click.option("--plain", is_flag=True, help="Write the bytes of llama.cpp's own chain; ids are not compared.")
@common
def command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    base: str | None,
    adapter: Path | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Make the GGUF of RECIPE, or of --base (and --adapter) at --out."""
    if recipe is not None:
        from forge.ship.drive import ship_until

        report.result(ship_until(recipe, overrides, "export"))
        return
    if not (base and out):
        raise RecipeError("give a RECIPE, or both --base and --out", hint="see: forge export --help")
    from forge.commands.export import export

    report.result(export(base, adapter, out, **options))
