from __future__ import annotations

from pathlib import Path

import click

from forge import report
from forge.cli.options import common


@click.command()
@click.argument("target")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one."
)
@click.option("--context", type=click.IntRange(64), help="Context of each request, in tokens.")
@click.option("--parallel", type=click.IntRange(1), help="Requests answered at once.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--gpu-layers", type=int, help="Layers on the GPU; -1: all.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="A file with the key that clients must send."
)
@common
def command(
    target: str,
    host: str,
    port: int,
    context: int | None,
    parallel: int | None,
    threads: int | None,
    gpu_layers: int | None,
    api_key_file: Path | None,
) -> None:
    """Serve TARGET, a run or a GGUF file, as an OpenAI-compatible endpoint until Ctrl-C."""
    from forge.stages.alone import serve, settings

    chosen = settings(target, host, port, context, parallel, threads, gpu_layers, api_key_file)
    serve(chosen, ready=report.result)
