"""What is measured, refused in time: another model's file, rows that do not fit, a base that is too large."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.data.prepare import PreparedRow
from forge.errors import CheckError, DataError, Problem
from forge.export.importance import weights_in
from forge.export.types import UNQUANTIZED, is_made_by_importance, type_name
from forge.model.config import Configuration, read_json
from forge.model.gguf_header import GgufHeader, LongArray
from forge.model.safetensors_header import TensorSpec
from forge.verify.measurement import FileFacts

# Of mixtures, the one that rounds most: a file that does not say which it is may be any of them.
_COARSEST = {"Q3_K": "q3_k_s", "Q4_K": "q4_k_s", "Q5_K": "q5_k_s"}
_LAYER = re.compile(r"\.\d+\.")


def read_token_rows(path: Path) -> list[PreparedRow]:
    with path.open(encoding="utf-8") as stream:
        rows: list[PreparedRow] = [json.loads(line) for line in stream]
    if not rows:
        raise DataError(f"{path} holds no rows: there is nothing to compare on", hint="give --data rows")
    return rows


def refuse_other_model(header: GgufHeader, facts: Configuration) -> None:
    """The header is enough to recognise a file of another size."""
    names = {"block_count": facts.layers, "embedding_length": facts.hidden_size}
    problems = []
    for key, expected in names.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if expected is not None and isinstance(value, int) and value != expected:
            problems.append(Problem(f"{value} in the file, {expected} in the base", key))
    if problems:
        raise DataError(
            f"{header.path} is another model's: {header.architecture}, not the size of this "
            f"{facts.architecture}",
            hint="give the base that this file was made from",
            problems=problems,
        )


_KINDS = {
    "BPE": ("gpt2",),
    "BPE with bytes": ("llama", "gemma4"),
    "Unigram": ("t5", "llama"),
    "WordPiece": ("bert",),
}
"""llama.cpp's `tokenizer.ggml.model` by the kind of model that a tokenizer.json has."""


def refuse_other_tokenizer(header: GgufHeader, tokenizer: Path) -> None:
    """Raise `CheckError` for a vocabulary that is called another kind's.

    llama.cpp reads it as what it is called, and most others end the process.
    """
    key = "tokenizer.ggml.model"
    stated = read_json(tokenizer / "tokenizer.json").get("model") or {}
    kind = f"{stated.get('type', 'BPE')}{' with bytes' if stated.get('byte_fallback') else ''}"
    known, called = _KINDS.get(kind), header.metadata.get(key)
    if known and called not in known:
        what = "is missing" if called is None else f"is {called}"
        raise CheckError(
            f"convert broke it: the file's {key} {what}, the base's tokenizer is {known[0]}: llama.cpp would "
            "read every text otherwise",
            hint="forge repair puts the base's metadata in its place; or convert it again",
            problems=[Problem(f"{what}, the base's is {known[0]}", key)],
        )


def refuse_other_importance(header: GgufHeader, importance: Path | None) -> None:
    """What llama.cpp makes with an importance matrix only can be compared with that matrix only."""
    if importance is None:
        if is_made_by_importance(header, kind := type_of(header)):
            raise DataError(
                f"llama.cpp makes {kind} files such as {header.path} with an importance matrix only: without "
                "it nothing says how much the type may lose",
                hint="give the one that it was rounded by with --imatrix; "
                "forge export --data leaves it beside the file, a ship in calibration/ of its run",
            )
    elif not header.tensors.keys() & set(weights_in(importance)):
        raise DataError(
            f"{importance} is another model's importance matrix: it knows none of the file's weights",
            hint="give the one that the file was rounded by",
        )


def refuse_long(rows: Sequence[Mapping[str, Any]], facts: Configuration, header: GgufHeader) -> None:
    context = header.metadata.get(f"{header.architecture}.context_length")
    limits = [limit for limit in (facts.max_positions, context) if isinstance(limit, int)]
    limit = min(limits, default=None)
    long = [len(row["input_ids"]) for row in rows if limit and len(row["input_ids"]) > limit]
    if len(long) == len(rows):
        raise DataError(
            f"every row is longer than the context of {limit} tokens (the shortest has {min(long)})",
            hint="give shorter rows with --data",
        )
    if long:
        report.warning(f"{len(long)} of {len(rows)} rows are longer than the context of {limit} tokens: cut")


def refuse_other_vocabulary(rows: Sequence[Mapping[str, Any]], count: int | None) -> None:
    """A file with fewer tokens (`count`) than the rows' ids ask for cannot be run on them."""
    highest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if count is not None and highest >= count:
        raise DataError(
            f"the file is of another vocabulary: it has {count} tokens, the rows have ids up to {highest}",
            hint="give the base that this file was made from; added tokens may have been lost on the way",
        )


def type_of(header: GgufHeader) -> str:
    """The file's type by its own word (`general.file_type`), such as q4_k_m.

    Its tensors' type where it says none that llama.cpp knows, where they are not quantized, or where only its
    word is not: a coarser word would excuse more than the file may lose.
    """
    stated, kind = type_name(header.metadata.get("general.file_type")), type_of_tensors(header)
    return stated if stated and stated not in UNQUANTIZED and kind not in UNQUANTIZED else kind


def type_of_tensors(header: GgufHeader) -> str:
    """The coarsest type of a file whose most frequent tensor type is that of `header`."""
    most = most_frequent(header)
    return _COARSEST.get(most, most.lower())


def most_frequent(header: GgufHeader) -> str:
    """The most frequent tensor type but F32, in which llama.cpp leaves every norm."""
    return next((kind for kind in header.tensor_types if kind != "F32"), "F32")


def file_facts(path: Path, header: GgufHeader) -> FileFacts:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    count = (
        tokens.count if isinstance(tokens, LongArray) else len(tokens) if isinstance(tokens, tuple) else None
    )
    sampling = {
        key: value
        for key, value in header.metadata.items()
        if key.startswith("general.sampling.") and not isinstance(value, LongArray | tuple)
    }
    return FileFacts(
        type=type_of(header),
        says=type_name(header.metadata.get("general.file_type")),
        architecture=header.architecture,
        bytes=path.stat().st_size,
        tensor_types=header.tensor_types,
        vocabulary=count,
        sampling=sampling,
    )


def refuse_too_large(tensors: Mapping[str, TensorSpec], free: int) -> None:
    """Raise `DataError` when not even one layer and the embedding fit into `free` bytes.

    The reference has one decoder layer in float32 while the next is read, or the embedding.
    """
    layers: dict[str, int] = {}
    outside = 0
    for name, spec in tensors.items():
        match = _LAYER.search(name)
        if match:
            layer = name[: match.end()]
            layers[layer] = layers.get(layer, 0) + 4 * spec.numel
        else:
            outside = max(outside, 4 * math.prod(spec.shape))
    needed = 2 * max([outside, *layers.values()])
    if needed > free:
        raise DataError(
            f"the base does not fit even in pieces: its largest takes {needed / 1e9:.1f} GB in float32, "
            f"{free / 1e9:.1f} GB are free",
            hint="verify on a machine with more memory: the GGUF and the base can be carried there",
        )
