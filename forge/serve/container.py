"""The container runtime: llama-server in a container that cannot write, published on one port.

The model is mounted read-only. Its port is one of loopback, for the front only, which has a key for
it. Leaving the block removes the container; `kill -9` of forge leaves it running, as docker knows nothing
of us (`docker ps --filter label=forge` shows it). Not covered: images whose entry point is not llama-server.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from forge import process
from forge.errors import RecipeError
from forge.model.gguf_header import read_whole_gguf
from forge.serve import front_server, ready
from forge.serve.behind import Behind
from forge.serve.endpoint import Endpoint
from forge.serve.options import server_arguments
from forge.serve.runtime import ServerSettings
from forge.serve.server_process import last_lines, not_started
from forge.serve.slots import memory_bytes
from forge.serve.wire import GoneError
from forge.tools.containers import Container, Engine, current_name, docker_files, engine
from forge.tools.hosts import DEFAULT_HOST

# The llama.cpp build of docker/server/Dockerfile.
BUILD = "b10868"
IMAGE = f"forge-llama-server:{BUILD}"
CUDA_IMAGE = f"ghcr.io/ggml-org/llama.cpp:server-cuda-{BUILD}"
PORT = 8080
# llama-server has a thread for each connection, up to twice its slots, and those that compute.
MOST_PROCESSES = 1024
_KEY = "/run/secrets/api-key"


@contextlib.contextmanager
def serve_container(settings: ServerSettings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF in a container until the block ends; see `runtime.Runtime`.

    Raises what `serve_embedded` raises; `MissingToolError` means that no daemon answers.
    """
    ready.check_settings(settings)
    # Both may refuse, before an image is built or pulled.
    uses_gpu(settings)
    memory = memory_bytes(settings, read_whole_gguf(settings.model))
    with (
        front_server.bound(settings) as listener,
        engine() as daemon,
        tempfile.TemporaryDirectory(prefix="forge-serve-") as private,
    ):
        image = _image(daemon, settings)
        key = secrets.token_urlsafe(32)
        container = _start(daemon, image, settings, Path(private), key, memory)
        try:
            with front_server.opened(listener, settings, _behind(container, settings, key)) as port:
                yield _proved(container, settings, port)
        finally:
            try:
                if log:
                    with log.open("a", encoding="utf-8") as stream:
                        stream.write("".join(line + "\n" for line in container.said()))
            finally:
                container.remove()


def uses_gpu(settings: ServerSettings) -> bool:
    """Whether the container is given a GPU: an image of CUDA's is, unless no layers are to be there.

    Raises `RecipeError` for layers on a GPU in an image that has no CUDA by its name.
    """
    image = settings.image or IMAGE
    if "cuda" in image:
        return settings.gpu_layers != 0
    if settings.gpu_layers:
        raise RecipeError(
            f"layers on the GPU are asked for, and the image {image} runs on the CPU only",
            hint=f"leave --gpu-layers out, or name one with CUDA: --image {CUDA_IMAGE}",
        )
    return False


def _image(daemon: Engine, settings: ServerSettings) -> str:
    """The image to run, built from the shipped Dockerfile where none was named and there is none yet."""
    if settings.image is None:
        if not daemon.has_image(IMAGE):
            daemon.build(docker_files() / "server", IMAGE)
        return IMAGE
    image = current_name(settings.image)
    if not daemon.has_image(image):
        daemon.pull(image)
    return image


def _start(
    daemon: Engine, image: str, settings: ServerSettings, private: Path, key: str, memory: int
) -> Container:
    model = f"/models/{settings.model.name}"
    adapters = {f"/adapters/{number}.gguf": path for number, path in enumerate(settings.loaded_adapters)}
    mounts = {model: settings.model, **adapters}
    command = server_arguments(ready.with_threads(settings), model=model, adapters=tuple(adapters))
    command += ["--host", "0.0.0.0", "--port", str(PORT)]
    # Only we can enter its directory; the user inside the container, another one, must read the file.
    key_file = private / "api-key"
    key_file.write_text(key + "\n", encoding="utf-8")
    key_file.chmod(0o444)
    mounts[_KEY] = key_file
    command += ["--api-key-file", _KEY]
    return daemon.run(
        image,
        command,
        name=f"forge-{re.sub(r'[^A-Za-z0-9_.-]', '-', settings.alias)}-{os.getpid()}",
        mounts=mounts,
        published=(DEFAULT_HOST, 0),
        port=PORT,
        gpu=uses_gpu(settings),
        environment=process.waiting_policy(os.environ),
        memory=memory,
        processes=MOST_PROCESSES,
    )


def _behind(container: Container, settings: ServerSettings, key: str) -> Behind:
    """The container's port on this machine, and the key that only the front has."""
    port = container.published(PORT)
    if port is None:
        raise not_started(settings, f"status {container.exit_status()}", container.said())
    return Behind(ready.url_of(DEFAULT_HOST, port), key=key)


def _proved(container: Container, settings: ServerSettings, port: int) -> Endpoint:
    url = ready.url_of(settings.host, port)
    try:
        ready.prove(
            Endpoint(url, settings.alias, settings.api_key, why_gone=lambda: _why_gone(container)), settings
        )
    except GoneError:
        raise not_started(settings, f"status {container.exit_status()}", container.said()) from None
    device = ready.device_of(container.said())
    ready.refuse_cpu(settings, device)
    return Endpoint(
        url, settings.alias, settings.api_key, why_gone=lambda: _why_gone(container), device=device,
        container=container.id,
    )  # fmt: skip


def _why_gone(container: Container) -> str:
    status = container.exit_status()
    if status is None:
        return ""
    how = f"the container has ended by itself (status {status}); its last lines:"
    return "\n".join([how, *last_lines(container.said())])
