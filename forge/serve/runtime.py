"""What a runtime is: something that serves a GGUF file for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from forge.chat.modelfile import Modelfile
from forge.serve.endpoint import Endpoint
from forge.tools.hosts import DEFAULT_HOST

# With one slot many clients queue (`slots.slots_for` has more). Each slot has its own full context, so a
# long context gets fewer.
_MOST_SLOTS = 4
MOST_CONTEXT_OF_ALL_SLOTS = 32768
# A connection holds a thread of the server for as long as its client takes, and llama-server starts
# further ones too late: it may give two requests to the same idle thread. An idle thread costs nothing.
_FEWEST_HTTP_THREADS = 128


@dataclass(frozen=True)
class ServerSettings:
    """How to serve `model`.

    `alias` is the name that clients see. Port 0 takes a free one. Every one of the `parallel`
    slots (None: chosen by the context) has the whole of `context_tokens`. `threads` None means the
    physical cores that this process may use, `gpu_layers` None as many as fit (-1: all).
    `adapter` is the model's own: a GGUF adapter that is on in every answer. `adapters` are others, by the
    name with which a request asks for one of them instead. `without_key` is the explicit word that lets
    others than this machine in without a key; `cors_origins` says which web pages may ask (none; origins;
    `localhost`; `*`), `allow_hosts` by which further names of hosts the server is asked, and
    `control_routes` opens the routes that change or inspect it: see `serve.front_rules`. `embeddings` makes
    the server answer /v1/embeddings too. `program` is the
    llama-server to run, `image` the container's, where the runtime is that one.
    `modelfile` is what the run's Modelfile.jinja says, for a runtime that takes stops and sampling from one.
    `proof` is for a runtime that keeps a model under its name (Ollama): it is called before the name
    changes, and the name stays as it was when it raises.
    """

    model: Path
    alias: str
    context_tokens: int
    host: str = DEFAULT_HOST
    port: int = 0
    parallel: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    api_key: str | None = field(default=None, repr=False)
    adapter: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    without_key: bool = False
    cors_origins: str = ""
    allow_hosts: tuple[str, ...] = ()
    control_routes: bool = False
    embeddings: bool = False
    program: str | None = None
    image: str | None = None
    modelfile: Modelfile | None = None
    proof: Callable[[Endpoint], object] | None = None

    def to_json(self) -> str:
        """One line that `from_json` reads, the key in it. Not for settings with a `proof`."""
        from pydantic import TypeAdapter

        return TypeAdapter(ServerSettings).dump_json(replace(self, proof=None)).decode()

    @classmethod
    def from_json(cls, text: str) -> ServerSettings:
        """The settings that `to_json` wrote."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)

    @property
    def loaded_adapters(self) -> tuple[Path, ...]:
        """Every adapter that is loaded beside the model, its own first: llama-server's numbers."""
        others = tuple(self.adapters.values())
        return (self.adapter, *others) if self.adapter else others

    @property
    def file_bytes(self) -> int:
        """What the model and its adapters take, on the disk and in memory."""
        return sum(path.stat().st_size for path in (self.model, *self.loaded_adapters))

    @property
    def slots(self) -> int:
        """How many requests it answers at once."""
        return self.parallel or max(1, min(_MOST_SLOTS, MOST_CONTEXT_OF_ALL_SLOTS // self.context_tokens))

    @property
    def http_threads(self) -> int:
        """How many connections it can wait for at once."""
        return max(_FEWEST_HTTP_THREADS, 2 * self.slots)


class Runtime(Protocol):
    """Serve until the block ends; entering it waits until the server really answers.

    What the server says goes to `log`. Leaving the block, by whatever way, leaves no process and no
    port behind. A setting that cannot be honoured is refused with `RecipeError`.
    """

    def __call__(
        self, settings: ServerSettings, *, log: Path | None = None
    ) -> AbstractContextManager[Endpoint]: ...
