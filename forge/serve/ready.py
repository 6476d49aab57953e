"""What is checked before a model is served, and the proof that it is: the same for every runtime."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from forge import report
from forge.errors import DataError, ForgeError, RecipeError, StageError
from forge.model.estimate import usable_cores
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint, unknown_end
from forge.serve.runtime import ServerSettings
from forge.serve.wire import GoneError, Sampling, UnreachableError
from forge.tools.hosts import in_url, is_loopback, reachable

_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
# A model of many gigabytes on a slow disk.
_SECONDS_TO_LOAD = 1800.0
_SECONDS_BETWEEN = 0.05
# A load under this is nobody's; above it, or where others run right now, this long a look decides.
_BUSY = 0.75
_LOAD = Path("/proc/loadavg")
_SECONDS_TO_LOOK = 0.25


def check_settings(settings: ServerSettings) -> None:
    """Raise `DataError` for files that cannot be served so, `RecipeError` for an open door."""
    check_files(settings)
    check_door(settings.host, has_key=bool(settings.api_key), without_key=settings.without_key)


def check_files(settings: ServerSettings) -> None:
    """Raise `DataError` for files that cannot be served so, whoever serves them."""
    header = read_gguf(settings.model)
    check_kinds(settings.model, header, settings.loaded_adapters)
    limit = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(limit, int) and settings.context_tokens > limit:
        raise DataError(
            f"{settings.model}: a context of {settings.context_tokens} tokens is asked for, "
            f"the model was made for {limit}",
            hint=f"ask for at most {limit}",
        )
    if header.chat_template is None:
        report.warning(f"{settings.model} has no chat template: the server falls back to ChatML")


def check_kinds(model: Path, header: GgufHeader, adapters: Sequence[Path]) -> None:
    """Raise `DataError` where `model` is no model, or one of `adapters` none of its architecture."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise DataError(f"{model}: a GGUF of type {kind}, not a model", hint="give the model's own GGUF")
    for path in adapters:
        adapter = read_gguf(path)
        if adapter.metadata.get("general.type") != "adapter":
            raise DataError(
                f"{path}: a model, not an adapter", hint="convert_lora_to_gguf.py of llama.cpp makes one"
            )
        if adapter.architecture != header.architecture:
            raise DataError(
                f"{path}: an adapter for the architecture {adapter.architecture}, "
                f"the model's is {header.architecture}"
            )
        _check_shapes(path, adapter, header)


def _check_shapes(path: Path, adapter: GgufHeader, model: GgufHeader) -> None:
    """Raise `DataError` where the adapter is of another model of this architecture, as llama.cpp would."""
    for name, factor in adapter.tensors.items():
        base, is_first, _ = name.partition(".lora_a")
        if not is_first:
            continue
        other, target = adapter.tensors.get(f"{base}.lora_b"), model.tensors.get(base)
        if other is None or target is None:
            what = "lora_b is not there" if other is None else "the model has no such tensor"
            raise DataError(f"{path}: {base}: {what}", hint="is it an adapter of this model?")
        # The embedding's factors are the other way round.
        into, out = target.shape[-1], target.shape[-2]
        wanted = (out, into) if base == "token_embd.weight" else (into, out)
        fits = (
            (factor.shape[-2], other.shape[-2])
            if base == "token_embd.weight"
            else (factor.shape[-1], other.shape[-2])
        )
        if fits != wanted or factor.shape[-1 if base == "token_embd.weight" else -2] != other.shape[-1]:
            raise DataError(
                f"{path}: {base} is {out} x {into} in the model, the adapter's factors are "
                f"{' x '.join(map(str, other.shape))} and {' x '.join(map(str, factor.shape))}",
                hint="it was made for another model of this architecture",
            )


def check_door(host: str, *, has_key: bool, without_key: bool) -> None:
    """Raise `RecipeError` where everybody could use the server and nobody said so."""
    if has_key or is_loopback(host):
        return
    if not without_key:
        raise RecipeError(
            f"on {host} others than this machine could use the server, and there is no API key",
            hint="give it one with --api-key-file, or say --without-key (deploy.without_key: true)",
        )
    report.warning(f"everyone who reaches {host} can use the server: it has no API key")


