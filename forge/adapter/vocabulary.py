"""An adapter on its base, where the two have other embeddings than the base alone: more rows, or two for one.

Who adds tokens calls `resize_token_embeddings`; peft then saves the whole embedding and the output layer
beside the factors (`save_embedding_layers`, `modules_to_save`), or beside the rows of those tokens
(`trainable_token_indices`). The tuned model has as many rows as they have, and the tokenizer is the
adapter's own.

Many small bases have one tensor for embedding and output layer. peft trains a copy of each, or only one,
unless it is asked to keep them tied and can: the tuned model has two, and is written so. In one tensor both
would change. Rows of tokens it keeps tied, unless the output layer has rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from forge.adapter.read import EMBEDDINGS, Adapter, LoraLayer, find_base_tensor, read_adapter
from forge.errors import DataError
from forge.model.checkpoint import Checkpoint, open_checkpoint
from forge.model.config import CONV1D_FAMILIES, read_json, ties_embeddings
from forge.model.safetensors_header import TensorSpec, is_copy
from forge.model.tokenizer_files import read_tokenizer

HEADS = ("lm_head", "embed_out")
"""What families call the output layer."""
Part = TypeVar("Part")
_BOTH = "train it with both in modules_to_save, or merge it with peft and ship that with train: none"
_SAVE = "save it again with save_embedding_layers=True, or merge it with peft and ship that with train: none"


@dataclass(frozen=True)
class Fitted:
    """An adapter and the base that it goes onto.

    `adapter` has no copy of the embedding where the tuned model has one tensor for both. `rows` are those of
    the tuned model's embedding, where the base has another number of them. `untied`: the base has one tensor
    and the tuned model two; the checkpoint then has the embedding's values a second time, as the output
    layer's. `own_head`: the tuned model has two, where the base's configuration does not say so.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    rows: int | None
    untied: bool = False
    own_head: bool = False

    @property
    def impurities(self) -> tuple[str, ...]:
        """Why it has no GGUF form of its own over this base; empty when it is pure (D13, pitfall 52)."""
        reasons = list(self.adapter.impurities)
        layers = self.adapter.layers.values()
        if any(self.is_transposed(layer) and not layer.is_embedding for layer in layers):
            reasons.append("its layers are Conv1D, whose factors are transposed")
        if self.untied:
            reasons.append("it trained embedding and output layer apart, which the base ties")
        return tuple(reasons)

    def is_transposed(self, layer: LoraLayer) -> bool:
        """Whether the base has the transpose of B A's shape: an embedding, or a Conv1D.

        That is the base's word, as for peft, and never that of the adapter's fan_in_fan_out.
        """
        return layer.is_embedding or (
            self.model_type in CONV1D_FAMILIES and layer.module.rpartition(".")[2] not in HEADS
        )

    @cached_property
    def model_type(self) -> str:
        """The base's family, as its configuration says."""
        return str(read_json(self.checkpoint.directory / "config.json").get("model_type"))

    def resize(self, configuration: Any) -> None:
        """Give a transformers configuration as many rows as the tuned model has."""
        if self.rows is None:
            return
        text = configuration.get_text_config()
        text.vocab_size = self.rows
        if (text.pad_token_id or 0) >= self.rows:
            text.pad_token_id = None  # no embedding is built with such a one


def fit(adapter: Adapter, checkpoint: Checkpoint) -> Fitted:
    """`adapter` on the base `checkpoint`, as it is in its files.

    Of a checkpoint without files, a plan's, only the headers are read. Raises `DataError` when the embedding
    and the output layer would not have the same number of rows.
    """
    base = checkpoint.tensors
    heads = [name for name in base if _is_weight(name, HEADS)]
    embedding = next((name for name in base if _is_weight(name, EMBEDDINGS)), None)
    ties = ties_embeddings(read_json(checkpoint.directory / "config.json"))
    if embedding is None or ties is False or (ties is None and heads):
        return Fitted(checkpoint, adapter, _resized_rows(adapter, base))
    if checkpoint.files and not all(is_copy(base[name], base[embedding]) for name in heads):
        # transformers ties no two tensors that differ, whatever the configuration says; peft ties rows by it.
        adapter = _with_rows_of_both(adapter, heads[0])
        return Fitted(checkpoint, adapter, _resized_rows(adapter, base), own_head=True)
    once = _without_copies(adapter)
    untied = any(_heads(once)) or _moves_embedding_alone(adapter)
    # transformers ties them whatever is stored; a second tensor would be left as it was.
    tensors = {name: spec for name, spec in base.items() if name not in heads}
    if untied:
        head = next(_heads(once), "lm_head.weight")
        tensors[head] = base[embedding]
        once = _with_rows_of_both(adapter, head)
    rows = _resized_rows(once, tensors)
    return Fitted(replace(checkpoint, tensors=tensors), once, rows, untied, own_head=untied)


