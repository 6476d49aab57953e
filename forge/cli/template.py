from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--bos", help="The BOS token, where PATH does not tell.")
@click.option("--eos", help="The EOS token, where PATH does not tell.")
@click.option("--check", "modelfile", type=click.Path(path_type=Path), help="A Modelfile to hold against it.")
@common
def command(path: Path, bos: str | None, eos: str | None, modelfile: Path | None) -> None:
    """Turn the chat template of PATH into a Go template for Ollama, proved on generated conversations.

    PATH is a model's directory, a .jinja or a .gguf file. The answer is exact, exact with stated limits,
    or refused with the reason. With --check, somebody's Modelfile is compared instead, and the first
    difference is shown.
    """
    if modelfile is not None:
        from forge.stages.modelfile import check_modelfile

        report.result(check_modelfile(path, modelfile, bos=bos, eos=eos))
        return
    from forge.chat.format_check import NOT_CLAIMED, compile_template, limit_names
    from forge.chat.format_source import read_source
    from forge.chat.hand_over import pinned

    source = read_source(path, bos=bos, eos=eos)
    found = compile_template(source.template, add_bos=source.add_bos)
    limits, given = limit_names(found.limits), pinned(source.template)
    if found.go is None:
        report.warning(f"refused: {found.reason}")
    else:
        report.success(
            f"{found.status}: {found.checked} conversations compared; stops: {', '.join(found.stops)}"
        )
        for limit in limits:
            report.info(f"not claimed: {limit}")
        report.info(f"never claimed: {'; '.join(NOT_CLAIMED)}")
        if given["day"]:
            report.info(f"it writes a date: the text has {given['day']} for good")
        if read := given["variables_read"]:
            report.info(f"it reads {', '.join(read)}: the text has them undefined")
        report.output(found.go)
    report.result(
        {
            "status": found.status,
            "limits": limits,
            "reason": found.reason,
            "go": found.go,
            "stops": list(found.stops),
            "default_system": found.chat.default_system if found.chat else None,
            "conversations_checked": found.checked,
            **given,
            "not_claimed": list(NOT_CLAIMED),
        }
    )
