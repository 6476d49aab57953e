"""What a type of GGUF costs and saves on one model: sizes from the shapes of its file, in words. No numpy.

A row of a K-quant is a multiple of 256 values, of q8_0 of 32; llama.cpp gives what does not fit a larger
type, so that on a small model a small type may save next to nothing. Not covered: what a type loses, which
the certificate measures.
"""

from __future__ import annotations

import math

from forge.model.gguf_header import NUMBERS, TYPES, GgufHeader

FINE = "q8_0"
_LITTLE = 0.75
"""A file that is more than this share of q8_0's hardly pays for what it loses."""


def bytes_as(header: GgufHeader, kind: str) -> int:
    """The file's bytes with its matrices in `kind` (Q8_0, F16), those of other rows in F16.

    Vectors and what else is in F32 stay as they are.
    """
    _, block, size = TYPES[NUMBERS[kind]]
    total = min((tensor.start for tensor in header.tensors.values()), default=0)
    for tensor in header.tensors.values():
        values = math.prod(tensor.shape)
        if tensor.type == "F32":
            total += 4 * values
        elif tensor.shape[-1] % block:
            total += 2 * values
        else:
            total += values // block * size
    return total


def cost_of(header: GgufHeader, quant: str) -> str:
    """What the file of type `quant` takes, and what others would."""
    taken = header.path.stat().st_size
    half, fine = bytes_as(header, "F16"), bytes_as(header, FINE.upper())
    if quant in ("f16", "bf16", "f32"):
        return f"{quant}: {_megabytes(taken)}; {FINE} would be {_megabytes(fine)}"
    words = f"{quant}: {_megabytes(taken)}, {taken / half:.0%} of f16's {_megabytes(half)}"
    if quant == FINE:
        return words
    if taken >= fine:
        return f"{words}; {FINE} would be no larger, and loses less"
    words += f"; {FINE} would be {_megabytes(fine - taken)} larger"
    return f"{words}: on this model {quant} saves little" if taken > _LITTLE * fine else words


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
