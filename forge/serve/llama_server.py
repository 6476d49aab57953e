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
from forge.serve.behind import Behind
from forge.serve.endpoint import Endpoint
from forge.serve.options import server_arguments
from forge.serve.runtime import ServerSettings
from forge.serve.server_process import ServerProcess, private_socket, proved, started

PROGRAM = "llama-server"
# What it says once the model is loaded.
_LISTENS = "listening on "
_SECONDS_BETWEEN = 0.05


@contextlib.contextmanager
def serve_llama_server(settings: ServerSettings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF with a llama-server binary until the block ends; see `runtime.Runtime`.

    Call it from the main thread. Raises what `serve_embedded` raises; `MissingToolError` means that
    there is no such program.
    """
    ready.check_settings(settings)
    program = _program(settings)
    with front_server.bound(settings) as listener, private_socket() as socket:
        command = [program, *server_arguments(ready.with_threads(settings)), "--host", socket]
        # The child's standard output has to go somewhere; its log has all that it says.
        with started(["/bin/sh", "-c", 'exec "$0" "$@" >&2', *command], log) as server:
            _await_listening(server, settings)
            with front_server.opened(listener, settings, Behind(socket=socket)) as port:
                yield proved(server, settings, port)


def _program(settings: ServerSettings) -> str:
    program = settings.program or PROGRAM
    if shutil.which(program) is None:
        raise MissingToolError(
            f"there is no program {program}",
            hint="install llama.cpp's llama-server and fix the PATH, or name it with --llama-server FILE",
        )
    return program


def _await_listening(server: ServerProcess, settings: ServerSettings) -> None:
    while True:
        ended = server.child.status is not None
        if any(_LISTENS in line for line in server.said()):
            return
        if ended:
            raise server.not_started(settings)
        time.sleep(_SECONDS_BETWEEN)
