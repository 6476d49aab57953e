"""What the weights of a GGUF are multiplied by, as llama.cpp computes it. Runs in a worker.

llama.cpp reports every operation before and after it; of those that multiply a layer's weight, the
squares of the inputs are summed column by column, as llama-imatrix does (tools/imatrix): the same
products, of an expert only the tokens that came to it, and neither the embedding nor the head. In
float64, and of every token: llama-imatrix leaves out what comes in batches of fewer than 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import DataError, StageError
from forge.export.kernels import ggml
from forge.verify import served

_F32 = 0


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, as far as it is read here; sizes have the row's width first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def squares(path: Path, rows: Sequence[Sequence[int]]) -> Mapping[str, tuple[Any, Any]]:
    """Sums of squares (matrices, width) and counts (matrices,) by weight, over all tokens of `rows`.

    Raises `DataError` for activations that are not finite, `StageError` for another llama.cpp.
    """
    import numpy as np

    watch = _Watch()
    with served.loaded(path, max(map(len, rows)), watch=watch) as model:
        for number, row in enumerate(rows, 1):
            model.read(row)
            if watch.failure:
                raise watch.failure
            report.advance("importance matrix", number, len(rows))
    broken = [name for name, (sums, _) in watch.found.items() if not np.isfinite(sums).all()]
    if broken:
        raise DataError(f"{path}: what comes to {broken[0]} is not finite", hint="the weights are damaged")
    return watch.found


class _Watch:
    """llama.cpp's callback: it is asked which operations matter, then called when they are done."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Any, Any]] = {}
        self.failure: BaseException | None = None
        self._library = ggml()

    def __call__(self, address: int, ask: bool, _: object) -> bool:
        try:
            return self._saw(address, ask)
        except BaseException as failure:  # noqa: BLE001 - ctypes would swallow it, a Ctrl-C too
            self.failure = self.failure or failure
            return False

    def _saw(self, address: int, ask: bool) -> bool:
        tensor = _Tensor.from_address(address)
        if self._library.ggml_get_name(address) != address + _Tensor.name.offset:
            raise StageError(
                "this llama-cpp-python holds tensors in another way than the one that forge was made for",
                hint="install the version that forge names: pip install forge-ship",
            )
        operation = self._library.ggml_op_name(tensor.op)
        if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return False
        weight, source = (_Tensor.from_address(tensor.src[number]) for number in (0, 1))
        name = _name(weight)
        if source.type != _F32 or not name.startswith("blk."):
            return False
        if not ask:
            inputs = self._values(tensor.src[1], "float32")
            if operation == b"MUL_MAT":
                self._add(name, weight, inputs)
            else:
                self._add_experts(name, weight, inputs[0], self._values(tensor.src[2], "int32")[0, 0])
        return True

    def _values(self, address: int, dtype: str) -> Any:
        """A copy of a tensor's values, wherever they are, the width last."""
        import numpy as np

        tensor = _Tensor.from_address(address)
        raw = np.empty(self._library.ggml_nbytes(address), np.uint8)
        self._library.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
        return np.ndarray(tensor.ne[::-1], dtype, raw, strides=tensor.nb[::-1])

    def _of(self, name: str, weight: _Tensor, width: int) -> tuple[Any, Any]:
        import numpy as np

        matrices = weight.ne[2] * weight.ne[3]
        return self.found.setdefault(name, (np.zeros((matrices, width)), np.zeros(matrices)))

    def _add(self, name: str, weight: _Tensor, inputs: Any) -> None:
        """`inputs` (n3, n2, tokens, width): of a weight of several matrices each has its own."""
        import numpy as np

        sums, counts = self._of(name, weight, inputs.shape[-1])
        added = np.square(inputs, dtype=np.float64).sum(axis=2)
        for outer, inner in np.ndindex(added.shape[:2]):
            sums[(outer % weight.ne[3]) * weight.ne[2] + inner % weight.ne[2]] += added[outer, inner]
        counts += inputs[..., 0].size / len(counts)

    def _add_experts(self, name: str, weight: _Tensor, inputs: Any, chosen: Any) -> None:
        """`inputs` (tokens, 1 or chosen ones, width) and the `chosen` experts (tokens, chosen ones)."""
        import numpy as np

        sums, counts = self._of(name, weight, inputs.shape[-1])
        for expert in np.unique(chosen):
            tokens, places = np.nonzero(chosen == expert)
            sums[expert] += np.square(inputs[tokens, places % inputs.shape[1]], dtype=np.float64).sum(axis=0)
            counts[expert] += len(tokens)


def _name(weight: _Tensor) -> str:
    """A weight's name; what the scheduler has copied to another device is `DEVICE#name#part`."""
    name: str = weight.name.decode()
    return name.split("#")[1] if "#" in name else name
