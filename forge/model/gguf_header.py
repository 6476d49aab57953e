"""The header of a GGUF file (versions 2 and 3): metadata, tensors and where they lie.

Enough to say what a file is before anything loads it: architecture, chat template, tensor types.
Read with `struct` over a memory map; every length is checked against the file first. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Not covered: big-endian files and version 1, which nothing current reads; tensor values.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from forge.errors import DataError
from forge.files import no_pipe

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Longer arrays (a vocabulary, merges, scores) stay in the file until they are asked for.
LONG = 256

# ggml type number -> (name, values in a block, bytes of a block), from ggml.c.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip

# And back: name -> ggml type number.
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}

_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Where a file does not say whether BOS is put before a prompt, llama.cpp goes by the vocabulary
# (llama-vocab.cpp): SentencePiece and WordPiece do, byte-pair encodings with these pre-tokenizers do.
_MODELS_WITH_BOS = ("llama", "bert")
_PRE_TOKENIZERS_WITH_BOS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    "tekken", "chameleon",
)  # fmt: skip
_PRE_TOKENIZERS_ALWAYS_WITH_BOS = ("gemma4", "granite-embed-multi-311m")  # whatever the file says

Scalar = int | float | bool | str


@dataclass(frozen=True)
class LongArray:
    """An array left in the file: `count` elements of value type `kind` from byte `start`."""

    kind: int
    count: int
    start: int


Value = Scalar | tuple[Scalar, ...] | LongArray


@dataclass(frozen=True)
class GgufTensor:
    """A tensor; `shape` has the rows first, as in the checkpoint (the file stores it reversed)."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says of itself; offsets are from the start of the file.

    `places` are those of the values of `metadata`; the header ends at `end`, the tensors begin at `data`.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    end: int = 0
    data: int = 0

    @property
    def weight_bytes(self) -> int:
        """What the tensors take, without the space between them."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def chat_template(self) -> str | None:
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def adds_bos(self) -> bool:
        """Whether servers put BOS before a prompt: what the file says, else what llama.cpp takes for it."""
        model, pre = (self.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if model == "gemma4" or (model == "gpt2" and pre in _PRE_TOKENIZERS_ALWAYS_WITH_BOS):
            return True
        adds = self.metadata.get("tokenizer.ggml.add_bos_token")
        if isinstance(adds, bool):
            return adds
        return model in _MODELS_WITH_BOS or (model == "gpt2" and pre in _PRE_TOKENIZERS_WITH_BOS)

    @property
    def tensor_types(self) -> dict[str, int]:
        """How many tensors have which type, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors.values()).most_common())

    def array(self, key: str) -> tuple[Scalar, ...]:
        """The array under `key`, read from the file if it is long; raises KeyError if there is none."""
        value = self.metadata[key]
        if isinstance(value, LongArray):
            with _Reader(self.path) as reader:
                reader.position = value.start
                return reader.elements(value.kind, value.count)
        return value if isinstance(value, tuple) else (value,)


