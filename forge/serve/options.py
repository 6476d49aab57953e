"""The one table from a server's settings to llama-server: its flags, and the attributes of its library.

Every runtime, the manifests and the bundle read it, so that a setting means the same wherever a
model is served. Not in it: the model's path, the address and the key, which differ by place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from forge.errors import RecipeError
from forge.serve.runtime import ServerSettings

Value = bool | int | str | list[str] | None


@dataclass(frozen=True)
class Option:
    """One setting of llama-server. `value` None leaves it out; a flag of True or False has no value."""

    flag: str
    attributes: tuple[str, ...]
    value: Callable[[ServerSettings], Value]
    # Where the library has another value than the command line.
    library: Callable[[Value], Value] = lambda value: value


OPTIONS: tuple[Option, ...] = (
    Option("--alias", ("model_alias",), lambda s: s.alias, lambda name: [str(name)]),
    # llama-server divides the context among its slots.
    Option("--ctx-size", ("n_ctx",), lambda s: s.context_tokens * s.slots),
    Option("--parallel", ("n_parallel",), lambda s: s.slots),
    Option("--no-kv-unified", ("kv_unified",), lambda s: True, lambda _: False),
    Option("--threads", ("cpuparams.n_threads", "cpuparams_batch.n_threads"), lambda s: s.threads),
    Option("--threads-http", ("n_threads_http",), lambda s: s.http_threads),
    Option("--metrics", ("endpoint_metrics",), lambda s: True),
    Option("--slots", ("endpoint_slots",), lambda s: True),
    Option("--jinja", ("use_jinja",), lambda s: True),
    Option("--offline", ("offline",), lambda s: True),
    # Which pages may ask is the front's affair.
    Option("--cors-origins", ("cors_origins",), lambda s: ""),
    # -1 is all of them to us, as many as fit to llama.cpp; its "all" is -2.
    Option(
        "--n-gpu-layers",
        ("n_gpu_layers",),
        lambda s: "all" if s.gpu_layers == -1 else s.gpu_layers,
        lambda layers: -2 if layers == "all" else layers,
    ),
    Option("--embeddings", ("embedding",), lambda s: s.embeddings or None),
    # The mean of a text's tokens; a chat model says nothing of its own.
    Option("--pooling", ("pooling_type",), lambda s: "mean" if s.embeddings else None, lambda _: 1),
)


def server_arguments(settings: ServerSettings, *, model: str = "", adapters: Sequence[str] = ()) -> list[str]:
    """llama-server's command line, without the program, the address and the key.

    `model` and `adapters` replace the paths, for a server that sees them elsewhere. Raises `RecipeError`
    for an adapter whose path it cannot say.
    """
    command = ["--model", model or str(settings.model.absolute())]
    for option in OPTIONS:
        value = option.value(settings)
        if value is not None:
            command += [option.flag] if value is True else [option.flag, str(value)]
    loaded = adapters or [str(path.absolute()) for path in settings.loaded_adapters]
    for path, scale in zip(loaded, scales(settings), strict=True):
        # llama-server takes a list of either, as a row of CSV; only a pair ends in a colon and a scale.
        _refuse(path, ',"' if scale else ',":')
        command += ["--lora", path] if scale else ["--lora-scaled", f"{path}:0"]
    return command


def scales(settings: ServerSettings) -> list[float]:
    """Of each loaded adapter, for requests that choose none: the model's own is on, the others are not."""
    own = [1.0] if settings.adapter else []
    return own + [0.0] * len(settings.adapters)


def _refuse(path: str, marks: str) -> None:
    if set(path) & set(marks):
        raise RecipeError(
            f"--lora {path}: llama-server takes no such path",
            hint="rename the file or its directory: the path may not contain a colon, comma or double quote",
        )


def attributes(settings: ServerSettings) -> Iterator[tuple[str, Value]]:
    """The same as attributes of xllamacpp's `CommonParams`, by their dotted names."""
    for option in OPTIONS:
        value = option.value(settings)
        if value is not None:
            yield from ((name, option.library(value)) for name in option.attributes)
