"""The embedded runtime: the real llama-server, from the `xllamacpp` wheel, in a child process.

A process of its own because a broken model can abort it, and because it must end with us. Not
covered: several models, TLS.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from forge.serve import front_server, ready
from forge.serve.behind import Behind
from forge.serve.endpoint import Endpoint
from forge.serve.options import attributes, scales
from forge.serve.runtime import ServerSettings
from forge.serve.server_process import private_socket, proved, started
from forge.tools import xllamacpp


@contextlib.contextmanager
def serve_embedded(settings: ServerSettings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF on this machine until the block ends; see `runtime.Runtime`.

    Call it from the main thread. Raises `DataError` for a file that is no whole GGUF model or a
    context larger than the model's, `RecipeError` for an open door or layers on a GPU that is not
    there, `MissingToolError` where the server cannot run, `StageError` with the server's last
    lines when it does not start, or answers no chat.
    """
    ready.check_settings(settings)
    xllamacpp.check_processor()
    with front_server.bound(settings) as listener, private_socket() as socket:
        with started([sys.executable, "-m", "forge.serve.embedded_server"], log) as server:
            server.child.send(json.dumps(_for_child(settings, socket)) + "\n")
            if not next(server.child.lines(), None):
                raise server.not_started(settings)
            with front_server.opened(listener, settings, Behind(socket=socket)) as port:
                yield proved(server, settings, port)


def _for_child(settings: ServerSettings, socket: str) -> dict[str, object]:
    return {
        "model": str(settings.model.absolute()),
        "adapters": [
            (str(path.absolute()), scale)
            for path, scale in zip(settings.loaded_adapters, scales(settings), strict=True)
        ],
        # A file that only we reach: clients come through the front.
        "attributes": [*attributes(ready.with_threads(settings)), ("hostnames", [socket])],
    }