def bits_of(kind: str) -> float:
    """Bits of a weight of a tensor's type, such as 4.5 for Q4_K."""
    _, block, size = TYPES[NUMBERS[kind]]
    return 8 * size / block


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of `path`.

    Raises `DataError` that names the file: missing, empty, truncated, not a GGUF, an unknown version
    or type, extents that overlap or do not fit.
    """
    try:
        with _Reader(path) as reader:
            return reader.header()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file", hint="`forge runs` lists what was shipped") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_whole_gguf(path: Path) -> GgufHeader:
    """`read_gguf` of what is to travel as one file: raises `DataError` for one of several parts, too.

    `llama-gguf-split --merge` leaves 0 as the number of parts.
    """
    header = read_gguf(path)
    parts = header.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise DataError(
            f"{path} is one of the {parts} parts of a model, and one file is needed here",
            hint="join them: forge export --gguf FIRST-PART.gguf --quant copy --out FILE.gguf",
        )
    return header


class _Reader:
    """A position in a memory-mapped GGUF; every read is checked against the file's length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def __enter__(self) -> _Reader:
        with no_pipe(self.path).open("rb") as stream:
            self.size = self.path.stat().st_size
            if self.size < 24:
                self.fail(f"truncated: {self.size} bytes are too few for a GGUF")
            self.bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes.close()

    def fail(self, message: str, hint: str = "copy, download or export the file again") -> NoReturn:
        raise DataError(f"{self.path}: {message}", hint=hint)

    def skip(self, count: int) -> int:
        """Move over `count` bytes and give where they start."""
        start = self.position
        if count > self.size - start:
            self._truncated()
        self.position = start + count
        return start

    def _truncated(self) -> NoReturn:
        self.fail(f"truncated: its header goes on after its end at byte {self.size:,}")

    def number(self, form: str) -> int:
        value: int = struct.unpack_from("<" + form, self.bytes, self.skip(struct.calcsize("<" + form)))[0]
        return value

    def text(self) -> str:
        start = self.skip(self.number("Q"))
        return self.bytes[start : self.position].decode("utf-8", errors="replace")

    def elements(self, kind: int, count: int) -> tuple[Scalar, ...]:
        if kind == _STRING:
            return tuple(self.text() for _ in range(count))
        form = f"<{count}{_SCALARS[kind]}"
        return struct.unpack_from(form, self.bytes, self.skip(struct.calcsize(form)))

    def value(self, key: str) -> Value:
        kind = self.number("I")
        if kind != _ARRAY:
            self._check_kind(key, kind)
            return self.elements(kind, 1)[0]
        kind, count = self.number("I"), self.number("Q")
        self._check_kind(key, kind)
        start = self.position
        if count <= LONG:
            return self.elements(kind, count)
        if kind == _STRING:
            self._skip_texts(count)
        else:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        return LongArray(kind, count, start)

    def _skip_texts(self, count: int) -> None:
        """`skip(number("Q"))` for each of `count` texts, written out: vocabularies have 10^5 of them."""
        position, last, length_at = self.position, self.size - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > last:
                self._truncated()
            position += 8 + length_at(self.bytes, position)[0]
        self.skip(position - self.position)

    def _check_kind(self, key: str, kind: int) -> None:
        if kind != _STRING and kind not in _SCALARS:
            self.fail(f"metadata {key}: unknown value type {kind}")

    def header(self) -> GgufHeader:
        if self.bytes[:4] != MAGIC:
            self.fail("not a GGUF file", hint="a GGUF starts with the letters GGUF")
        self.skip(4)
        version = self.number("I")
        if version not in (2, 3):
            big = struct.unpack(">I", struct.pack("<I", version))[0] in (2, 3)
            self.fail("a big-endian GGUF" if big else f"GGUF version {version}; 2 and 3 are read", hint="")
        tensor_count, value_count = self.number("Q"), self.number("Q")
        metadata: dict[str, Value] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(value_count):
            key = self.text()
            start = self.position + 4  # behind the number of its type
            metadata[key] = self.value(key)
            places[key] = (start, self.position)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            self.fail(f"general.alignment is {alignment!r}")
        infos = [self._tensor() for _ in range(tensor_count)]
        end = self.position
        data = -(-end // alignment) * alignment
        tensors = self._placed(infos, data, alignment)
        return GgufHeader(self.path, version, alignment, metadata, tensors, places, end, data)

    def _tensor(self) -> GgufTensor:
        name, dimensions = self.text(), self.number("I")
        if dimensions > 4:
            self.fail(f"tensor {name}: {dimensions} dimensions; ggml has at most 4")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in TYPES:
            self.fail(f"tensor {name}: unknown type {kind}", hint="a newer llama.cpp wrote it")
        label, block, block_bytes = TYPES[kind]
        if shape and shape[-1] % block:
            self.fail(f"tensor {name}: rows of {shape[-1]} values do not divide into blocks of {label}")
        return GgufTensor(name, label, shape, offset, offset + math.prod(shape) // block * block_bytes)

    def _placed(self, infos: list[GgufTensor], data: int, alignment: int) -> dict[str, GgufTensor]:
        placed: dict[str, GgufTensor] = {}
        end = 0
        for info in sorted(infos, key=lambda info: info.start):
            if info.start % alignment or info.start < end:
                self.fail(f"tensor {info.name}: its offset overlaps another or is not aligned")
            if info.name in placed:
                self.fail(f"tensor {info.name} stands there twice")
            end = info.end
            placed[info.name] = GgufTensor(
                info.name, info.type, info.shape, data + info.start, data + info.end
            )
        if infos and data + end > self.size:
            self.fail(f"truncated: it has {self.size:,} bytes of the {data + end:,} that its header asks for")
        return placed
