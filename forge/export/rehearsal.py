"""An export without weights, before anything is trained. Runs in a worker.

transformers loads the checkpoint without its values; llama.cpp's converter lays the model out, its token
ids are compared, llama.cpp checks every shape and says which type each tensor would get. All of it takes
seconds and reads headers only; then every value is read once, where the weights are here, for one that is
not finite. What cannot be exported is refused before a GPU hour is spent.

Not covered: values that overflow in the file's type, and types that need an importance matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forge import report
from forge.adapter.directory import WEIGHTS_FILE
from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import Fitted, check_tokenizer, fit, is_of_tokens
from forge.errors import DataError, ForgeError, UnexportableError, UnmadeTypeError
from forge.export.describe import describe
from forge.export.merge import base_tensors, merged_tensors
from forge.export.request import ExportRequest, Ingredients
from forge.export.run import lay_out
from forge.export.tensors import INFINITY, one_thread, read_tensor_rows, slabs
from forge.export.types import decide_types
from forge.export.upstream import bytes_of
from forge.model.checkpoint import Checkpoint, open_checkpoint
from forge.model.loading import (
    Loading,
    load_without_values,
    refuse_biases,
    refuse_incomplete,
    refuse_surplus,
    refuse_unlike,
)
from forge.model.safetensors_header import TensorSpec, read_header
from forge.tools.scratch import scratch


@dataclass(frozen=True)
class Header:
    """A tensor of the base, as its file's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RehearsalRequest:
    """The model that is to be exported, called `name` inside.

    `quant` is None where a budget chooses it, `headers` the base's tensors where its weights are not here.
    `rows` are those that training gives the embedding, None for the base's own; without `makes_gguf` only the
    base is looked at.
    """

    model: Ingredients
    name: str
    quant: str | None
    headers: tuple[Header, ...] | None
    trust_remote_code: bool
    makes_gguf: bool = True
    rows: int | None = None


@dataclass(frozen=True)
class Rehearsed:
    """What the GGUF would be: its size and tensors, and how many texts had their token ids compared."""

    gguf_bytes: int
    tensors: int
    ids_compared: int


def rehearse_export(request: RehearsalRequest) -> Rehearsed:
    """Check that this base, with this tokenizer, becomes a GGUF; say how large it would be.

    Raises `DataError` for a base or adapter that is not whole, not finite or has no GGUF form, `CheckError`
    when llama.cpp would read prompts differently.
    """
    rehearsed = _rehearsed(request)
    adapter = request.model.adapter
    specs = list(read_header(adapter / WEIGHTS_FILE).values()) if adapter else []
    if request.headers is None:
        specs += open_checkpoint(request.model.base).tensors.values()
    _refuse_not_finite([spec for spec in specs if spec.dtype in INFINITY])
    return rehearsed


def _rehearsed(request: RehearsalRequest) -> Rehearsed:
    model = request.model
    checkpoint = _checkpoint(model.base, request.headers)
    loading = load_without_values(model.base, checkpoint.tensors, trust_remote_code=request.trust_remote_code)
    refuse_incomplete(loading, str(model.base))
    if not request.makes_gguf:
        return Rehearsed(0, 0, 0)
    refuse_unlike(loading, str(model.base))
    refuse_biases(loading, checkpoint.tensors, str(model.base))
    checkpoint = _with_rows(checkpoint, request.rows)
    fitted = fit(read_adapter(model.adapter), checkpoint) if model.adapter else None
    if fitted:
        check_tokenizer(fitted, model.tokenizer)
    with scratch("header") as place:
        try:
            rehearsed = _laid_out(request, place, checkpoint, fitted)
        except UnmadeTypeError:
            raise
        except UnexportableError as failure:
            raise _refusal(failure, loading, str(model.base)) from failure
    if idle := loading.surplus:
        report.info(f"{len(idle)} tensors of the base are not of {loading.architecture}, such as {idle[0]}")
    return rehearsed


def _refuse_not_finite(specs: Sequence[TensorSpec]) -> None:
    """Training on such a value ends in loss that is not a number, hours later or at once."""
    done, total = 0, sum(spec.bytes for spec in specs)
    for spec in specs:
        width = spec.shape[-1] if spec.shape else 1
        for start, stop in slabs(math.prod(spec.shape[:-1]), width):
            read_tensor_rows(spec, start, stop)
        done += spec.bytes
        report.advance("look at the values", done, total)


def _checkpoint(directory: Path, headers: Sequence[Header] | None) -> Checkpoint:
    if headers is None:
        return open_checkpoint(directory)
    specs = {
        header.name: TensorSpec(header.name, header.dtype, header.shape, directory / "not here", 0, 0)
        for header in headers
    }
    return Checkpoint(directory, specs, ())


def _with_rows(checkpoint: Checkpoint, rows: int | None) -> Checkpoint:
    """The headers as training will leave them where it adds tokens."""
    if rows is None:
        return checkpoint
    specs = {
        name: replace(spec, shape=(rows, *spec.shape[1:])) if is_of_tokens(name) else spec
        for name, spec in checkpoint.tensors.items()
    }
    return Checkpoint(checkpoint.directory, specs, ())


def _laid_out(
    request: RehearsalRequest, place: Path, checkpoint: Checkpoint, fitted: Fitted | None
) -> Rehearsed:
    model = request.model
    description = place / "description"
    description.mkdir()
    describe(model.base, model.tokenizer, model.chat_template, description, fitted, rows=request.rows)
    tensors = merged_tensors(fitted) if fitted else base_tensors(checkpoint)
    quant = request.quant or "f16"
    with one_thread():
        export = ExportRequest(replace(model, adapter=None), place, name=request.name, quant=quant)
        converted, compared = lay_out(description, place, tensors, export, fitted)
    types = decide_types(converted, place / "header.gguf", quant, {})
    size = sum(bytes_of(kind, converted.tensors[name].shape) for name, kind in types.items())
    return Rehearsed(size, len(types), compared.texts)


def _refusal(failure: ForgeError, loading: Loading, where: str) -> DataError:
    """What is wrong with the base, where that is why llama.cpp does not take it."""
    if any(name in failure.message for name in loading.surplus):
        try:
            refuse_surplus(loading, where)
        except DataError as surplus:
            return surplus
    return DataError(
        f"{where} cannot become a GGUF: {failure.message}",
        hint=failure.hint or "train and serve it with transformers or vLLM instead, or choose another base",
    )
