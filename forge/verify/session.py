"""What the steps of a measurement share: base and adapter, its progress, llama.cpp's own files."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from forge import report
from forge.adapter.read import read_adapter
from forge.errors import ForgeError, Problem
from forge.export.run import GGUF_FILE, HEADER
from forge.model.config import Configuration, read_configuration
from forge.model.estimate import usable_cores
from forge.model.gguf_header import GgufHeader, bits_of, read_gguf
from forge.verify import weights, yardstick
from forge.verify.beside import compare_tensors, is_weighted
from forge.verify.inputs import most_frequent, type_of_tensors
from forge.verify.kept import Kept
from forge.verify.loader import Weights
from forge.verify.measurement import (
    Beside,
    FileFacts,
    FitsOfFiles,
    Unlike,
    VerifyRequest,
)
from forge.verify.pretokenizers import other_pre_tokenizer
from forge.verify.tuned import open_model

_PADDING = "tokenizer.ggml.padding_token_id"
_SPECIAL = re.compile(r"tokenizer\.ggml\.(?!eos_|eot_|eom_|padding_)\w+_token_id")
DIRECT = ("f16", "bf16", "f32")
"""Types that only convert: everything else is judged by llama.cpp's own file of that type."""


@dataclass
class Session:
    """What the steps share; `done` are the steps that were taken, `seconds` what they took."""

    request: VerifyRequest
    done: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def source(self) -> Weights:
        """Base and adapter, as the reference reads them; `DataError` for settings that are refused."""
        request = self.request
        if request.adapter:
            read_adapter(request.adapter)
        nf4 = request.merge_base == "nf4"
        return Weights(request.base, request.adapter, nf4=nf4, trust_remote_code=request.trust_remote_code)

    @cached_property
    def facts(self) -> Configuration:
        """Those of the tuned model: the base's, but for an embedding that was resized."""
        facts = read_configuration(self.source.base)
        rows = open_model(self.source).vocabulary_size if self.source.adapter else None
        return replace(facts, vocabulary_size=rows or facts.vocabulary_size)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; an error in it says how far it got."""
        started = time.monotonic()
        try:
            yield
        except ForgeError as failure:
            before = ", ".join(self.done) or "nothing"
            failure.problems = (
                *failure.problems,
                Problem(f"it failed at: {name}; compared before: {before}"),
            )
            raise
        self.done.append(name)
        took = round(time.monotonic() - started, 1)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + took, 1)
        report.detail(f"{name}: {took} s")


@dataclass
class Yardsticks:
    """llama.cpp's own files beside the one that is measured, each made once; `shared` is of all types."""

    session: Session
    kept: Kept
    shared: Kept
    vendor: Path | None = None
    is_own: bool = False
    """Whether the file is llama.cpp's own `vendor` to the bit, in whatever computes: it is looked at once."""

    @cached_property
    def f16(self) -> Path:
        """llama.cpp's own conversion, of what the file was made of."""
        with self.session.step("llama.cpp's own conversion"):
            request = self.session.request
            if request.f16:
                return request.f16
            make = partial(yardstick.export_f16, yardstick.model_of(request))
            return self.shared.folder("f16", make) / GGUF_FILE

    def quantized(self, kind: str, importance: Path | None = None) -> Path:
        """llama.cpp's own file of another type."""
        make = partial(
            yardstick.make_quantized, self.f16, quant=kind, threads=usable_cores(), importance=importance
        )
        return self.kept.folder(f"vendor-{kind}", lambda out: make(target=out / GGUF_FILE)) / GGUF_FILE

    def held(self, file: FileFacts) -> FileFacts:
        """The file with the type that it is held against; of a quantized one `vendor` is made."""
        if file.type in DIRECT:
            return file
        request, _ = self.session.request, self.f16
        with self.session.step("llama.cpp's own quantization"):
            vendor = self.quantized(file.type, request.importance)
            held = _doubted(file, read_gguf(request.gguf), read_gguf(vendor))
            if held.type != file.type:
                self.kept.forget(vendor.parent.name)
                vendor = self.quantized(held.type, request.importance)
            self.is_own = yardstick.computes_the_same(request.gguf, vendor)
        self.vendor = vendor
        return held

    def weights(self, file: FileFacts, is_sound: bool) -> FitsOfFiles:
        """Of a conversion that failed llama.cpp's own names the stage, by its weights.

        bf16 rounds eight times as much as f16 does: beside it is a file of its own type.
        """
        session, request = self.session, self.session.request
        files = [request.gguf]
        if self.vendor:
            files += [self.f16, *([] if self.is_own else [self.vendor])]
        elif not is_sound:
            files.append(self.f16)
            if file.type == "bf16":
                files.append(self.quantized(file.type))
        with session.step("weights"):
            inside = replace(session.source, adapter=None) if request.lora else session.source
            beside = self._beside(file)
            fits = weights.fit_weights(files, inside, session.facts, beside.worse)
            made = FitsOfFiles(*fits, *fits[:1]) if self.is_own else FitsOfFiles(*fits)
        header, own = read_gguf(request.gguf), read_gguf(files[1] if len(files) > 1 else self._header())
        numbers, unmatched = other_numbers(header, own)
        if splits := other_pre_tokenizer(header, own, request.tokenizer):
            numbers = (*numbers, splits)
        padding = other_padding(header, own)
        return replace(made, beside=beside, numbers=numbers, unmatched=unmatched, padding=padding)

    def _beside(self, file: FileFacts) -> Beside:
        """A file that does not say its type is held to one of its kind, whose mixture is another."""
        if self.vendor is None or self.is_own:
            return Beside()
        request = self.session.request
        known = request.importance is not None or not is_weighted(read_gguf(request.gguf))
        same_types = known and file.says == file.type
        return compare_tensors(request.gguf, self.vendor, self.f16, same_types=same_types)

    def _header(self) -> Path:
        """Of a file that llama.cpp's own was not made beside: what it would say of the model."""
        with self.session.step("llama.cpp's own header"):
            request = self.session.request
            make = partial(yardstick.make_header, yardstick.model_of(request))
            return request.f16 or self.kept.folder("header", make) / HEADER


