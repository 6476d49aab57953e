from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from forge import report
from forge.cli.options import base_option, common, merge_base_option
from forge.errors import RecipeError


@click.command()
@click.argument("gguf", type=click.Path(path_type=Path))
@base_option
@click.option("--adapter", type=click.Path(path_type=Path), help="The LoRA adapter that was merged.")
@merge_base_option
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="The importance matrix (GGUF) that the file was rounded by; iq3_xxs and below need it.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="NAME-repaired.gguf beside it",
    help="The copy to write.",
)
@common
def command(
    gguf: Path,
    base: str | None,
    adapter: Path | None,
    merge_base: Literal["original", "nf4"],
    imatrix: Path | None,
    out: Path | None,
) -> None:
    """Fix in a copy what the metadata of GGUF has wrong: all that needs no new weights.

    Chat template, BOS, EOS and EOT, pre-tokenizer, tokens and their types, the architecture's numbers,
    sampling and licence become those of --base (and --adapter). The copy gets its name once it is
    verified. Exit 5, with nothing written, where the weights are wrong.
    """
    if not base:
        raise RecipeError("give the --base that the file was made from", hint="see: forge repair --help")
    from forge.commands.repair import repair_file
    from forge.commands.verify import Files

    report.result(repair_file(Files(base, gguf, adapter, None, merge_base, None, imatrix), out))
