from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from forge import report
from forge.cli.options import common, named_files


@click.command()
@click.argument("target")
@click.option(
    "--runtime", default="embedded", show_default=True, help="embedded, llama-server, container or ollama."
)
@click.option("--host", help="Address to listen on, or Ollama's; default: 127.0.0.1, or OLLAMA_HOST.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Default: 8080, or Ollama's own; 0: any free one."
)
@click.option("--context", type=click.IntRange(64), help="Context of each request, in tokens.")
@click.option("--parallel", type=click.IntRange(1), help="Requests answered at once.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--gpu-layers", type=click.IntRange(-1), help="Layers on the GPU; -1: all.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="A file with the key that clients must send."
)
@click.option("--without-key", is_flag=True, help="Let others than this machine in without a key.")
@click.option("--cors", "cors_origins", default="", help="Web pages that may ask: an origin, localhost or *.")
@click.option(
    "--allow-host", "allow_hosts", multiple=True, metavar="NAME",
    help="Another name that the server is asked by; * for any.",
)  # fmt: skip
@click.option("--control-routes", is_flag=True, help="Open /slots, /lora-adapters and what else changes it.")
@click.option("--embeddings", is_flag=True, help="Answer /v1/embeddings too.")
@click.option("--llama-server", "program", help="The llama-server program; default: the one on the PATH.")
@click.option("--image", help="The container's image; default: forge's own.")
@click.option(
    "--lora", multiple=True, callback=named_files, metavar="NAME=FILE",
    help="A GGUF adapter that requests choose by the model's NAME.",
)  # fmt: skip
@click.option("--detach", is_flag=True, help="Leave it running in the background.")
@click.option("--open", "show", is_flag=True, help="Open its web page in a browser.")
@click.option(
    "--print", "kind", type=click.Choice(("compose", "kubernetes")), help="Print a manifest; run nothing."
)
@click.option("--model-url", help="With --print kubernetes: where an init container fetches the model.")
@click.option("--replicas", type=click.IntRange(1), default=1, help="With --print kubernetes: how many.")
@click.option("--handed-over", is_flag=True, hidden=True)
@common
def command(
    detach: bool,
    show: bool,
    handed_over: bool,
    kind: str | None,
    model_url: str | None,
    replicas: int,
    **wish: Any,
) -> None:
    """Serve TARGET, a run or a GGUF file, as an OpenAI-compatible endpoint until Ctrl-C."""
    from forge.commands.serve import serve, show_manifest
    from forge.ship.serving import Wish, serve_in_background

    wanted = Wish(**wish)
    if kind and (detach or show):
        raise click.UsageError("--print runs nothing: leave --detach and --open out")
    if kind:
        show_manifest(kind, wanted, model_url=model_url, replicas=replicas)
    elif model_url or replicas != 1:
        raise click.UsageError("--model-url and --replicas go with --print")
    elif detach:
        report.result(serve_in_background(wanted, show=show))
    else:
        # `--detach` types the settings of the server that it starts: data, and the key on no command line.
        typed = sys.stdin.readline() if handed_over else None
        serve(wanted, on_ready=report.result, show=show, handed_over=typed)
