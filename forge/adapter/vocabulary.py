"""An adapter with a vocabulary of its own: embeddings of other rows than the base's.

Who adds tokens calls `resize_token_embeddings`; peft then saves the whole embedding and the output layer
beside the factors (`save_embedding_layers`, `modules_to_save`), or beside the rows of those tokens
(`trainable_token_indices`). The tuned model has as many rows as they have, and the tokenizer is the
adapter's own.

Not covered, and refused where it is merged: two tensors in the place of one that the base ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from forge.adapter.read import EMBEDDINGS, Adapter, find_base_tensor, read_adapter
from forge.errors import DataError
from forge.model.checkpoint import open_checkpoint
from forge.model.safetensors_header import TensorSpec
from forge.model.tokenizer_files import read_tokenizer

HEADS = ("lm_head", "embed_out")
"""What families call the output layer."""
Part = TypeVar("Part")
_BLOCK = 1 << 20
_SAVE = "save it again with save_embedding_layers=True, or merge it with peft and ship that with train: none"


def resized_rows(adapter: Adapter, base: Mapping[str, TensorSpec]) -> int | None:
    """The rows of the tuned model's embedding, where the base has another number of them.

    Raises `DataError` when the embedding and the output layer would not have the same.
    """
    before = {name: spec.shape[0] for name, spec in base.items() if is_of_tokens(name)}
    after = dict(before)
    for given, spec in adapter.replaced.items():
        name = find_base_tensor(given, base)
        if name in after and spec.shape[1:] == base[name].shape[1:]:
            after[name] = spec.shape[0]
    if after == before:
        return None
    if len(set(after.values())) > 1:
        rows = ", ".join(f"{count} of {name.rpartition('.')[0]}" for name, count in after.items())
        raise DataError(
            f"the adapter resized the embedding or the output layer alone: rows are {rows}", hint=_SAVE
        )
    return next(iter(after.values()))


def rows_beside(base: Path, adapter: Path) -> int | None:
    """`resized_rows` of the adapter in a directory on the base in another."""
    return resized_rows(read_adapter(adapter), open_checkpoint(base).tensors)


def resize(configuration: Any, rows: int) -> None:
    """Give a transformers configuration an embedding of `rows` rows."""
    text = configuration.get_text_config()
    text.vocab_size = rows
    if (text.pad_token_id or 0) >= rows:
        text.pad_token_id = None  # no embedding is built with such a one


def check_tokenizer(
    adapter: Adapter, base: Mapping[str, TensorSpec], tokenizer: Path, bases: Path
) -> int | None:
    """`resized_rows`, and a row for each token of the tokenizer in `tokenizer`.

    `bases` is the directory of the base's own. Raises `DataError` when tokens have no rows, or rows that
    the adapter added no tokens.
    """
    rows, own = resized_rows(adapter, base), tokenizer.resolve() != bases.resolve()
    if rows is not None and not own:
        raise DataError(
            f"{adapter.directory} resized the embedding to {rows} rows and has no tokenizer.json: "
            "nothing says which tokens were added",
            hint="save the tokenizer of that training beside it: tokenizer.save_pretrained(DIRECTORY)",
        )
    there = rows or max((spec.shape[0] for name, spec in base.items() if is_of_tokens(name)), default=None)
    tokens = read_tokenizer(tokenizer).vocabulary_size if own else 0
    # Gemma 3's tokenizer names an image token for which its text models have no row: nobody added that.
    known = read_tokenizer(bases).vocabulary_size if own and (bases / "tokenizer.json").is_file() else 0
    if there is not None and tokens > max(there, known):
        raise DataError(
            f"the adapter's tokenizer has {tokens} tokens, the embedding {there} rows: "
            "it was saved without those that were added",
            hint=_SAVE,
        )
    return rows


def fitted(adapter: Adapter, base: Mapping[str, TensorSpec]) -> Adapter:
    """`adapter` without the copy of the embedding that peft saves as the output layer of a tied base.

    A layer that is no copy is left where it is: the base has no place for it.
    """
    if any(_leaf(name) in HEADS for name in base):
        return adapter
    return replace(
        adapter,
        replaced=_without_copy(adapter.replaced, _is_copy),
        rows=_without_copy(
            adapter.rows, lambda one, two: one.tokens == two.tokens and _is_copy(one.values, two.values)
        ),
    )


def _without_copy(parts: Mapping[str, Part], is_copy: Callable[[Part, Part], bool]) -> dict[str, Part]:
    embedding = next((one for name, one in parts.items() if _leaf(name) in EMBEDDINGS), None)
    return {
        name: one
        for name, one in parts.items()
        if not (_leaf(name) in HEADS and embedding and is_copy(one, embedding))
    }


def trained_apart(adapter: Adapter, base: Mapping[str, TensorSpec]) -> frozenset[str]:
    """The parts of `adapter` that moved the embedding alone, on a `base` that ties the output layer to it.

    In the one tensor of such a base the output layer would move with them. A whole tensor is named as
    in `replaced`, factors as in `layers`; `adapter` is as it was read.
    """
    if any(_leaf(name) in HEADS for name in base):
        return frozenset()
    whole = [name for name in adapter.replaced if _leaf(name) in EMBEDDINGS and _is_apart(name, adapter)]
    return frozenset([*whole, *(name for name, layer in adapter.layers.items() if layer.is_embedding)])


def _is_apart(given: str, adapter: Adapter) -> bool:
    """Whether the whole embedding `given` was trained beside the one that is tied.

    peft copies modules_to_save, unless it is told to keep the copies tied. An output layer in the adapter is
    the same, or `fitted` leaves it there to be refused.
    """
    module = given.rpartition(".")[0]
    named = adapter.configuration.get("modules_to_save") or ()
    return (
        any(f".{module}".endswith(f".{one}") for one in named)
        and not adapter.configuration.get("ensure_weight_tying")
        and not any(_leaf(name) in HEADS for name in adapter.replaced)
    )


def is_of_tokens(name: str) -> bool:
    """Whether the tensor `name` has a row for each token."""
    return _leaf(name) in EMBEDDINGS + HEADS


def _leaf(name: str) -> str:
    """The last part of the module that the tensor `name` is of."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_copy(one: TensorSpec, other: TensorSpec) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for start in range(0, one.bytes, _BLOCK):
            count = min(_BLOCK, one.bytes - start)
            if first.read(count) != second.read(count):
                return False
    return True
