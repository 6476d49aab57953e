"""A llama-server that runs as our child: what it said, and how it ended."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from forge import process
from forge.errors import Problem, StageError
from forge.serve import ready
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.tools.scratch import scratch

# How many of the server's last lines an error shows.
LAST_LINES = 8
_PRIVATE = "serve"
# A socket's path has 104 bytes on macOS, 108 on Linux.
_LONGEST_PLACE = 60
_REASONS = {-9: ", most likely for lack of memory", -4: ": an instruction that this processor lacks"}


class ServerProcess:
    """The child, and what it wrote to its log from byte `begin` on."""

    def __init__(self, child: process.Child, log: IO[str], begin: int) -> None:
        self.child = child
        self.log = log
        self.begin = begin
        self.in_use = True

    def why_gone(self) -> str:
        """For `Endpoint.why_gone`: empty when we ended it ourselves."""
        if not self.in_use or self.child.status is None:
            return ""
        how = f"the server has ended by itself ({self._how_it_ended()}); its last lines:"
        return "\n".join([how, *last_lines(self.said())])

    def not_started(self, settings: ServerSettings) -> StageError:
        """The error for a server that ended before it listened."""
        self.child.wait()
        return not_started(settings, self._how_it_ended(), self.said())

    def _how_it_ended(self) -> str:
        status = self.child.status or 0
        return f"killed by signal {-status}{_REASONS.get(status, '')}" if status < 0 else f"status {status}"

    def said(self) -> list[str]:
        """Its lines so far."""
        # Not `read`: the child shares the file's position.
        size = os.fstat(self.log.fileno()).st_size - self.begin
        text = os.pread(self.log.fileno(), size, self.begin).decode("utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip() and not line.startswith("$ ")]


def last_lines(texts: Sequence[str]) -> list[str]:
    """The last of a server's lines, only the errors if there are any."""
    # llama.cpp writes time, level and place: `0.00.006.790 E llama_model_load: ...`.
    errors = [line for line in texts if line.split(" ")[1:2] == ["E"]]
    return list(errors or texts)[-LAST_LINES:]


def not_started(settings: ServerSettings, how: str, texts: Sequence[str]) -> StageError:
    """The error for a server that did not come up, with its own words."""
    return StageError(
        f"the server did not start with {settings.model} ({how})",
        hint="these are its own last lines; a port in use, too little memory or a model of an "
        "unknown architecture are common reasons",
        problems=[Problem(line) for line in last_lines(texts)],
    )


@contextlib.contextmanager
def started(command: Sequence[str], log: Path | None) -> Iterator[ServerProcess]:
    """Run `command` until the block ends. Its standard error goes to `log`."""
    with contextlib.ExitStack() as stack:
        output: IO[str]
        if log:
            output = stack.enter_context(log.open("a+", encoding="utf-8"))
        else:
            # It has no name, so that not even kill -9 leaves it behind.
            output = stack.enter_context(tempfile.TemporaryFile("a+", encoding="utf-8"))
        begin = output.tell()
        child = stack.enter_context(process.Child(command, log=output, separate_errors=True))
        server = ServerProcess(child, output, begin)
        try:
            yield server
        finally:
            server.in_use = False


def proved(server: ServerProcess, settings: ServerSettings, port: int) -> Endpoint:
    """The endpoint of the front at `port`, once it has answered; raises what `ready.prove` raises."""
    device = ready.device_of(server.said())
    ready.refuse_cpu(settings, device)
    url = ready.url_of(settings.host, port)
    endpoint = Endpoint(url, settings.alias, settings.api_key, why_gone=server.why_gone, device=device)
    ready.prove(endpoint, settings)
    return endpoint


@contextlib.contextmanager
def private_socket() -> Iterator[str]:
    """A path for a socket in a directory that only this user reaches; both are gone after the block."""
    place = Path(tempfile.gettempdir())
    if len(str(place)) > _LONGEST_PLACE:
        place = Path("/tmp")
    with scratch(_PRIVATE, place) as private:
        yield str(private / "server.sock")
