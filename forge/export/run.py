"""Export: base and adapter become one GGUF in one pass. Runs in a worker.

llama.cpp's converter lays out the model without reading a weight. On that header, a sparse file, the
token ids are compared, llama.cpp loads it and says which type each tensor gets; only then are the
weights read, merged, quantized and written, straight into the file. Everything is written under `out/work`,
and only the finished, read-back file moves to `out`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from forge import report
from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import Fitted, check_tokenizer, fit
from forge.errors import DataError, ForgeError, UnexportableError
from forge.export import pretokenizer, proof
from forge.export.adapter_only import refuse_impure, why_merged, write_adapter
from forge.export.describe import describe, own_conversations, template_in
from forge.export.importance import read_importance
from forge.export.kernels import choose_kernels
from forge.export.merge import base_tensors, merged_tensors
from forge.export.nf4 import quantized_in_training
from forge.export.reading import misreading, settle_reading
from forge.export.request import Exported, ExportRequest, Ingredients, Mode
from forge.export.tensors import LazyTensor, one_thread, write_safetensors
from forge.export.types import (
    UNQUANTIZED,
    decide_types,
    fallbacks,
    file_type,
    refuse_unloadable,
    write_sparse,
)
from forge.export.upstream import Choices, Converted, Metadata, convert, without_collection
from forge.export.write import Rounding, write_gguf, writing
from forge.model.checkpoint import Checkpoint, open_checkpoint, refuse_packed
from forge.model.config import read_json, rope_types
from forge.model.estimate import usable_cores
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.model.loading import load_without_values, refuse_incomplete, refuse_surplus
from forge.model.memory import peak_memory
from forge.model.tokenizer_files import read_tokenizer

GGUF_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"
HEADER = "header.gguf"
MERGED_DIRECTORY = "merged"
_WHOLE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def export_gguf(request: ExportRequest) -> Exported:
    """Write `model.gguf` into the request's directory and return what is in it.

    Raises `DataError` for an adapter or base that cannot be merged, `CheckError` when llama.cpp would read
    prompts differently, `StageError` otherwise.
    """
    started = time.monotonic()
    model, work = request.model, request.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    description = work / "description"
    description.mkdir(parents=True)
    checkpoint, fitted = _open(model)
    try:
        describe(
            model.base, model.tokenizer, model.chat_template, description, fitted, sampling=model.sampling
        )
        mode, reasons = _mode(request.mode, fitted)
        # Matched against the base in either mode: an adapter that fits nothing is refused here.
        nf4 = quantized_in_training(model.base, checkpoint) if model.merge_base == "nf4" else ()
        merged = merged_tensors(fitted, nf4=nf4) if fitted else base_tensors(checkpoint, nf4=nf4)
        tensors = merged if mode == "merged" else base_tensors(checkpoint, nf4=nf4)
        with without_collection(), one_thread():
            converted, compared = lay_out(description, work, tensors, request, fitted)
            misread = misreading(description)
    except (DataError, UnexportableError) as failure:
        blame_base(failure, checkpoint)
        raise
    with one_thread():
        written, compiled = _write(converted, work, description, merged, request)
    if mode == "adapter" and fitted:
        written += write_adapter(model.converters, description, fitted.adapter, request.name, work)
    header = _publish(work, request.out)
    quant, size = request.quant, (request.out / GGUF_FILE).stat().st_size
    return Exported(
        architecture=header.architecture,
        quant=quant,
        bytes=size,
        tensor_types=header.tensor_types,
        fallbacks=_fallbacks(header, converted, quant),
        bits_per_weight=round(8 * size / sum(math.prod(item.shape) for item in header.tensors.values()), 2),
        mode=mode,
        merged_because=reasons,
        bytes_written=written,
        compiled_kernels=tuple(compiled),
        ids_compared=compared.texts,
        ids_limits=tuple(compared.limits),
        misread=misread,
        pre_tokenizer=pre if isinstance(pre := header.metadata.get("tokenizer.ggml.pre"), str) else None,
        peak_rss_bytes=peak_memory(),
        seconds=round(time.monotonic() - started, 2),
    )


def blame_base(failure: ForgeError, checkpoint: Checkpoint) -> None:
    """Raise `DataError` where the base is at fault for `failure`: it is not whole, or holds too much.

    Asked after a failure only: importing transformers' model takes seconds.
    """
    where = str(checkpoint.directory)
    loading = load_without_values(checkpoint.directory, checkpoint.tensors)
    refuse_incomplete(loading, where)
    if any(name in failure.message for name in loading.surplus):
        refuse_surplus(loading, where)


def _open(model: Ingredients) -> tuple[Checkpoint, Fitted | None]:
    checkpoint = open_checkpoint(model.base)
    refuse_packed(checkpoint)
    if model.adapter is None:
        return checkpoint, None
    fitted = fit(read_adapter(model.adapter), checkpoint)
    check_tokenizer(fitted, model.tokenizer)
    return checkpoint, fitted


def _publish(work: Path, target: Path) -> GgufHeader:
    """Read the GGUF back, and give what was made its names: the GGUF last."""
    header = read_gguf(work / GGUF_FILE)
    for made in (ADAPTER_FILE, MERGED_DIRECTORY, GGUF_FILE):
        if (work / made).exists():
            (work / made).rename(target / made)
    shutil.rmtree(work)
    return header


def _mode(asked: Mode, fitted: Fitted | None) -> tuple[Mode, tuple[str, ...]]:
    """merged or adapter, and why it is merged where it was to be an adapter (N4, pitfall 52)."""
    if asked == "merged" or (fitted is None and asked == "auto"):
        return "merged", ()
    if fitted is None:
        raise DataError("there is no adapter to export as a file of its own", hint="use mode merged")
    reasons = why_merged(fitted)
    if asked == "adapter":
        refuse_impure(reasons)
    if reasons:
        report.info(f"merged, since {'; '.join(reasons)}")
    return ("merged" if reasons else "adapter"), reasons


def lay_out(
    description: Path,
    work: Path,
    tensors: Sequence[LazyTensor],
    request: ExportRequest,
    fitted: Fitted | None,
) -> tuple[Converted, proof.ComparedIds]:
    """What the converter makes of the model, once its vocabulary is proved and llama.cpp loads it."""
    apart = bool(fitted and fitted.untied)
    if apart:
        report.info("embedding and output layer were trained apart, which the base ties: both are written")
    template = template_in(description)
    tried = proof.cases(template, proof.test_strings(), own_conversations(request.data))
    if request.plain:
        name, choices = request.name, None
    else:
        name, choices = _choose(description, None if template is None else tried, request)
    report.advance("convert", 0, 1)
    converted = convert(
        request.model.converters,
        description,
        tensors,
        outtype=_outtype(tensors, request.quant),
        name=name,
        choices=choices,
        apart=apart,
    )
    report.advance("convert", 1, 1)
    _refuse_lost_rotation(description, converted)
    sparse = work / HEADER
    with writing(work):
        write_sparse(converted, sparse)
    if choices is None:
        report.warning("plain: the vocabulary is the converter's own, its token ids were not compared")
        compared = proof.ComparedIds(0, ())
    else:
        report.detail(f"comparing token ids of {len(tried)} texts")
        compared = proof.compare_ids(description, sparse, tried, end_of_turn=choices.end_of_turn)
    refuse_unloadable(sparse)
    return converted, compared


# What the converter writes of each kind of rotary scaling: a tensor, or a field by its end. `dynamic` is the
# default up to the length that the model was trained on, which is the file's.
_ROTATIONS = {
    "linear": ".rope.scaling.type",
    "yarn": ".rope.scaling.type",
    "longrope": "rope_factors_long.weight",
    "llama3": "rope_freqs.weight",
    "proportional": "rope_freqs.weight",
}


def _refuse_lost_rotation(description: Path, converted: Converted) -> None:
    """Raise `UnexportableError` for a scaling of positions that the converter of this family leaves out.

    Most converters know some kinds and pass over the others, with a line in the log at most.
    """
    written = [*converted.tensors, *converted.metadata]
    for kind in rope_types(read_json(description / "config.json")):
        wanted = _ROTATIONS.get(kind)
        if wanted and not any(name.endswith(wanted) for name in written):
            raise UnexportableError(
                f"config.json asks for rope_type {kind}, and llama.cpp's converter of this family writes "
                "nothing of it: the file would place tokens otherwise than the model that was trained",
                hint="choose another base, or export: none",
            )


def _choose(
    description: Path, rendered: Sequence[proof.Case] | None, request: ExportRequest
) -> tuple[str, Choices]:
    """The model's name as llama.cpp may have it, and what forge decides of the vocabulary.

    `rendered` are prompts by the chat template, if there is one.
    """
    stated = pretokenizer.read_stated(description)
    bos = read_tokenizer(description).tokens.get("bos")
    begins = bool(bos and rendered and rendered[0].text.startswith(bos))
    return pretokenizer.model_name(stated, request.name), Choices(
        pre_tokenizer=pretokenizer.pretokenizer_of(stated),
        adds_bos=None if rendered is None else begins,
        space_prefix=pretokenizer.space_prefix(stated),
        end_of_turn=request.model.end_of_turn_id,
    )


def _outtype(tensors: Sequence[LazyTensor], quant: str) -> str:
    """What the converter is asked for: the file's own type, else the type of the checkpoint's weights.

    Quantizing starts from the values as they are: float32 where anything is merged or types differ.
    """
    if quant in UNQUANTIZED:
        return quant
    dtypes = {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}
    return _WHOLE.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"


def _write(
    converted: Converted,
    work: Path,
    description: Path,
    merged: Sequence[LazyTensor],
    request: ExportRequest,
) -> tuple[int, list[str]]:
    """The merged checkpoint if it is wanted, then the GGUF.

    Returns the bytes of all that was written, and the types that compiled kernels quantized.
    """
    quant, sparse = request.quant, work / HEADER
    importance = read_importance(request.importance) if request.importance else {}
    types = decide_types(converted, sparse, quant, importance)
    written = sparse.stat().st_blocks * 512
    sparse.unlink()
    if request.keep_merged:
        kept = work / MERGED_DIRECTORY
        with writing(work):
            shutil.copytree(description, kept)
            settle_reading(kept, own_conversations(request.data))
            write_safetensors(
                kept / "model.safetensors", merged, lambda done, all: report.advance("merge", done, all)
            )
        written += sum(path.stat().st_size for path in kept.iterdir())
    kernels = choose_kernels(request.model.converters.parent, types.values())
    written += write_gguf(
        converted,
        work / GGUF_FILE,
        _metadata(converted, quant),
        types,
        Rounding(kernels, importance),
        request.threads or usable_cores(),
        lambda done, total: report.advance("export", done, total),
    )
    return written, list(kernels)


def _metadata(converted: Converted, quant: str) -> Metadata:
    """As llama_model_quantize leaves it: the same values, with those of the new type at the end."""
    metadata = dict(converted.metadata)
    if quant not in UNQUANTIZED:
        version, kind = metadata.pop("general.quantization_version"), metadata.pop("general.file_type")
        kind.value = file_type(quant)
        metadata |= {"general.quantization_version": version, "general.file_type": kind}
    return metadata


def _fallbacks(header: GgufHeader, converted: Converted, quant: str) -> Mapping[str, str]:
    """The tensors that got another type than was asked for, with a warning that names those types."""
    fell_back = fallbacks({name: tensor.type for name, tensor in header.tensors.items()}, converted, quant)
    if fell_back:
        report.warning(
            f"{len(fell_back)} of {len(header.tensors)} tensors have rows that {quant} cannot hold "
            f"and got another type: {', '.join(sorted(set(fell_back.values())))}"
        )
    return fell_back
