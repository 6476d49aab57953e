"""The container runtime: llama-server in a container that cannot write, published on one port.

The model is mounted read-only, and the key as a file. Leaving the block removes the container;
`kill -9` of forge leaves it running, as docker knows nothing of us (`docker ps --filter
label=forge` shows it). Not covered: images whose entry point is not llama-server.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from forge.errors import RecipeError
from forge.serve import ready
from forge.serve.endpoint import Endpoint
from forge.serve.llama_server import arguments, write_key
from forge.serve.runtime import Settings
from forge.serve.server_process import last_lines, not_started
from forge.serve.wire import GoneError
from forge.tools.containers import Container, Engine, current_name, docker_files, engine

# The llama.cpp build of docker/server/Dockerfile.
BUILD = "b10868"
IMAGE = f"forge-llama-server:{BUILD}"
CUDA_IMAGE = f"ghcr.io/ggml-org/llama.cpp:server-cuda-{BUILD}"
PORT = 8080
_KEY = "/run/secrets/api-key"


@contextlib.contextmanager
def serve_container(settings: Settings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Serve a GGUF in a container until the block ends; see `runtime.Runtime`.

    Raises what `serve_embedded` raises; `MissingToolError` means that no daemon answers.
    """
    ready.check(settings)
    uses_gpu(settings)  # or refuses, before an image is built or pulled
    with engine() as daemon, tempfile.TemporaryDirectory(prefix="forge-serve-") as private:
        image = _image(daemon, settings)
        container = _start(daemon, image, settings, Path(private))
        try:
            yield _proved(container, settings)
        finally:
            try:
                if log:
                    with log.open("a", encoding="utf-8") as stream:
                        stream.write("".join(line + "\n" for line in container.said()))
            finally:
                container.remove()


def uses_gpu(settings: Settings) -> bool:
    """Whether the container is given a GPU: an image of CUDA's is, unless no layers are to be there.

    Raises `RecipeError` for layers on a GPU in an image that has no CUDA by its name.
    """
    image = settings.image or IMAGE
    if "cuda" in image:
        return settings.gpu_layers != 0
    if settings.gpu_layers:
        raise RecipeError(
            f"layers on the GPU are asked for, and the image {image} runs on the CPU alone",
            hint=f"leave --gpu-layers out, or name one with CUDA: --image {CUDA_IMAGE}",
        )
    return False


def _image(daemon: Engine, settings: Settings) -> str:
    """The image to run, built from the shipped Dockerfile where none was named and there is none yet."""
    if settings.image is None:
        if not daemon.has_image(IMAGE):
            daemon.build(docker_files() / "server", IMAGE)
        return IMAGE
    image = current_name(settings.image)
    if not daemon.has_image(image):
        daemon.pull(image)
    return image


def _start(daemon: Engine, image: str, settings: Settings, private: Path) -> Container:
    model = f"/models/{settings.model.name}"
    adapters = {f"/adapters/{number}.gguf": path for number, path in enumerate(settings.loaded_adapters)}
    mounts = {model: settings.model, **adapters}
    command = arguments(settings, model=model, adapters=tuple(adapters))
    command += ["--host", "0.0.0.0", "--port", str(PORT)]
    if settings.api_key:
        key = write_key(private, settings.api_key)
        # Its directory is ours alone; the user inside the container, another one, must read the file.
        key.chmod(0o444)
        mounts[_KEY] = key
        command += ["--api-key-file", _KEY]
    return daemon.run(
        image,
        command,
        name=f"forge-{re.sub(r'[^A-Za-z0-9_.-]', '-', settings.alias)}-{os.getpid()}",
        mounts=mounts,
        published=(settings.host, settings.port),
        port=PORT,
        gpu=uses_gpu(settings),
    )


def _proved(container: Container, settings: Settings) -> Endpoint:
    port = container.published(PORT)
    if port is None:
        raise not_started(settings, f"status {container.exit_status()}", container.said())
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
