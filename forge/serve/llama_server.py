"""The llama-server runtime: a binary on the PATH, or the one given, as a child process.

For a build of one's own: another GPU, a processor without AVX2. Not covered: binaries too old to
know the flags below; such a one says so in its own words.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from forge.errors import MissingToolError
from forge.serve import front_server, ready
from forge.serve.endpoint import Endpoint
from forge.serve.front import Behind
from forge.serve.runtime import Settings
from forge.serve.server_process import ServerProcess, private_socket, proved, started

PROGRAM = "llama-server"
# What it says once the model is loaded.
_LISTENS = "listening on "
_SECONDS_BETWEEN = 0.05


@contextlib.contextmanager
def serve_llama_server(settings: Settings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF with a llama-server binary until the block ends; see `runtime.Runtime`.

    Call it from the main thread. Raises what `serve_embedded` raises; `MissingToolError` means that
    there is no such program.
    """
    ready.check(settings)
    program = _program(settings)
    with front_server.bound(settings) as listener, private_socket() as socket:
        command = [program, *arguments(settings), "--host", socket]
        # The child's standard output has to go somewhere; its log has all that it says.
        with started(["/bin/sh", "-c", 'exec "$0" "$@" >&2', *command], log) as server:
            _await_listening(server, settings)
            with front_server.opened(listener, settings, Behind(socket=socket)) as port:
                yield proved(server, settings, port)


def _program(settings: Settings) -> str:
    program = settings.program or PROGRAM
    if shutil.which(program) is None:
        raise MissingToolError(
            f"there is no program {program}",
            hint="install llama.cpp's llama-server and mend the PATH, or name it with --llama-server FILE",
        )
    return program


def arguments(settings: Settings, *, model: str = "", adapters: tuple[str, ...] = ()) -> list[str]:
    """llama-server's command line, without the program, the address and the key.

    `model` and `adapters` replace the paths, for a server that sees them elsewhere.
    """
    model = model or str(settings.model.absolute())
    adapters = adapters or tuple(str(path.absolute()) for path in settings.loaded_adapters)
    # llama-server divides the context among its slots.
    context = settings.context_tokens * settings.slots
    command = ["--model", model, "--alias", settings.alias, "--ctx-size", str(context)]
    command += ["--parallel", str(settings.slots), "--no-kv-unified", "--threads"]
    command += [str(ready.threads_of(settings)), "--threads-http", str(settings.http_threads)]
    command += ["--metrics", "--slots", "--jinja", "--offline", "--cors-origins", ""]
    if settings.gpu_layers is not None:
        command += ["--n-gpu-layers", "all" if settings.gpu_layers == -1 else str(settings.gpu_layers)]
    for adapter in adapters:
        command += ["--lora", adapter]
    # Where requests choose, none is on until one asks for it.
    return [*command, "--lora-init-without-apply"] if settings.adapters else command


def _await_listening(server: ServerProcess, settings: Settings) -> None:
    while True:
        ended = server.child.status is not None
        if any(_LISTENS in line for line in server.said()):
            return
        if ended:
            raise server.not_started(settings)
        time.sleep(_SECONDS_BETWEEN)
