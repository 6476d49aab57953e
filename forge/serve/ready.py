"""What is checked before a model is served, and the proof that it is: the same for every runtime."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

import psutil

from forge import report
from forge.errors import DataError, ForgeError, RecipeError, StageError
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import Settings
from forge.serve.wire import GoneError, Sampling, UnreachableError

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
# A model of many gigabytes on a slow disk.
_SECONDS_TO_LOAD = 1800.0
_SECONDS_BETWEEN = 0.05


def check(settings: Settings) -> None:
    """Raise `DataError` for files that cannot be served so, `RecipeError` for an open door."""
    header = read_gguf(settings.model)
    _check_kind(header, settings)
    limit = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(limit, int) and settings.context_tokens > limit:
        raise DataError(
            f"{settings.model}: a context of {settings.context_tokens} tokens is asked for, "
            f"the model was made for {limit}",
            hint=f"ask for at most {limit}",
        )
    if header.chat_template is None:
        report.warning(f"{settings.model} has no chat template: the server falls back to ChatML")
    _check_door(settings)


def _check_kind(header: GgufHeader, settings: Settings) -> None:
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise DataError(
            f"{settings.model}: a GGUF of type {kind}, not a model", hint="serve the model's own GGUF"
        )
    for path in settings.adapters:
        adapter = read_gguf(path)
        if adapter.metadata.get("general.type") != "adapter":
            raise DataError(f"{path}: a model, not an adapter", hint="--lora takes adapters in GGUF format")
        if adapter.architecture != header.architecture:
            raise DataError(
                f"{path}: an adapter for the architecture {adapter.architecture}, "
                f"the model's is {header.architecture}"
            )


def _check_door(settings: Settings) -> None:
    if settings.api_key or Endpoint(f"http://{in_url(settings.host)}", "").loopback:
        return
    if not settings.without_key:
        raise RecipeError(
            f"on {settings.host} others than this machine could use the server, and there is no API key",
            hint="give it one with --api-key-file, or say --without-key (deploy.without_key: true)",
        )
    report.warning(f"everyone who reaches {settings.host} can use the server: it has no API key")


def in_url(host: str) -> str:
    """`host` as it is written in a URL."""
    return f"[{host}]" if ":" in host else host


def url_of(host: str, port: int | str) -> str:
    """A URL that reaches, from this machine, what listens on `host` (pitfall 57)."""
    return f"http://{in_url(_EVERYWHERE.get(host, host))}:{port}"


def threads_of(settings: Settings) -> int:
    """The physical cores that this process may use: llama.cpp gains nothing from more threads."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return settings.threads or min(physical, allowed)


def device_of(said: Sequence[str]) -> str:
    """Where the model runs, by what llama.cpp said while it loaded."""
    for line in said:
        if (found := _OFFLOADED.search(line)) and int(found[1]):
            return f"GPU: {found[1]} of {found[2]} layers"
    return "CPU"


def refuse_cpu(settings: Settings, device: str) -> None:
    """Raise `RecipeError` when layers on a GPU were asked for and none are there."""
    if settings.gpu_layers and device == "CPU":
        raise RecipeError(
            f"{settings.gpu_layers} layers on the GPU were asked for, but the server runs on the CPU alone",
            hint="leave --gpu-layers out, or serve with a llama-server that was built for your GPU",
        )


def prove(endpoint: Endpoint, settings: Settings) -> None:
    """It is ready when it has answered, and serves the context that was asked for.

    Raises `GoneError` when the server ends meanwhile, `StageError` when it answers no chat.
    """
    with Client(endpoint) as client:
        _await_health(client)
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


def _await_health(client: Client) -> None:
    """Wait until the model is loaded. A port that nothing listens on yet is no failure."""
    deadline = time.monotonic() + _SECONDS_TO_LOAD
    while time.monotonic() < deadline:
        try:
            if client.health():
                return
        except UnreachableError:
            # `GoneError` would say that it has ended.
            pass
        time.sleep(_SECONDS_BETWEEN)
    raise StageError(f"{client.endpoint.url} was not ready in {_SECONDS_TO_LOAD:.0f} seconds")
