"""Is an Ollama server there, and if not, can one be started here for as long as it is needed?

Not covered: installing Ollama; a server of another machine.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from forge import process, report
from forge.errors import MissingToolError, StageError
from forge.tools.hosts import is_loopback
from forge.tools.ollama import Ollama, server_url

_SECONDS_TO_START = 60.0
_SECONDS_TO_HEAR_OUT = 5.0
# It is asked again and again whether a server is still there, and that must hold up nobody.
_TIMEOUT_OF_A_LOOK = httpx.Timeout(5.0)
SECONDS_BETWEEN_LOOKS = 10.0
# A server that is restarted is away for one or two looks.
_LOOKS_THAT_MISS_IT = 3


def check_ollama(url: str | None = None) -> None:
    """Raise `MissingToolError` when no server answers and none can be started here."""
    with Ollama(url or server_url()) as server:
        try:
            server.version()
        except MissingToolError:
            if not _can_start(server.url):
                raise


def _can_start(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "") and shutil.which("ollama") is not None


class _Watch:
    """For `Endpoint.why_gone`: empty while a server is there, however slow, or away only for a restart."""

    def __init__(self, server: Ollama) -> None:
        self._server = server
        self._looked = time.monotonic()
        self._missed = 0

    def __call__(self) -> str:
        """Why it is gone; it looks every 10 seconds, however often it is asked."""
        if time.monotonic() - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._look()
            self._looked = time.monotonic()
        if self._missed < _LOOKS_THAT_MISS_IT:
            return ""
        return f"the Ollama server at {self._server.url} has ended, or cannot be reached any more"

    def _look(self) -> None:
        try:
            self._server.version()
        except MissingToolError:
            self._missed += 1
            return
        except StageError:
            pass  # busy, or just breaking off: the next look shows
        self._missed = 0


@contextlib.contextmanager
def watch(url: str) -> Iterator[Callable[[], str]]:
    """What `Endpoint.why_gone` asks of the server at `url`."""
    with Ollama(url, timeout=_TIMEOUT_OF_A_LOOK) as server:
        yield _Watch(server)


@contextlib.contextmanager
def reach(url: str, *, log: Path | None = None) -> Iterator[Ollama]:
    """A connection to the server at `url`; on this machine it is started for the block if it can be.

    Raises `MissingToolError`, which says how to start one, when there is none and none can be started.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Ollama(url))
        try:
            server.version()
        except MissingToolError:
            if not _can_start(url):
                raise
            place = urlsplit(url).netloc
            report.info(f"starting `ollama serve` at {place} for this command")
            _wait_for(server, stack.enter_context(_started(place, log)))
        yield server


@contextlib.contextmanager
def _started(place: str, log: Path | None) -> Iterator[process.Child]:
    """`ollama serve`; what it says is read all the time, or it would wait for us, and goes to `log`."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("a", encoding="utf-8")) if log else None
        child = stack.enter_context(
            process.Child(["ollama", "serve"], log=output, environment={"OLLAMA_HOST": place})
        )

        def hear() -> None:
            for line in child.lines():
                if output:
                    output.write(f"{line}\n")

        listener = threading.Thread(target=hear, daemon=True, name="ollama-serve")
        listener.start()
        try:
            yield child
        finally:
            child.terminate()
            child.ends_within(process.GRACE_SECONDS)
            child.kill()
            listener.join(_SECONDS_TO_HEAR_OUT)


def _wait_for(server: Ollama, child: process.Child) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            server.version()
            return
        except MissingToolError as silent:
            if child.status is not None or time.monotonic() > deadline:
                raise StageError(
                    f"`ollama serve` was started and does not answer at {server.url}", hint=silent.hint
                ) from silent
            time.sleep(0.2)
