from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import (
    POSITIVE,
    base_option,
    byte_count,
    common,
    merge_base_option,
    optional_recipe,
    overrides_option,
    refuse_idle,
)
from forge.errors import RecipeError


@click.command()
@optional_recipe
@overrides_option
@base_option
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA adapter to merge.")
@click.option(
    "--gguf", type=click.Path(path_type=Path), help="Quantize this GGUF of full precision, instead of a base."
)
@click.option("--imatrix", type=click.Path(path_type=Path), help="With --gguf: the matrix to round by.")
@click.option("--quant", show_default="q4_k_m", help="Type of the weights; with --gguf, `copy` keeps it.")
@click.option(
    "--split-size",
    metavar="SIZE",
    callback=byte_count,
    help="With --gguf: parts of at most so much, such as 500M or 4G.",
)
@click.option(
    "--max-kl",
    type=POSITIVE,
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
@click.option("--threads", type=click.IntRange(1), help="Threads; default: all cores.")
@merge_base_option
@click.option("--keep-merged", is_flag=True, help="Write the merged checkpoint too, beside the file.")
@click.option("--plain", is_flag=True, help="Write the bytes of llama.cpp's own chain; ids are not compared.")
@common
def command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    base: str | None,
    adapter: Path | None,
    gguf: Path | None,
    imatrix: Path | None,
    split_size: int | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Make the GGUF of RECIPE, or of --base (and --adapter) at --out; or quantize --gguf to --out.

    A GGUF in several parts is named by its first; `--quant copy` joins them, or divides a file.
    """
    refuse_idle(recipe, overrides)
    if recipe is not None:
        from forge.ship.drive import ship_until

        report.result(ship_until(recipe, overrides, "export"))
        return
    if gguf is not None and out is not None and not base:
        from forge.commands.requantize import requantize_file

        report.result(
            requantize_file(gguf, out, imatrix=imatrix, adapter=adapter, split_size=split_size, **options)
        )
        return
    if not (base and out) or gguf or imatrix or split_size:
        raise RecipeError(
            "give a RECIPE, or --out with one of --base and --gguf; --imatrix and --split-size go with it",
            hint="see: forge export --help",
        )
    from forge.commands.export import export

    report.result(export(base, adapter, out, **options))
