"""`forge modelfile --from NAME`: what a model of Ollama's library is, as far as the server on hand shows it.

Not covered: its weights where only a checkpoint is there to compare with; `forge verify --ollama` measures
those.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx

from forge.chat.modelfile import parse_modelfile
from forge.commands.verify_ollama import unread_because
from forge.errors import DataError, ForgeError
from forge.model.config import read_configuration
from forge.model.gguf_copy import has_weights_of
from forge.model.gguf_header import GgufHeader, read_whole_gguf
from forge.serve.ready import check_kinds
from forge.tools.ollama import Ollama, server_url

_TOKENS = "tokenizer.ggml.tokens"
_TIMEOUT = httpx.Timeout(10.0, connect=2.0)


def doubt_of_library(name: str, target: Path, adapter: Path) -> str | None:
    """Why it is not proved that `name` is `target`, which the adapter was trained on; None where it is.

    Raises `DataError` where it cannot be, or where the adapter does not fit it.
    """
    try:
        blob = _blob_of(name)
    except ForgeError as unknown:
        return unknown.message
    header = read_whole_gguf(blob)
    if adapter.is_file():
        check_kinds(blob, header, [adapter])
    doubt = "its sizes are the same, its weights were not compared"
    if target.is_file():
        own = read_whole_gguf(target)
        differ = list(_unlike(header, own))
        if not differ and has_weights_of(header, own):
            return None
        doubt = f"its weights are not those of {target.name}, or of another type"
    else:
        differ = list(_of_configuration(header, target))
    if differ:
        raise DataError(
            f"{name} is not what the adapter was trained on: {', '.join(differ)}",
            hint=f"take the name of {target} in Ollama's library, or leave --from out",
        )
    return doubt


def _blob_of(name: str) -> Path:
    """The file of `name` in the store of an Ollama that answers here."""
    with Ollama(server_url(), timeout=_TIMEOUT) as server:
        if server.digest(name) is None:
            raise DataError(f"{name} is not in the Ollama at {server.url} (ollama pull {name})")
        blob = parse_modelfile(str(server.show(name).get("modelfile") or "")).base
    if why := unread_because(blob):
        raise DataError(why)
    return Path(blob)


def _unlike(library: GgufHeader, own: GgufHeader) -> Iterator[str]:
    if library.architecture != own.architecture:
        yield f"its architecture is {library.architecture}, not {own.architecture}"
        return
    shapes = {name: tensor.shape for name, tensor in own.tensors.items()}
    others = {name: tensor.shape for name, tensor in library.tensors.items()}
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            yield f"{name} is {_size(others.get(name))}, not {_size(shapes.get(name))}"
            return
    if _TOKENS in own.metadata and library.array(_TOKENS) != own.array(_TOKENS):
        yield "its vocabulary is another"


def _size(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, shape)) if shape else "missing"


def _of_configuration(library: GgufHeader, target: Path) -> Iterator[str]:
    facts = read_configuration(target)
    for key, wanted in (("block_count", facts.layers), ("embedding_length", facts.hidden_size)):
        is_there = library.metadata.get(f"{library.architecture}.{key}")
        if wanted is not None and is_there != wanted:
            yield f"its {key} is {is_there}, not {wanted}"
