"""The embedded runtime: the real llama-server, from the `xllamacpp` wheel, in a child process.

A process of its own because a broken model can abort it, and because it must end with us. Not
covered: adapters beside the model, several models, TLS.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import psutil

from forge import process, report
from forge.errors import DataError, ForgeError, Problem, StageError
from forge.model.gguf_header import read_gguf
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import Settings
from forge.serve.wire import GoneError, Sampling
from forge.tools import xllamacpp

# How many of the server's last lines an error shows.
_LAST_LINES = 8
# From the broken connection to the end of the process that held it.
_SECONDS_TO_DIE = 2.0


@contextlib.contextmanager
def serve_embedded(settings: Settings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF on this machine until the block ends; see `runtime.Runtime`.

    Call it from the main thread. Raises `DataError` for a file that is no whole GGUF model or a
    context larger than the model's, `MissingToolError` where the server cannot run, `StageError`
    with the server's last lines when it does not start, or answers no chat.
    """
    _check_model(settings)
    xllamacpp.check()
    _warn_of_open_door(settings)
    with contextlib.ExitStack() as stack:
        said: IO[str]
        if log:
            said = stack.enter_context(log.open("a+", encoding="utf-8"))
        else:
            # It has no name, so that not even kill -9 leaves it behind.
            said = stack.enter_context(tempfile.TemporaryFile("a+", encoding="utf-8"))
        begin = said.tell()
        command = [sys.executable, "-m", "forge.serve.embedded_server"]
        child = stack.enter_context(process.Child(command, log=said, separate_errors=True))
        server = _Server(child, said, begin)
        child.send(json.dumps(_for_child(settings)) + "\n")
        url = server.address(settings)
        endpoint = Endpoint(url, settings.alias, settings.api_key, why_gone=server.why_gone)
        _prove(endpoint, settings)
        try:
            yield endpoint
        finally:
            server.in_use = False


class _Server:
    """The child, and what it wrote to its log from byte `begin` on."""

    def __init__(self, child: process.Child, log: IO[str], begin: int) -> None:
        self.child = child
        self.log = log
        self.begin = begin
        self.in_use = True

    def address(self, settings: Settings) -> str:
        """Wait until it listens; give a URL that reaches it from this machine."""
        for line in self.child.lines():
            port = json.loads(line)["url"].rpartition(":")[2]
            everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
            return f"http://{_in_url(everywhere.get(settings.host, settings.host))}:{port}"
        self.child.wait()
        raise StageError(
            f"the server did not start with {settings.model} ({self._how_it_ended()})",
            hint="these are its own last lines; a port in use, too little memory or a model of an "
            "unknown architecture are common reasons",
            problems=[Problem(line) for line in self._last_lines()],
        )

    def why_gone(self) -> str:
        """For `Endpoint.why_gone`: empty when we ended it ourselves."""
        deadline = time.monotonic() + _SECONDS_TO_DIE
        while self.in_use and time.monotonic() < deadline:
            if self.child.status is not None:
                how = f"the server has ended by itself ({self._how_it_ended()}); its last lines:"
                return "\n".join([how, *self._last_lines()])
            time.sleep(0.02)
        return ""

    def _how_it_ended(self) -> str:
        status = self.child.status or 0
        reasons = {-9: ", most likely for lack of memory", -4: ": an instruction that this processor lacks"}
        return f"killed by signal {-status}{reasons.get(status, '')}" if status < 0 else f"status {status}"

    def _last_lines(self) -> list[str]:
        """Its last lines, the errors alone if there are any."""
        # Not `read`: the child shares the file's position.
        size = os.fstat(self.log.fileno()).st_size - self.begin
        text = os.pread(self.log.fileno(), size, self.begin).decode("utf-8", errors="replace")
        said = [line for line in text.splitlines() if line.strip() and not line.startswith("$ ")]
        # llama.cpp writes time, level and place: `0.00.006.790 E llama_model_load: ...`.
        errors = [line for line in said if line.split(" ")[1:2] == ["E"]]
        return (errors or said)[-_LAST_LINES:]


def _check_model(settings: Settings) -> None:
    header = read_gguf(settings.model)
    if header.metadata.get("general.type", "model") != "model":
        kind = header.metadata["general.type"]
        raise DataError(
            f"{settings.model}: a GGUF of type {kind}, not a model", hint="serve the model's own GGUF"
        )
    limit = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(limit, int) and settings.context_tokens > limit:
        raise DataError(
            f"{settings.model}: a context of {settings.context_tokens} tokens is asked for, "
            f"the model was made for {limit}",
            hint=f"ask for at most {limit}",
        )
    if header.chat_template is None:
        report.warning(f"{settings.model} has no chat template: the server falls back to ChatML")


def _warn_of_open_door(settings: Settings) -> None:
    if not settings.api_key and not Endpoint(f"http://{_in_url(settings.host)}", "").loopback:
        report.warning(f"everyone who reaches {settings.host} can use the server: give it an API key")


def _for_child(settings: Settings) -> dict[str, object]:
    return {
        **asdict(settings),
        "model": str(settings.model.absolute()),
        "modelfile": None,
        "slots": settings.slots,
        "threads": settings.threads or _cores(),
    }


def _cores() -> int:
    """The physical cores that this process may use: llama.cpp gains nothing from more threads."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return min(physical, allowed)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _prove(endpoint: Endpoint, settings: Settings) -> None:
    """It is ready when it has answered, and serves the context that was asked for."""
    with Client(endpoint) as client:
        try:
            client.chat([{"role": "user", "content": "Hi"}], Sampling(max_tokens=1))
        except GoneError:
            raise
        except ForgeError as failure:
            raise StageError(
                f"the server runs but answers no chat with {settings.model}: {failure.message}",
                hint="is its chat template whole?",
            ) from failure
        given = int(client.properties()["default_generation_settings"]["n_ctx"])
    if given < settings.context_tokens:
        raise StageError(
            f"the server gives each request {given} tokens of context, not {settings.context_tokens}",
            hint="ask for a shorter context or fewer parallel requests",
        )
