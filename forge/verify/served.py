"""A GGUF's logits and greedy tokens, through llama.cpp's own library. Runs in a worker.

The attention cache is float32 and flash attention is off, so that what differs from the reference
is the file and not the runtime. The weights stay in their file (mmap): they are the system's to drop.
`like_server` keeps llama.cpp's own settings instead (a float16 cache, flash attention, repacked weights), by
which a server answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import DataError
from forge.export.types import last_words, listening
from forge.model.estimate import usable_cores
from forge.verify.sample import Sample

_BATCH = 128
_AGAIN = (
    "forge repair writes a copy with the base's metadata, if that is the fault; "
    "a damaged file must be made or downloaded again"
)


Watch = Callable[[int, bool, object], bool]
"""Asked of each operation, by the address of its tensor, whether it matters, and called when it is done."""


class ServedModel:
    """A model loaded from `path`, with the adapter `lora` where one is given, for `context` tokens.

    `watch` sees what it computes; `like_server`: with the settings of llama-server.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        lora: Path | None = None,
        watch: Watch | None = None,
        *,
        like_server: bool = False,
    ) -> None:
        import llama_cpp

        self.path = path
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = like_server  # repacks, that is copies, all weights
        with listening() as printed:
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise DataError(f"{path}: llama.cpp cannot load it: {last_words(printed)}", hint=_AGAIN)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = -(-(context + 1) // 256) * 256
        settings.n_batch = settings.n_ubatch = _BATCH
        settings.n_seq_max = 1
        settings.n_threads = settings.n_threads_batch = usable_cores()
        if not like_server:
            settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
            settings.flash_attn_type = 0
        if watch:
            settings.op_offload = False
            self._watch = settings.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(watch)
        with listening():
            self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise DataError(f"{path}: llama.cpp gives no context of {context} tokens")

        if lora:
            self._add(lora)

    def _add(self, lora: Path) -> None:
        """Load an adapter; it lives as long as its model."""
        import llama_cpp

        with listening() as printed:
            adapter = llama_cpp.llama_adapter_lora_init(self._model, str(lora).encode())
        if not adapter:
            self.close()
            raise DataError(f"{lora}: llama.cpp cannot load this adapter: {last_words(printed)}", hint=_AGAIN)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def close(self) -> None:
        import llama_cpp

        if getattr(self, "_context", None):
            with listening():
                llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def logits(self, sample: Sample, label: str) -> Any:
        """Logits at the sampled positions: float32, (positions, vocabulary), in the sample's order."""
        import numpy as np

        logits: Any = np.empty((len(sample.positions), self.vocabulary_size), dtype=np.float32)
        at = 0
        for number, row in enumerate(sample.rows):
            for values in self._evaluate(row, sample.of_row(number)):
                logits[at] = values
                at += 1
            report.advance(label, number + 1, len(sample.rows))
        if not np.isfinite(logits).all():
            raise DataError(
                f"{self.path}: its logits are not finite (NaN or infinite) after {len(sample.rows)} rows",
                hint=_AGAIN,
            )
        return logits

    def read(self, ids: Sequence[int]) -> None:
        """Compute one row from its beginning, with the logits of every position."""
        for _ in self._evaluate(ids, range(len(ids))):
            pass

    def tokens_per_second(self, ids: Sequence[int]) -> float:
        """How fast `ids` go through one after another, as the tokens of an answer do."""
        self.after(ids[:1])
        started = time.perf_counter()
        for place, token in enumerate(ids[1:], 1):
            self._decode([token], place, {0})
        return (len(ids) - 1) / (time.perf_counter() - started)

    def after(self, ids: Sequence[int]) -> Any:
        """The logits behind the last of `ids`."""
        [values] = [row.copy() for row in self._evaluate(ids, [len(ids) - 1])]
        return values

    def go_on(self, prompt: Sequence[int], values: Any, most: int) -> list[int]:
        """The most likely tokens behind `prompt`, which was read last and left the logits `values`.

        Up to an end of generation, which is included.
        """
        import llama_cpp

        made: list[int] = []
        while True:
            made.append(int(values.argmax()))
            if len(made) == most or llama_cpp.llama_vocab_is_eog(self._vocabulary, made[-1]):
                return made
            self._decode(made[-1:], len(prompt) + len(made) - 1, {0})
            values = self._values(0)

    def _evaluate(self, ids: Sequence[int], wanted: Sequence[int]) -> Iterator[Any]:
        """One row from its beginning; yields the logits of each wanted position, valid until the next."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            inside = [place - start for place in wanted if start <= place < start + len(part)]
            self._decode(part, start, set(inside))
            for place in inside:
                yield self._values(place)

    def _decode(self, ids: Sequence[int], start: int, wanted: set[int]) -> None:
        import llama_cpp

        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = index in wanted
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status:
            raise DataError(f"{self.path}: llama.cpp stopped at token {start} of a row (status {status})")

    def _values(self, place: int) -> Any:
        import llama_cpp
        import numpy as np

        pointer = llama_cpp.llama_get_logits_ith(self._context, place)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape=(self.vocabulary_size,))


@contextlib.contextmanager
def loaded(
    path: Path,
    context: int,
    lora: Path | None = None,
    watch: Watch | None = None,
    *,
    like_server: bool = False,
) -> Iterator[ServedModel]:
    """The model in `path` for as long as the block lasts."""
    model = ServedModel(path, context, lora, watch, like_server=like_server)
    try:
        yield model
    finally:
        model.close()
