"""llama.cpp's own converter classes, given forge's tensors. Runs in a worker.

All knowledge of architectures stays theirs: names, permutations, metadata, vocabulary. They work on
lazy tensors; what they would round and write is kept as a thunk instead (`Pending`) and written by
`write`. They need the gguf-py of their own tree, so nothing in this process may have imported
another `gguf` before.

Not covered: multimodal projectors, Mistral's own format, checkpoints in `.bin` files.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from forge.errors import DataError, StageError, UnexportableError
from forge.export.tensors import LazyTensor
from forge.model.config import read_json
from forge.model.gguf_header import NUMBERS, TYPES

if TYPE_CHECKING:
    from gguf.gguf_writer import GGUFValue, TensorInfo

Metadata: TypeAlias = "Mapping[str, GGUFValue]"
"""A GGUF's metadata as gguf-py's writer takes it."""

# What the converters raise for a model or an adapter that they cannot convert; some call sys.exit.
REFUSALS = (
    NotImplementedError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
    RuntimeError, ArithmeticError, OSError, ImportError, SystemExit,
)  # fmt: skip
# Families whose routers transformers scores so whatever the file says; llama.cpp does where it is said.
_SIGMOID = {
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "exaone_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "float32"}


@dataclass(frozen=True)
class Choices:
    """What forge decides of the vocabulary; None leaves a thing to the converter.

    `pre_tokenizer` is used where the converter's table has no name. `adds_bos`: servers put BOS
    before a prompt. `space_prefix`: SentencePiece puts a space before each stretch of text.
    `end_of_turn` is the id that ends an answer.
    """

    pre_tokenizer: str = ""
    adds_bos: bool | None = None
    space_prefix: bool | None = None
    end_of_turn: int | None = None


class Pending:
    """A tensor that the converter has made and forge will write: `data` is lazy, `type` ggml's name."""

    def __init__(self, data: Any, number: int) -> None:
        self.data = data
        self.type = TYPES[number][0]
        self.shape = tuple(data.shape)
        self.dtype = data.dtype

    @property
    def nbytes(self) -> int:
        return bytes_of(self.type, self.shape)

    @property
    def source(self) -> LazyTensor | None:
        """The tensor of the checkpoint, where the converter left its values and their order as they are."""
        made_of = getattr(self.data, "_args", ())
        source: LazyTensor | None = made_of[0].__dict__.get("forge_source") if made_of else None
        return source


@dataclass(frozen=True)
class Converted:
    """What a converter would write. `writer` is its GGUFWriter: metadata and tensors in their order."""

    writer: Any
    types: Mapping[str, str]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        infos: Mapping[str, TensorInfo] = self.writer.tensors[0]
        return infos

    @property
    def metadata(self) -> Metadata:
        values: Metadata = self.writer.kv_data[0]
        return values


