"""What people do with a model after its ship: serve it, and what `--detach` left running."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from forge import report
from forge.errors import RecipeError
from forge.files import small_text
from forge.model.gguf_header import read_gguf
from forge.runs.find import find_model, find_run
from forge.runs.manifest import RunView, read_manifest, read_run_modelfile
from forge.serve import detached
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.serve.runtimes import refuse_foreign, runtime_for
from forge.store.artifacts import open_store
from forge.tools.hosts import DEFAULT_HOST

_DEFAULT_CONTEXT = 4096
# The default address of `forge serve`.
PORT = 8080


@dataclass(frozen=True)
class Wish:
    """What a person asked `forge serve` for; None leaves it to forge, port 0 is any free one."""

    target: str
    runtime: str = "embedded"
    host: str | None = None
    port: int | None = 0
    context: int | None = None
    parallel: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    api_key_file: Path | None = None
    without_key: bool = False
    cors_origins: str = ""
    allow_hosts: tuple[str, ...] = ()
    control_routes: bool = False
    embeddings: bool = False
    program: str | None = None
    image: str | None = None
    lora: Mapping[str, Path] = field(default_factory=dict)


def settings(wish: Wish) -> ServerSettings:
    """How to serve a run or a GGUF file; a run has the name and the context that it was shipped with.

    The default context of a file is min(model's, 4096). Raises `RecipeError` and `DataError`.
    """
    path, adapter = find_model(wish.target)
    header = read_gguf(path)
    most = header.metadata.get(f"{header.architecture}.context_length")
    limit = most if isinstance(most, int) else _DEFAULT_CONTEXT
    run = None if Path(wish.target).is_file() else find_run(wish.target)
    chosen = ServerSettings(
        model=path,
        alias=run.name if run else path.stem,
        context_tokens=wish.context or min(limit, _context_of(run)),
        host=wish.host or DEFAULT_HOST,
        port=_port_of(wish),
        parallel=wish.parallel,
        threads=wish.threads,
        gpu_layers=wish.gpu_layers,
        api_key=read_key(wish.api_key_file),
        adapter=adapter,
        adapters=wish.lora,
        without_key=wish.without_key,
        cors_origins=wish.cors_origins,
        allow_hosts=wish.allow_hosts,
        control_routes=wish.control_routes,
        embeddings=wish.embeddings,
        program=wish.program,
        image=wish.image,
        # Only Ollama takes one; a file that cannot be read is no reason to serve nothing elsewhere.
        modelfile=read_run_modelfile(run) if run and wish.runtime == "ollama" else None,
    )
    refuse_foreign(wish.runtime, chosen)
    if chosen.alias in wish.lora:
        raise RecipeError(f"--lora {chosen.alias}: the model itself has that name", hint="choose another")
    return chosen


def _port_of(wish: Wish) -> int:
    if wish.runtime == "ollama":
        from forge.tools import ollama

        # It listens already: where the host is set on its usual port, else where OLLAMA_HOST says.
        return wish.port or (ollama.PORT if wish.host else 0)
    return PORT if wish.port is None else wish.port


def _context_of(run: Path | None) -> int:
    """max(4096, longest training row + reply), which deploy has written down."""
    facts = read_manifest(run).read_facts() if run else RunView()
    return facts.deploy.context_tokens or max(_DEFAULT_CONTEXT, facts.data.max_length + 256)


def read_key(path: Path | None) -> str | None:
    """The key in a file: one line. Raises `RecipeError`."""
    if path is None:
        return None
    try:
        key = small_text(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--api-key-file: {path}: {getattr(error, 'strerror', 'not text')}") from error
    # llama-server takes a line that begins with # for a comment, and would then ask for no key.
    if not key or len(key.split()) != 1 or key.startswith("#") or not key.isascii():
        raise RecipeError(
            f"--api-key-file: {path} holds no key",
            hint="write the key into it: one line of ASCII, without spaces and not beginning with #",
        )
    return key


def open_runtime(wish: Wish, chosen: ServerSettings, stack: ExitStack) -> Endpoint:
    """Serve what `wish` asks for, with the settings `chosen` for it, until `stack` closes."""
    return stack.enter_context(runtime_for(wish.runtime)(chosen))


def served_directory() -> Path:
    """Where what runs in the background is written down."""
    return open_store(read_only=True).root / "serving"


def serve_in_background(wish: Wish, *, show: bool = False) -> Mapping[str, object]:
    """Serve in the background; returns once it answers, or raises what it ended with."""
    chosen = settings(wish)
    name = chosen.alias
    command = [sys.executable, "-m", "forge", "serve", wish.target, "--runtime", wish.runtime]
    command += ["--handed-over", "--json"]
    fields = detached.detach(served_directory(), name, command, typed=chosen.to_json() + "\n")
    report.success(f"serving {fields['model']} at {fields['endpoint']}/v1; forge stop {name} ends it")
    if show:
        webbrowser.open(str(fields["endpoint"]))
    return fields
