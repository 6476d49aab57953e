"""The llama-server runtime: a binary on the PATH, or the one given, as a child process.

For a build of one's own: another GPU, a processor without AVX2. Not covered: binaries too old to
know the flags below; such a one says so in its own words.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from forge.errors import MissingToolError
from forge.serve import ready
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import Settings
from forge.serve.server_process import ServerProcess, started

PROGRAM = "llama-server"
# What it says once the model is loaded.
_LISTENS = re.compile(r"listening on https?://\S*:(\d+)")
_SECONDS_BETWEEN = 0.05


@contextlib.contextmanager
def serve_llama_server(settings: Settings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF with a llama-server binary until the block ends; see `runtime.Runtime`.

    Call it from the main thread. Raises what `serve_embedded` raises; `MissingToolError` means that
    there is no such program.
    """
    ready.check(settings)
    program = _program(settings)
    with tempfile.TemporaryDirectory(prefix="forge-serve-") as private:
        command = [program, *arguments(settings), "--host", settings.host, "--port", str(settings.port)]
        if settings.api_key:
            command += ["--api-key-file", str(write_key(Path(private), settings.api_key))]
        # The child's standard output has to go somewhere; its log has all that it says.
        with started(["/bin/sh", "-c", 'exec "$0" "$@" >&2', *command], log) as server:
            url = ready.url_of(settings.host, _port(server, settings))
            device = ready.device_of(server.said())
            ready.refuse_cpu(settings, device)
            endpoint = Endpoint(
                url, settings.alias, settings.api_key, why_gone=server.why_gone, device=device
            )
            ready.prove(endpoint, settings)
            yield endpoint


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
    command += ["--metrics", "--slots", "--jinja", "--offline"]
    command += ["--cors-origins", settings.cors_origins]
    if settings.gpu_layers is not None:
        command += ["--n-gpu-layers", "all" if settings.gpu_layers == -1 else str(settings.gpu_layers)]
    for adapter in adapters:
        command += ["--lora", adapter]
    # Where requests choose, none is on until one asks for it.
    return [*command, "--lora-init-without-apply"] if settings.adapters else command


def write_key(directory: Path, key: str) -> Path:
    """The key in a file that only this user reaches: it must be on no command line."""
    path = directory / "api-key"
    path.write_text(key + "\n", encoding="utf-8")
    return path


def _port(server: ServerProcess, settings: Settings) -> str:
    """Wait until it listens; give the port."""
    while True:
        ended = server.child.status is not None
        for line in server.said():
            if found := _LISTENS.search(line):
                return found[1]
        if ended:
            raise server.not_started(settings)
        time.sleep(_SECONDS_BETWEEN)
