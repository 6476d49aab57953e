from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common, overrides_option
from forge.errors import RecipeError


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@overrides_option
@click.option("--base", help="The base: a directory, a hub id, builtin:tiny.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA adapter to merge.")
@click.option("--quant", default="q4_k_m", show_default=True, help="Type of the weights.")
@click.option("--out", type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--threads", type=click.IntRange(1), help="Threads for quantizing; all cores unless told.")
@common
def command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    base: str | None,
    adapter: Path | None,
    quant: str,
    out: Path | None,
    threads: int | None,
) -> None:
    """Make the GGUF of RECIPE, or of --base (and --adapter) at --out."""
    if recipe is not None:
        from forge.cli.stage_of import run_stage

        report.result(run_stage(recipe, overrides, "export"))
        return
    if not (base and out):
        raise RecipeError("give a RECIPE, or both --base and --out", hint="see: forge export --help")
    from forge.stages.alone import export

    report.result(export(base, adapter, out, quant, threads))
