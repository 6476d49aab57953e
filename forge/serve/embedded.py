"""The embedded runtime: the real llama-server, from the `xllamacpp` wheel, in a child process.

A process of its own because a broken model can abort it, and because it must end with us. Not
covered: several models, TLS.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from forge.serve import ready
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import Settings
from forge.serve.server_process import ServerProcess, started
from forge.tools import xllamacpp


@contextlib.contextmanager
def serve_embedded(settings: Settings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF on this machine until the block ends; see `runtime.Runtime`.

    Call it from the main thread. Raises `DataError` for a file that is no whole GGUF model or a
    context larger than the model's, `RecipeError` for an open door or layers on a GPU that is not
    there, `MissingToolError` where the server cannot run, `StageError` with the server's last
    lines when it does not start, or answers no chat.
    """
    ready.check(settings)
    xllamacpp.check()
    with started([sys.executable, "-m", "forge.serve.embedded_server"], log) as server:
        server.child.send(json.dumps(_for_child(settings)) + "\n")
        url = _address(server, settings)
        device = ready.device_of(server.said())
        ready.refuse_cpu(settings, device)
        endpoint = Endpoint(url, settings.alias, settings.api_key, why_gone=server.why_gone, device=device)
        ready.prove(endpoint, settings)
        yield endpoint


def _address(server: ServerProcess, settings: Settings) -> str:
    """Wait until it listens; give a URL that reaches it from this machine."""
    for line in server.child.lines():
        return ready.url_of(settings.host, json.loads(line)["url"].rpartition(":")[2])
    raise server.not_started(settings)


def _for_child(settings: Settings) -> dict[str, object]:
    return {
        **asdict(settings),
        "model": str(settings.model.absolute()),
        "adapter": None,
        "adapters": [str(path.absolute()) for path in settings.loaded_adapters],
        "switched": bool(settings.adapters),
        "modelfile": None,
        "slots": settings.slots,
        "threads": ready.threads_of(settings),
        "http_threads": settings.http_threads,
    }
