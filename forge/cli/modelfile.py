from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common, overrides_option, refuse_idle


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@overrides_option
@click.option("--adapter", help="A GGUF LoRA adapter, for ADAPTER.")
@click.option(
    "--from",
    "library",
    metavar="NAME",
    help="With --adapter: FROM this model of Ollama's, such as phi3:mini.",
)
@click.option("--jinja", is_flag=True, help="Leave TEMPLATE out: the server uses the GGUF's own (0.30).")
@click.option(
    "--guard",
    type=click.Path(path_type=Path),
    metavar="OUT.gguf",
    help="First copy the GGUF file there, with its template pinned.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; else it is shown.")
@common
def command(
    target: Path,
    overrides: tuple[str, ...],
    adapter: str | None,
    library: str | None,
    jinja: bool,
    guard: Path | None,
    out: Path | None,
) -> None:
    """Write the Modelfile of TARGET, a model's directory or GGUF file, or those of a recipe.

    With a Go TEMPLATE where one is proved; else, or with --jinja, with the GGUF's own template. A file of
    others is safer with --guard: its copy keeps the dates, the thinking and the guesses of a server off.
    """
    recipe = target if target.suffix in (".yaml", ".yml") else None
    refuse_idle(recipe, overrides)
    if recipe is not None:
        from forge.ship.drive import ship_until

        report.result(ship_until(recipe, overrides, "modelfile"))
        return
    from forge.commands.modelfile import write_modelfile

    report.result(
        write_modelfile(target, adapter=adapter, jinja=jinja, out=out, guard=guard, library=library)
    )