def bytes_of(kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of ggml's type `kind`; raises `StageError` when its rows do not divide."""
    _, block, block_bytes = TYPES[NUMBERS[kind]]
    if shape and shape[-1] % block:
        raise StageError(f"rows of {shape[-1]} values do not divide into blocks of {kind}")
    return math.prod(shape) // block * block_bytes


def convert(
    tree: Path,
    description: Path,
    tensors: Sequence[LazyTensor],
    *,
    outtype: str,
    name: str,
    choices: Choices | None,
    apart: bool = False,
) -> Converted:
    """Let the converter of the model in `description` (a checkpoint without weights) do its work.

    `outtype` is f32, f16 or bf16; `name` becomes general.name; without `choices` nothing is decided
    but by upstream. `apart` asks for an output layer beside the embedding. Raises `DataError` where the
    family has none, `StageError` with the converter's own words.
    """
    import torch

    conversion = load_converters(tree)
    quants = conversion.base.gguf.quants
    quantize, quants.quantize = quants.quantize, Pending
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    try:
        reading = _streamed(conversion.base, tensors)
        with torch.inference_mode(), _decided(choices or Choices()), reading:
            model = _kind(conversion, description, tensors)(
                description,
                conversion.base.gguf.LlamaFileType[kinds[outtype]],
                Path("unused"),
                model_name=name,
            )
            model = getattr(model, "impl", model)  # Mistral 3's hands everything to another
            gguf = conversion.base.gguf
            if apart and gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[model.model_arch]:
                raise _one_tensor(gguf.MODEL_ARCH_NAMES[model.model_arch])
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
    except REFUSALS as refusal:
        raise refused(refusal) from refusal
    finally:
        quants.quantize = quantize
    infos = model.gguf_writer.tensors[0]
    if apart and "output.weight" not in infos:  # Gemma's converter leaves it out
        raise _one_tensor(gguf.MODEL_ARCH_NAMES[model.model_arch])
    return Converted(model.gguf_writer, {name: info.dtype.name for name, info in infos.items()})


def _one_tensor(architecture: str) -> DataError:
    return DataError(
        "the adapter trained the embedding or the output layer apart, which the base ties, and llama.cpp has "
        f"one tensor for the two in {architecture}",
        hint="train it again with the embedding in modules_to_save and ensure_weight_tying=True, as "
        "train.lora.modules_to_save does, or without either",
    )


def load_converters(tree: Path) -> Any:
    """The package `conversion` of `tree`, with its own gguf-py."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for directory in (str(tree / "gguf-py"), str(tree)):
        if directory not in sys.path:
            sys.path.insert(0, directory)
    import conversion.base  # type: ignore[import-not-found]

    return conversion


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """The collector rests while the converter imports torch and transformers, which stay: half a second.

    It never looks through them later either, unless they were there before, and with them garbage perhaps.
    """
    is_first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        gc.enable()


def refused(refusal: BaseException) -> StageError:
    """The error for what a converter raised, with its line where it gives no reason."""
    words = " ".join(str(refusal).split())[:400] or _line_of(refusal)
    return UnexportableError(f"llama.cpp's converter failed: {type(refusal).__name__}: {words}")


def _line_of(refusal: BaseException) -> str:
    """Where a bare assertion stands and what it says."""
    frames = traceback.extract_tb(refusal.__traceback__)
    if not frames:
        return "without a reason"
    last = frames[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.line}"


def _kind(conversion: Any, description: Path, tensors: Sequence[LazyTensor]) -> Any:
    """The converter's class for the model in `description`, a subclass of our own, to set its fields on."""
    base = conversion.base
    hparams = base.ModelBase.load_hparams(description, False)
    kind = conversion.get_model_class(base.get_model_architecture(hparams, base.ModelType.TEXT))
    fields = {"model_arch": kind.model_arch}
    if hasattr(kind, "opt_num_mtp_layers") and not any("mtp" in tensor.name.split(".") for tensor in tensors):
        # transformers saves no layers that predict further tokens, whatever the configuration says.
        fields["no_mtp"] = True
    return type(kind.__name__, (kind,), fields)


def _special_ids(description: Path) -> set[int]:
    path = description / "tokenizer.json"
    added = (read_json(path).get("added_tokens") or []) if path.is_file() else []
    return {int(token["id"]) for token in added if token.get("special")}


@contextlib.contextmanager
def _streamed(base: Any, tensors: Sequence[LazyTensor]) -> Iterator[None]:
    """Every converter reads `tensors` instead of files; its own way of indexing them goes on above that."""

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, object]:
        lazy = ((tensor.name, partial(_lazy, base.LazyTorchTensor, tensor)) for tensor in tensors)
        return dict(kept for item in lazy if (kept := self.filter_tensors(item)))

    def load_hparams(directory: Path, is_mistral_format: bool) -> dict[str, Any]:
        stated: dict[str, Any] = read(directory, is_mistral_format)
        # GPT-NeoX's and Cohere 2's read a name that transformers 5 has no more.
        rotation = stated.get("rope_parameters") or {}
        stated.setdefault("rotary_pct", rotation.get("partial_rotary_factor", 1.0))
        if stated.get("model_type") in _SIGMOID:
            stated.setdefault("scoring_func", "sigmoid")
        for part in (stated, stated.get("text_config") or {}):
            if part.get("eod_token_id") not in (None, *_special_ids(directory)):
                # HunYuan's ends answers there, and transformers fills in a 3, which is a word.
                part["eod_token_id"] = None
        return stated

    files, base.ModelBase.index_tensors = base.ModelBase.index_tensors, index_tensors
    read, base.ModelBase.load_hparams = base.ModelBase.load_hparams, staticmethod(load_hparams)
    try:
        yield
    finally:
        base.ModelBase.index_tensors = files
        base.ModelBase.load_hparams = staticmethod(read)


def _lazy(kind: Any, tensor: LazyTensor) -> Any:
    """`tensor` as the converters know tensors; bfloat16 as float32, which they would make of it first."""
    import torch

    if tensor.dtype in _FLOATS:
        dtype = getattr(torch, _FLOATS[tensor.dtype])
        made = kind(
            meta=kind.meta_with_dtype_and_shape(dtype, tensor.shape), func=lambda: tensor.load().to(dtype)
        )
        made.forge_source = tensor
        return made
    dtype = kind._dtype_str_map[tensor.dtype]
    return kind(meta=kind.meta_with_dtype_and_shape(dtype, tensor.shape), func=tensor.load)


@contextlib.contextmanager
def _decided(choices: Choices) -> Iterator[None]:
    """Answer in place of the converter where forge knows, and proves afterwards by comparing ids.

    The converter knows a tokenizer by a hash of the ids of one text and refuses any other, even one
    that differs only in its vocabulary. A hash it knows stays its own decision. What is added to a
    prompt is what training had: nothing that the template does not write.
    """
    from conversion.base import TextModel
    from gguf import SpecialVocab

    known, add = TextModel.get_vocab_base_pre, SpecialVocab.add_to_gguf

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not choices.pre_tokenizer:
                raise
            return choices.pre_tokenizer

    def add_to_gguf(self: Any, writer: Any, quiet: bool = False) -> None:
        if choices.adds_bos is not None:
            self.add_special_token = {**self.add_special_token, "bos": choices.adds_bos, "eos": False}
        if choices.end_of_turn is not None:
            self.special_token_ids["eot"] = choices.end_of_turn
        if choices.space_prefix is not None:
            writer.add_add_space_prefix(choices.space_prefix)
        add(self, writer, quiet)

    TextModel.get_vocab_base_pre, SpecialVocab.add_to_gguf = get_vocab_base_pre, add_to_gguf
    try:
        yield
    finally:
        TextModel.get_vocab_base_pre, SpecialVocab.add_to_gguf = known, add


def extents(types: Mapping[str, str], converted: Converted) -> Iterator[tuple[str, int]]:
    """Each tensor's name and bytes, in the order of the file."""
    for name, kind in types.items():
        yield name, bytes_of(kind, converted.tensors[name].shape)
