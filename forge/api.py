"""forge from Python: `import forge`, then `forge.ship("recipe.yaml")`. For scripts and notebooks.

Each function does what the command of its name does, with the same defaults, and gives what that command
prints with `--json`; errors are `ForgeError` and its kinds, with `message`, `hint` and `problems`. Names
that stand in `__all__` are stable; nothing else of the package is.

Not covered: commands that only show something (`forge show`, `runs`, `doctor`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from forge.errors import ForgeError
from forge.serve.client import Client as _Connection
from forge.serve.client import find
from forge.serve.wire import Sampling

if TYPE_CHECKING:
    from forge.recipe.load import Loaded

__all__ = [
    "Client", "ForgeError", "export", "generate", "load", "modelfile", "plan", "serve", "ship", "template",
    "train", "verify",
]  # fmt: skip

AnyPath: TypeAlias = "str | PathLike[str]"
Recipe: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | Loaded"
Fields: TypeAlias = Mapping[str, Any]
"""What the command prints with `--json`."""


def load(recipe: Recipe, overrides: Mapping[str, object] | None = None) -> Loaded:
    """Read and check a recipe: a file, a mapping of the same fields, or one that is loaded already.

    `overrides` are dotted fields (`{"train.epochs": 1}`). Relative paths in a mapping are relative to the
    working directory. Raises `RecipeError` with every problem at once.
    """
    from forge.recipe.load import Loaded, load

    words = [f"{field}={json.dumps(value)}" for field, value in (overrides or {}).items()]
    if isinstance(recipe, Loaded):
        if words:
            raise TypeError("a recipe that is loaded takes no overrides: give them to load()")
        return recipe
    if isinstance(recipe, Mapping):
        return load(Path("recipe"), words, text=json.dumps(recipe))
    return load(Path(recipe), words)


def plan(recipe: Recipe, overrides: Mapping[str, object] | None = None, *, fetch: bool = False) -> Fields:
    """What a ship would run and why, its memory and disk; writes nothing, asks the hub only with `fetch`."""
    from forge.commands.describe import describe_plan
    from forge.ship import drive

    return describe_plan(*drive.plan(load(recipe, overrides), fetch=fetch))


def ship(
    recipe: Recipe,
    overrides: Mapping[str, object] | None = None,
    *,
    from_stage: str | None = None,
    until: str | None = None,
    retrain: bool = False,
    locked: bool = False,
) -> Fields:
    """Run the whole pipeline. Raises `CheckError` where something does not hold, with its certificate."""
    from forge.ship import drive

    return drive.ship(
        load(recipe, overrides), from_stage=from_stage, until=until, retrain=retrain, locked=locked
    )


def train(recipe: Recipe, overrides: Mapping[str, object] | None = None) -> Fields:
    """Run a recipe up to its adapter."""
    from forge.ship import drive

    return drive.ship_until(load(recipe, overrides), (), "train")


def export(
    base: str,
    out: AnyPath,
    *,
    adapter: AnyPath | None = None,
    quant: str | None = None,
    data: AnyPath | None = None,
    max_kl: float | None = None,
    mode: Literal["merged", "adapter", "auto"] = "merged",
) -> Fields:
    """Write the GGUF `out` of a base (a directory, a hub id) and an adapter, in one pass."""
    from forge.commands import export as command

    return command.export(
        base, _path(adapter), Path(out), quant=quant, data=_path(data), max_kl=max_kl, mode=mode
    )


def verify(
    base: str, gguf: AnyPath, *, adapter: AnyPath | None = None, data: AnyPath | None = None
) -> Fields:
    """The certificate of a GGUF: is it this base and adapter? Raises `CheckError` when it is not."""
    from forge.commands import verify as command

    files = command.Files(base, Path(gguf), adapter=_path(adapter))
    return command.certify(files, command.Terms(data=_path(data)))


def template(path: AnyPath, *, bos: str | None = None, eos: str | None = None) -> Fields:
    """The Go template of a chat template (a model's directory, .jinja or .gguf), and what was compared."""
    from forge.commands import template as command

    return command.template(Path(path), bos=bos, eos=eos)


def modelfile(
    target: AnyPath,
    *,
    adapter: AnyPath | None = None,
    jinja: bool = False,
    out: AnyPath | None = None,
    guard: AnyPath | None = None,
) -> Fields:
    """The Modelfile of a model's directory or GGUF file; `jinja`: with the file's own template.

    `guard`: of a copy of the file, written there, whose template is pinned.
    """
    from forge.commands import modelfile as command

    named = str(adapter) if adapter is not None else None
    return command.write_modelfile(
        Path(target), adapter=named, jinja=jinja, out=_path(out), guard=_path(guard)
    )


@contextmanager
def serve(
    target: AnyPath, *, runtime: str = "embedded", context: int | None = None, parallel: int | None = None
) -> Iterator[Client]:
    """Serve a run or a GGUF file on a free port of this machine as long as the block lasts."""
    from forge.ship.serving import Wish, open_runtime, settings

    wish = Wish(str(target), runtime=runtime, context=context, parallel=parallel)
    with ExitStack() as stack:
        endpoint = open_runtime(wish, settings(wish), stack)
        with Client(endpoint.url, model=endpoint.model, api_key=endpoint.api_key) as client:
            yield client


def generate(
    prompts: AnyPath,
    out: AnyPath,
    endpoint: str | Sequence[str],
    *,
    api_key_file: AnyPath | None = None,
    concurrency: int | None = None,
    model: str | None = None,
    **sampling: float | int | None,
) -> Fields:
    """Answer a JSONL file of prompts; started again it goes on where it stopped.

    `sampling` are the fields of the command's options: `max_tokens`, `temperature`, `seed` ...
    """
    from forge.commands import ask

    urls = [endpoint] if isinstance(endpoint, str) else list(endpoint)
    asked = "auto" if concurrency is None else str(concurrency)
    return ask.generate(Path(prompts), Path(out), urls, _path(api_key_file), asked, sampling, model=model)


class Client:
    """A chat client of any OpenAI-compatible server; use it as a context manager, or `close` it.

    Without `model` it asks the first that the server lists.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self.endpoint = find(url, model=model, api_key=api_key)
        self._connection = _Connection(self.endpoint)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._connection.__exit__(None, None, None)

    def chat(self, messages: str | Sequence[Mapping[str, str]], **sampling: float | int | None) -> str:
        """The answer to a question, or to a conversation of `{"role", "content"}`.

        `sampling` are fields such as `max_tokens=64`, `temperature=0`.
        """
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        options: Mapping[str, Any] = sampling
        return self._connection.chat(asked, Sampling(**options)).text

    def stream(
        self, messages: str | Sequence[Mapping[str, str]], **sampling: float | int | None
    ) -> Iterator[str]:
        """The answer piece by piece."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        options: Mapping[str, Any] = sampling
        yield from self._connection.stream_chat(asked, Sampling(**options))


def _path(named: AnyPath | None) -> Path | None:
    return None if named is None else Path(named)
