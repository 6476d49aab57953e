"""An export without weights, before anything is trained. Runs in a worker.

transformers loads the checkpoint without its values; llama.cpp's converter lays the model out, its token
ids are compared, llama.cpp checks every shape and says which type each tensor would get. All of it takes
seconds and reads headers only: what cannot be exported is refused before a GPU hour is spent.

Not covered: values (an overflow, a row that cannot be rounded), and types that need an importance matrix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import Fitted, check_tokenizer, fit
from forge.errors import DataError, ForgeError, UnexportableError, UnmadeTypeError
from forge.export.describe import describe
from forge.export.merge import base_tensors, merged_tensors
from forge.export.request import ExportRequest, Ingredients
from forge.export.run import lay_out
from forge.export.tensors import one_thread
from forge.export.types import decide
from forge.export.upstream import bytes_of
from forge.model.checkpoint import Checkpoint, open_checkpoint
from forge.model.loading import Loading, load_without_values, refuse_incomplete, refuse_surplus
from forge.model.safetensors_header import TensorSpec


def rehearse(
    base: str,
    adapter: str | None,
    tokenizer: str,
    chat_template: str | None,
    converters: str,
    headers: list[tuple[str, str, list[int]]] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Check that this base, with this tokenizer, becomes a GGUF; say how large it would be.

    `headers` are name, dtype and shape of the base's tensors where its weights are not here. `settings`:
    name, quant (None where a budget chooses it), end_of_turn_id, trust_remote_code. Raises `DataError` for a
    base that is not whole or has no GGUF form, `CheckError` when llama.cpp would read prompts differently.
    """
    directory = Path(base)
    checkpoint = _checkpoint(directory, headers)
    loading = load_without_values(
        directory, checkpoint.tensors, trust_remote_code=settings["trust_remote_code"]
    )
    refuse_incomplete(loading, base)
    found = fit(read_adapter(Path(adapter)), checkpoint) if adapter else None
    if found:
        check_tokenizer(found, Path(tokenizer))
    with tempfile.TemporaryDirectory(prefix="forge-header-") as scratch:
        try:
            facts = _laid_out(
                Path(scratch), directory, Path(tokenizer), chat_template, Path(converters), settings,
                checkpoint, found,
            )  # fmt: skip
        except UnmadeTypeError:
            raise
        except UnexportableError as failure:
            raise _refusal(failure, loading, base) from failure
    if idle := loading.surplus:
        report.info(f"{len(idle)} tensors of the base are not of {loading.architecture}, such as {idle[0]}")
    return facts


def _checkpoint(directory: Path, headers: list[tuple[str, str, list[int]]] | None) -> Checkpoint:
    if headers is None:
        return open_checkpoint(directory)
    specs = {
        name: TensorSpec(name, dtype, tuple(shape), directory / "not here", 0, 0)
        for name, dtype, shape in headers
    }
    return Checkpoint(directory, specs, ())


def _laid_out(
    scratch: Path,
    base: Path,
    tokenizer: Path,
    chat_template: str | None,
    converters: Path,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    fitted: Fitted | None,
) -> dict[str, Any]:
    description = scratch / "description"
    description.mkdir()
    describe(base, tokenizer, chat_template, description, fitted)
    tensors = merged_tensors(fitted) if fitted else base_tensors(checkpoint)
    quant = settings["quant"] or "f16"
    with one_thread():
        model = Ingredients(base, None, tokenizer, chat_template, converters, settings["end_of_turn_id"])
        request = ExportRequest(model, scratch, name=settings["name"], quant=quant)
        converted, compared = lay_out(description, scratch, tensors, request, fitted)
    types = decide(converted, scratch / "header.gguf", quant, {})
    return {
        "gguf_bytes": sum(bytes_of(kind, converted.tensors[name].shape) for name, kind in types.items()),
        "tensors": len(types),
        "ids_compared": compared.texts,
    }


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