def url_of(host: str, port: int | str) -> str:
    """A URL that reaches, from this machine, what listens on `host`."""
    return f"http://{in_url(reachable(host))}:{port}"


def with_threads(settings: ServerSettings) -> ServerSettings:
    """The settings with the threads that this machine gives now; as they are where somebody chose.

    The physical cores that this process may use, for llama.cpp gains nothing from more, less those that
    others keep busy: threads that wait for each other run as fast as the one that has to share.
    """
    if settings.threads:
        return settings
    cores = min(psutil.cpu_count(logical=False) or os.cpu_count() or 1, usable_cores())
    threads = max(1, cores - _busy_cores(cores))
    if threads < cores:
        report.info(
            f"{cores - threads} of {cores} cores are busy: threads used: {threads}; --threads chooses others"
        )
    return replace(settings, threads=threads)


def _busy_cores(cores: int) -> int:
    """How many cores others keep busy; a look takes time only where there is something to see.

    The last minute's load says nothing yet of what has begun some seconds ago.
    """
    if os.getloadavg()[0] < _BUSY and _others_running() == 0:
        return 0
    shares = psutil.cpu_percent(interval=_SECONDS_TO_LOOK, percpu=True)
    busy = sum(shares) / 100
    # Of a machine with more cores than are ours, only what does not fit beside us.
    return max(0, min(cores, round(busy - (len(shares) - cores))))


def _others_running() -> int:
    """How many threads beside ours run or wait for a core; 0 where the system does not say."""
    try:
        return int(_LOAD.read_text(encoding="ascii").split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


def device_of(lines: Sequence[str]) -> str:
    """Where the model runs, by what llama.cpp said while it loaded."""
    for line in lines:
        if (match := _OFFLOADED.search(line)) and int(match[1]):
            return f"GPU: {match[1]} of {match[2]} layers"
    return "CPU"


def refuse_cpu(settings: ServerSettings, device: str) -> None:
    """Raise `RecipeError` when layers on a GPU were asked for and none are there."""
    if settings.gpu_layers and device == "CPU":
        raise RecipeError(
            f"{settings.gpu_layers} layers on the GPU were asked for, but the server runs on the CPU only",
            hint="leave --gpu-layers out, or serve with a llama-server that was built for your GPU",
        )


def prove(endpoint: Endpoint, settings: ServerSettings) -> None:
    """It is ready when it has answered, and serves the context that was asked for.

    Raises `GoneError` when the server ends meanwhile, `StageError` when it answers no chat.
    """
    _await_health(endpoint)
    prove_answer(endpoint, settings.model, hint="is its chat template whole?")
    with Client(endpoint) as client:
        served = int(client.properties()["default_generation_settings"]["n_ctx"])
    if served < settings.context_tokens:
        raise StageError(
            f"the server gives each request {served} tokens of context, not {settings.context_tokens}",
            hint="ask for a shorter context or fewer parallel requests",
        )


def prove_answer(endpoint: Endpoint, model: Path, *, hint: str) -> None:
    """One tiny chat; raises `GoneError` when the server ends meanwhile, `StageError` when it fails."""
    try:
        with Client(endpoint) as client:
            client.chat([{"role": "user", "content": "Hi"}], Sampling(max_tokens=1))
    except GoneError:
        raise
    except ForgeError as failure:
        raise StageError(
            f"the server runs but answers no chat with {model}: {failure.message}", hint=hint
        ) from failure


def _await_health(endpoint: Endpoint) -> None:
    """Wait until the model is loaded. A port that nothing listens on yet is no failure."""
    deadline = time.monotonic() + _SECONDS_TO_LOAD
    # Otherwise every broken connection would wait for the server's end.
    with Client(replace(endpoint, why_gone=unknown_end)) as client:
        while time.monotonic() < deadline:
            try:
                if client.health():
                    return
            except UnreachableError:
                pass
            if end := endpoint.why_gone():
                raise GoneError(end)
            time.sleep(_SECONDS_BETWEEN)
    raise StageError(f"{endpoint.url} was not ready in {_SECONDS_TO_LOAD:.0f} seconds")
