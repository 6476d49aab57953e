"""Slabs quantized while the converter still lays out the model. Runs in a worker.

To read a model's description takes one core some seconds (transformers, the vocabulary, the token ids);
the others quantize meanwhile what will likely be wanted. Which type a tensor gets is not known then: it is
taken for the type that the mixture is named after. The layers' shape with most values comes first, since the
exceptions are embeddings and smaller layers. What turns out otherwise is never used: a wrong guess costs work
on a core that had none, and no byte of the file is other for a right one.

With the compiled kernels nothing is made ahead: they are quick enough that the imports, which share Python's
one lock with this, lost more time than was saved.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge.export.imports import import_converter, without_collection
from forge.export.kernels import choose_kernels, quantize_rows
from forge.export.tensors import LazyTensor, one_thread, slabs
from forge.model.estimate import usable_cores
from forge.model.gguf_header import NUMBERS, TYPES

# Of quantized slabs, which are held until the file is written.
MOST_BYTES = 32 << 20
# Of one shape: a model's embedding and output layer.
_MOST_EMBEDDINGS = 2
_FLOATS = ("F32", "F16", "BF16")
_QUANTIZED = {name for name, block, _ in TYPES.values() if block > 1}


class Ahead:
    """Slabs of tensors by name and bounds, as bytes of one type."""

    def __init__(self, kind: str = "") -> None:
        self.kind = kind
        self.taken = 0
        self._made: dict[tuple[str, int, int], Any] = {}
        self._stopped = threading.Event()

    def take(self, tensor: LazyTensor, start: int, stop: int, stored: str, kind: str) -> Any:
        """The bytes of rows [start, stop) as `kind`, given once; None when they were not made.

        `stored` is the type that the values are rounded to first: here they were not.
        """
        if kind != self.kind or stored not in ("F32", tensor.dtype):
            return None
        made = self._made.pop((tensor.name, start, stop), None)
        self.taken += made is not None
        return made

    def clear(self) -> None:
        """Forget what was not taken."""
        self._made.clear()

    def stop(self) -> None:
        """Make no more."""
        self._stopped.set()

    def fill(self, tensors: Sequence[LazyTensor]) -> None:
        """Quantize `tensors` in order, by ggml's own kernels, until there is enough, or it is stopped."""
        # Whatever fails here fails again when the file is written, and is told then.
        with contextlib.suppress(Exception):
            import numpy as np

            # One stretch of memory: slabs that stay, between others that go, would keep the gaps too.
            memory: Any = np.empty(MOST_BYTES, np.uint8)
            held = 0
            for tensor in tensors:
                for start, stop in slabs(tensor.rows, tensor.width):
                    if self._stopped.is_set():
                        return
                    values = tensor.read(start, stop).float().contiguous().numpy()
                    made = quantize_rows(tensor.name, self.kind, values, {})
                    if held + made.nbytes > len(memory):
                        return
                    kept = memory[held : held + made.nbytes]
                    kept[:] = made
                    self._made[tensor.name, start, stop] = kept
                    held += made.nbytes


@contextlib.contextmanager
def meanwhile(
    tensors: Sequence[LazyTensor], description: Path, converters: Path, settings: Mapping[str, Any]
) -> Iterator[Ahead]:
    """Import what the layout inside takes, and quantize beside that and beside it.

    `settings` are those of `forge.export.run.export`.
    """
    with contextlib.ExitStack() as stack:
        with without_collection():
            stack.enter_context(one_thread())
            ahead = stack.enter_context(_ahead(tensors, converters.parent, settings))
            import_converter(converters, description)
        yield ahead


def _ahead(
    tensors: Sequence[LazyTensor], tools: Path, settings: Mapping[str, Any]
) -> contextlib.AbstractContextManager[Ahead]:
    """Slabs made while the model is laid out, where there is a core for it and nothing to round by.

    Not with compiled kernels, nor of what goes through NF4, a whole tensor's work for its first slab.
    """
    kind = _likely(settings["quant"])
    threads = settings["threads"] or usable_cores()
    if kind is None or threads == 1 or settings.get("importance") or settings.get("merge_base") == "nf4":
        return contextlib.nullcontext(Ahead())
    if choose_kernels(tools, [kind], tell=False):
        return contextlib.nullcontext(Ahead())
    return quantizing_ahead(tensors, kind)


@contextlib.contextmanager
def quantizing_ahead(tensors: Sequence[LazyTensor], kind: str) -> Iterator[Ahead]:
    """Fill an `Ahead` of type `kind` on a thread beside what is done inside; it is ended with it."""
    ahead = Ahead(kind)
    ordered = _by_likelihood(tensors, kind)
    thread = threading.Thread(name="ahead", target=ahead.fill, args=(ordered,), daemon=True)
    thread.start()
    try:
        yield ahead
    finally:
        ahead.stop()
        thread.join()


def _likely(quant: str) -> str | None:
    """The type of most tensors of the mixture `quant`, such as Q4_K of q4_k_m; None where no name tells."""
    name = quant.upper()
    return next((kind for kind in (name, name[:-2]) if kind in _QUANTIZED), None)


def _by_likelihood(tensors: Sequence[LazyTensor], kind: str) -> list[LazyTensor]:
    """The matrices whose rows are whole blocks of `kind`: layers first, by the values in all of a shape."""
    block = TYPES[NUMBERS[kind]][1]
    fitting = [
        tensor
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.width % block == 0 and tensor.dtype in _FLOATS
    ]
    number = Counter(tensor.shape for tensor in fitting)

    def rank(tensor: LazyTensor) -> tuple[bool, int]:
        count = number[tensor.shape]
        return count <= _MOST_EMBEDDINGS, -count * math.prod(tensor.shape)

    return sorted(fitting, key=rank)
