"""`forge export --gguf IN --quant TYPE --out FILE`: an existing GGUF as another type, or in other parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import report, worker
from forge.codec import to_plain
from forge.errors import DataError, RecipeError
from forge.export.requantize import Requantization, requantize
from forge.files import work_beside
from forge.model.estimate import usable_cores
from forge.model.gguf_header import read_gguf

_OF_A_BASE = ("data", "max_kl", "plain", "keep_merged")


def requantize_file(
    gguf: Path,
    out: Path,
    *,
    imatrix: Path | None,
    adapter: Path | None,
    quant: str | None,
    split_size: int | None,
    **options: Any,
) -> Mapping[str, object]:
    """Write `out`, whole or not at all; gives the fields of `forge export`.

    With `split_size`, and more bytes than that, `OUT-00001-of-0000N.gguf` and its others are written instead.

    Raises `RecipeError` for options of an export from a base, and what `requantize` raises.
    """
    named = [name for name in _OF_A_BASE if options.get(name)]
    if adapter or named or options.get("mode") not in (None, "merged"):
        raise RecipeError(
            "--gguf quantizes a file as it is: options of a base and an adapter do not go with it",
            hint="leave them out, or use --base",
        )
    if out.absolute() == gguf.absolute():
        raise RecipeError("--out is the file that --gguf names", hint="choose another name")
    if imatrix is not None and not imatrix.is_file():
        raise DataError(f"{imatrix}: no such file", hint="--imatrix takes a file of llama-imatrix's")
    read_gguf(gguf)
    with work_beside(out.absolute()) as scratch:
        made = scratch / "model.gguf"
        request = Requantization(
            gguf.absolute(), made, (quant or "q4_k_m").lower(), options.get("threads") or usable_cores(),
            imatrix.absolute() if imatrix else None, split_size,
        )  # fmt: skip
        facts = worker.perform(requantize, request)
        parts = [
            part.replace(out.with_name(out.stem + part.name.removeprefix(made.stem)))
            for part in reversed(facts.parts)
        ]
        if not parts:
            made.replace(out)
    first = parts[-1] if parts else out
    if facts.fallbacks:
        kinds = ", ".join(sorted(set(facts.fallbacks.values())))
        report.warning(
            f"{len(facts.fallbacks)} of {sum(facts.tensor_types.values())} tensors have rows that "
            f"{facts.quant} cannot hold and got another type: {kinds}"
        )
    whole = f"{first} and the other parts ({len(parts)} in all)" if parts else str(first)
    report.success(f"wrote {whole}: {facts.bytes / 1e6:.1f} MB in {facts.seconds:.1f} s")
    files = {"gguf": str(first.absolute()), "parts": [str(part.absolute()) for part in reversed(parts)]}
    return {**to_plain(facts), **files}
