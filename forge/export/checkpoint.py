"""The merged checkpoint without a GGUF, for bases that llama.cpp does not run. Runs in a worker.

Base and adapter merged in one pass, as for a GGUF, with the tokenizer and template that were trained with.
Not covered: a proof of the file; what is proved is the adapter on its base (validate, evaluate).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from forge import report
from forge.adapter.read import read_adapter
from forge.adapter.vocabulary import check_tokenizer, fit
from forge.export.describe import describe
from forge.export.merge import merged_tensors
from forge.export.nf4 import quantized_in_training
from forge.export.reading import settle_reading
from forge.export.request import MergeBase
from forge.export.run import MERGED_DIRECTORY
from forge.export.tensors import one_thread, write_safetensors
from forge.export.write import writing
from forge.model.checkpoint import open_checkpoint, refuse_packed


@dataclass(frozen=True)
class MergeRequest:
    """Write `merged/` into `out`; `chat_template` is the text that was trained with."""

    base: Path
    adapter: Path
    tokenizer: Path
    chat_template: str
    out: Path
    merge_base: MergeBase = "original"
    sampling: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """What was written."""

    tensors: int
    bytes: int
    seconds: float


def merge(request: MergeRequest) -> Merged:
    """Raises `DataError` for an adapter that cannot be merged into this base."""
    started = time.monotonic()
    checkpoint = open_checkpoint(request.base)
    refuse_packed(checkpoint)
    fitted = fit(read_adapter(request.adapter), checkpoint)
    check_tokenizer(fitted, request.tokenizer)
    work = request.out / "work" / MERGED_DIRECTORY
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    describe(request.base, request.tokenizer, request.chat_template, work, fitted, sampling=request.sampling)
    settle_reading(work)
    nf4 = quantized_in_training(request.base, checkpoint) if request.merge_base == "nf4" else ()
    tensors = merged_tensors(fitted, nf4=nf4)
    with writing(work), one_thread():
        write_safetensors(
            work / "model.safetensors", tensors, lambda done, total: report.advance("merge", done, total)
        )
    work.rename(request.out / MERGED_DIRECTORY)
    size = sum(path.stat().st_size for path in (request.out / MERGED_DIRECTORY).iterdir())
    return Merged(len(tensors), size, round(time.monotonic() - started, 2))