def other_numbers(file: GgufHeader, own: GgufHeader) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the architecture's keys and special tokens say otherwise than llama.cpp's own.

    First those that both have, then those that only one of them has, which may be a default. Not the context
    and the vocabulary's size; nor what ends an answer, of which llama.cpp itself is asked.
    """
    kind = f"{own.architecture}."
    numbers, unmatched = list[str](), list[str]()
    for name in sorted(file.metadata.keys() & own.metadata.keys()):
        theirs, expected = (_shown(header, name) for header in (file, own))
        if _SPECIAL.fullmatch(name) and theirs != expected:
            numbers.append(f"{name} is {theirs}, the base's is {expected}")
    known = {name for header in (file, own) for name in header.metadata if name.startswith(kind)}
    for name in sorted(known - {f"{kind}context_length", f"{kind}vocab_size"}):
        theirs, expected = (_shown(header, name) for header in (file, own))
        if theirs is None:
            unmatched.append(f"{name} is missing, the base's is {expected}")
        elif expected is None:
            unmatched.append(f"{name} is {theirs}, the base has none")
        elif theirs != expected:
            numbers.append(f"{name} is {theirs}, the base's is {expected}")
    return tuple(numbers), tuple(unmatched)


def other_padding(file: GgufHeader, own: GgufHeader) -> str | None:
    """PAD where it is not llama.cpp's own: in what the library generates it plays no part."""
    theirs, expected = (_shown(header, _PADDING) for header in (file, own))
    if theirs == expected:
        return None
    return f"{_PADDING} is {theirs or 'missing'}, the base's is {expected or 'none'}"


def _shown(header: GgufHeader, name: str) -> str | None:
    """A value of the metadata, floats to the six digits in which other programs' are equal.

    Of a value for each layer, all the same, it is that value: converters write either.
    """
    if name not in header.metadata:
        return None
    values = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in header.array(name)]
    return values[0] if len({*values}) == 1 else f"[{', '.join(values)}]"


def _doubted(file: FileFacts, header: GgufHeader, vendor: GgufHeader) -> FileFacts:
    """The file with the type that it is held against: its own word, unless its tensors are finer than that.

    Else it is held to its word, with what is unlike it; `vendor` is llama.cpp's file of that type.
    """
    tensors, expected = most_frequent(header), most_frequent(vendor)
    if bits_of(tensors) > bits_of(expected):
        return replace(file, type=type_of_tensors(header))
    return file if tensors == expected else replace(file, unlike=Unlike(tensors, expected))
