from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--bos", help="The BOS token, where PATH does not say.")
@click.option("--eos", help="The EOS token, where PATH does not say.")
@click.option("--check", "modelfile", type=click.Path(path_type=Path), help="A Modelfile to hold against it.")
@common
def command(path: Path, bos: str | None, eos: str | None, modelfile: Path | None) -> None:
    """Turn the chat template of PATH into a Go template for Ollama, proved on generated conversations.

    PATH is a model's directory, a .jinja or a .gguf file. The answer is exact, exact with stated limits,
    or refused with the reason. With --check, somebody's Modelfile is compared instead, and the first
    difference is shown.
    """
    if modelfile is not None:
        from forge.commands.modelfile import compare_modelfile

        report.result(compare_modelfile(path, modelfile, bos=bos, eos=eos))
        return
    from forge.commands.template import template

    report.result(template(path, bos=bos, eos=eos))
