"""What the tests of serving share, a plugin: a llama-server binary, adapters, raw HTTP.

`make llama-server` compiles the binary (minutes; see tests/llama_server); it lies beside the
session's other pieces, and a test that needs it fails without.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from forge import process
from forge.serve import ready
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.options import server_arguments
from forge.serve.runtime import ServerSettings
from tests.conftest import SESSION_HOME
from tests.tiny_gguf import REPLY, SPECIAL, WIDTH, write_tiny_gguf

HELLO = [{"role": "user", "content": "Hello"}]
KEY = "open-sesame-1234"


def llama_server() -> Path:
    """The compiled llama-server."""
    program = SESSION_HOME / "llama-server" / "bin" / "llama-server"
    assert program.is_file(), f"{program} is not there; run: make llama-server"
    return program


def listens(url: str) -> bool:
    """Whether anything accepts a connection at `url`."""
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname or "", address.port or 0), timeout=1).close()
    except OSError:
        return False
    return True


def servers_of(pid: int) -> list[psutil.Process]:
    """What `pid` has started, and what those have; not the process that renders templates for it."""
    children = psutil.Process(pid).children(recursive=True)
    return [one for one in children if "forge.chat.render_process" not in one.cmdline()]


def own_servers() -> list[psutil.Process]:
    return servers_of(os.getpid())


def write_adapter(path: Path, *, says: str, architecture: str = "llama", width: int = WIDTH) -> Path:
    """A LoRA adapter for `tiny_gguf`'s model, as a GGUF, which makes it say the single word `says`.

    It adds to the output matrix: after the assistant's header that word is the likeliest, and after
    that word the end of the turn. `says` must be a printable ASCII character. With another `width` it is
    an adapter of another model.
    """
    import gguf
    import numpy as np

    tokens = [*SPECIAL, "\n", *(chr(code) for code in range(32, 127))]
    count = len(tokens) + len(REPLY.split(" "))
    first, word, end = tokens.index("\n"), tokens.index(says), 2
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    a: Any = np.zeros((2, width), np.float32)
    b: Any = np.zeros((count, 2), np.float32)
    a[0, first], b[word, 0] = 50.0, 1.0
    a[1, word], b[end, 1] = 50.0, 1.0
    writer.add_tensor("output.weight.lora_a", a)
    writer.add_tensor("output.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tiny.gguf`, and the adapters `Y.gguf` and `N.gguf` of it, which say so."""
    folder = tmp_path_factory.mktemp("adapters")
    write_tiny_gguf(folder / "tiny.gguf")
    for name in "YN":
        write_adapter(folder / f"{name}.gguf", says=name)
    return folder


@pytest.fixture(scope="module")
def served_adapters(adapter_files: Path) -> Iterator[Endpoint]:
    """The model `base`, and `yes` and `no` over it, for who has the `KEY`; nothing is left of it."""
    settings = ServerSettings(adapter_files / "tiny.gguf", "base", 512, threads=1, api_key=KEY)
    named = {"yes": adapter_files / "Y.gguf", "no": adapter_files / "N.gguf"}
    with serve_embedded(replace(settings, adapters=named)) as endpoint:
        yield endpoint
    assert not listens(endpoint.url)
    assert not own_servers()


@contextlib.contextmanager
def bare_server(settings: ServerSettings) -> Iterator[tuple[Endpoint, psutil.Process]]:
    """llama-server as it is, without a front, on a port of loopback: what nginx has behind it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(llama_server()), *server_arguments(settings), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as private, tempfile.TemporaryFile("w+") as log:
        if settings.api_key:
            key = Path(private) / "key"
            key.write_text(settings.api_key)
            command += ["--api-key-file", str(key)]
        with process.Child(
            ["/bin/sh", "-c", 'exec "$0" "$@" >&2', *command], log=log, separate_errors=True
        ) as child:
            endpoint = Endpoint(f"http://127.0.0.1:{port}", settings.alias, settings.api_key)
            deadline = time.monotonic() + 60
            while not listens(endpoint.url):
                assert child.status is None and time.monotonic() < deadline
                time.sleep(0.05)
            ready.prove(endpoint, settings)
            yield endpoint, psutil.Process(child.pid)