def _resized_rows(adapter: Adapter, base: Mapping[str, TensorSpec]) -> int | None:
    before = {name: spec.shape[0] for name, spec in base.items() if is_of_tokens(name)}
    after = dict(before)
    for module, spec in adapter.replaced.items():
        name = find_base_tensor(module, base)
        if name in after and spec.shape[1:] == base[name].shape[1:]:
            after[name] = spec.shape[0]
    if after == before:
        return None
    if len(set(after.values())) > 1:
        rows = ", ".join(f"{count} of {name.rpartition('.')[0]}" for name, count in after.items())
        raise DataError(
            f"the adapter resized only the embedding or only the output layer: rows are {rows}", hint=_BOTH
        )
    return next(iter(after.values()))


def rows_beside(base: Path, adapter: Path) -> int | None:
    """The rows of the tuned model's embedding, where the base in `base` has another number of them."""
    return fit(read_adapter(adapter), open_checkpoint(base)).rows


def check_tokenizer(fitted: Fitted, tokenizer: Path) -> None:
    """Check that there is a row for each token of the tokenizer in `tokenizer`.

    Raises `DataError` when tokens have no rows, or rows that the adapter added no tokens.
    """
    bases, rows = fitted.checkpoint.directory, fitted.rows
    own = tokenizer.resolve() != bases.resolve()
    if rows is not None and not own:
        raise DataError(
            f"{fitted.adapter.directory} resized the embedding to {rows} rows and has no tokenizer.json: "
            "nothing says which tokens were added",
            hint="save the tokenizer of that training beside it: tokenizer.save_pretrained(DIRECTORY)",
        )
    base = fitted.checkpoint.tensors
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


def _with_rows_of_both(adapter: Adapter, head: str) -> Adapter:
    """`adapter` with the embedding's rows for the output layer `head` too, where it has none of its own."""
    rows = next((rows for name, rows in adapter.rows.items() if _is_weight(name, EMBEDDINGS)), None)
    if rows is None or any(_is_weight(name, HEADS) for name in adapter.rows):
        return adapter
    return replace(adapter, rows={**adapter.rows, head: rows})


def _without_copies(adapter: Adapter) -> Adapter:
    """`adapter` without the copy of the embedding that peft saves as the output layer of a tied base."""
    return replace(
        adapter,
        replaced=_without_copy(adapter.replaced, is_copy),
        rows=_without_copy(
            adapter.rows,
            lambda first, second: first.tokens == second.tokens and is_copy(first.values, second.values),
        ),
    )


def _without_copy(parts: Mapping[str, Part], is_copy: Callable[[Part, Part], bool]) -> dict[str, Part]:
    embedding = next((part for name, part in parts.items() if _leaf(name) in EMBEDDINGS), None)
    return {
        name: part
        for name, part in parts.items()
        if not (_leaf(name) in HEADS and embedding and is_copy(part, embedding))
    }


def _heads(adapter: Adapter) -> Iterator[str]:
    """The names of the output layer's tensor in `adapter`."""
    for name in (*adapter.replaced, *adapter.rows, *(f"{module}.weight" for module in adapter.layers)):
        if _is_weight(name, HEADS):
            yield name


def _moves_embedding_alone(adapter: Adapter) -> bool:
    """Whether the embedding was trained beside the tensor that is tied, and the output layer was not.

    peft copies modules_to_save. What it kept tied it saves for both, and it ties fewer names than it is asked
    to (ensure_weight_tying), so what counts is what is in the file.
    """
    if any(layer.is_embedding for layer in adapter.layers.values()):
        return True
    if any(_heads(adapter)):
        return False
    named = adapter.configuration.get("modules_to_save") or ()
    modules = [name.rpartition(".")[0] for name in adapter.replaced if _is_weight(name, EMBEDDINGS)]
    return any(module.endswith(name) for module in modules for name in named)


def saved_whole(base: Mapping[str, TensorSpec], named: Sequence[str]) -> int:
    """Values that peft saves for the modules to save `named`, by the ends of their names.

    An embedding that is the output layer too is saved for both.
    """
    saved = {name for name in base if any(f"{module}." in name for module in named)}
    count = sum(base[name].numel for name in saved)
    if any(_is_weight(name, HEADS) for name in base):
        return count
    tied = {name for name in base if _is_weight(name, EMBEDDINGS)}
    heads = any(head.endswith(module) for head in HEADS for module in named)
    both = sum(base[name].numel for name in tied) if heads or tied & saved else 0
    return count + both * (1 if tied & saved else 2)


def is_of_tokens(name: str) -> bool:
    """Whether the tensor `name` has a row for each token."""
    return _leaf(name) in EMBEDDINGS + HEADS


def _is_weight(name: str, modules: Collection[str]) -> bool:
    """Whether the tensor `name` is the weight of one of `modules`."""
    return name.endswith(".weight") and _leaf(name) in modules


def _leaf(name: str) -> str:
    """The last part of the module that the tensor `name` is of."""
    return name.rpartition(".")[0].rpartition(".")[2]
