"""The measurement behind a certificate; the verdict is in `verdict`. Runs in a worker.

A GGUF is compared with transformers in float32, hand-over by hand-over, and with what llama.cpp's own
conversion and quantization of the same weights come to. Nothing here decides whether that is good.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from forge.adapter.read import read_adapter
from forge.chat.template import ChatTemplate
from forge.errors import ForgeError, Problem
from forge.export import upstream
from forge.model.checkpoint import open_checkpoint
from forge.model.config import Configuration, read_configuration
from forge.model.estimate import available, usable_cores
from forge.model.gguf_header import GgufHeader, bits_of, read_gguf
from forge.model.tokenizer_files import read_tokenizer
from forge.verify import reference, sample, served, weights, yardstick
from forge.verify.compare import compare, converts, divergence, times_as_far, top_log_probabilities
from forge.verify.inputs import (
    file_facts,
    most_frequent,
    read_rows,
    refuse_long,
    refuse_other_importance,
    refuse_other_model,
    refuse_other_vocabulary,
    refuse_too_large,
    type_of_tensors,
)
from forge.verify.loader import Weights
from forge.verify.rounding import rounding_of, rounding_of_checkpoint
from forge.verify.tuned import open_model
from forge.verify.vocabulary import added_tokens, check_vocabulary

DIRECT = ("f16", "bf16", "f32")
"""Types that only convert: everything else is judged by llama.cpp's own file of that type."""
_OWN_PROMPTS = 100
_GREEDY_PROMPTS, _GREEDY_TOKENS = 8, 24
_LIVE_PROMPTS, _LIVE_TOKENS = 32, 8


@dataclass
class _Session:
    """What the steps share; `told` says what was compared so far."""

    arguments: Mapping[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.arguments["settings"]
        return settings

    @cached_property
    def source(self) -> Weights:
        """Base and adapter, as the reference reads them; `DataError` for settings that are refused."""
        adapter = Path(self.arguments["adapter"]) if self.arguments["adapter"] else None
        if adapter:
            read_adapter(adapter)
        nf4 = self.settings.get("merge_base") == "nf4"
        trust = self.settings.get("trust_remote_code", False)
        return Weights(Path(self.arguments["base"]), adapter, nf4=nf4, trust_remote_code=trust)

    @cached_property
    def facts(self) -> Configuration:
        """Those of the tuned model: the base's, but for an embedding that was resized."""
        facts = read_configuration(self.source.base)
        rows = open_model(self.source).vocabulary_size if self.source.adapter else None
        return replace(facts, vocabulary_size=rows or facts.vocabulary_size)

    @property
    def lora(self) -> Path | None:
        """The adapter's own GGUF, where the file is its base alone."""
        return Path(self.arguments["lora"]) if self.arguments.get("lora") else None

    @property
    def importance(self) -> Path | None:
        """The matrix that the file was rounded by."""
        return Path(self.arguments["importance"]) if self.arguments.get("importance") else None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; an error in it says how far it got."""
        started = time.monotonic()
        try:
            yield
        except ForgeError as failure:
            before = ", ".join(self.told) or "nothing"
            failure.problems = (
                *failure.problems,
                Problem(f"it failed at: {name}; compared before: {before}"),
            )
            raise
        self.told.append(name)
        self.found["seconds"][name] = round(time.monotonic() - started, 1)


def measure(**arguments: Any) -> dict[str, Any]:
    """Compare `gguf` with `base` and `adapter`; returns plain JSON.

    Arguments: base, adapter, gguf, tokenizer, chat_template (as trained, its variables written in), rows
    (JSONL of input_ids, labels and messages), converters, scratch (a directory for large temporary
    files), merged (a merged checkpoint, or None); optional: lora (the adapter's GGUF beside that of
    its base), f16 (llama.cpp's own conversion, where it is there already), importance (the matrix that
    the file was rounded by). settings: nf4 (trained
    on it), merge_base, end_of_turn_id, trust_remote_code.
    Raises `DataError` for files that cannot be compared at all, with what was compared before.
    """
    upstream.load(Path(arguments["converters"]))  # before anything imports another gguf
    session = _Session(arguments, {"seconds": {}})
    gguf, base = Path(arguments["gguf"]), Path(arguments["base"])
    facts = session.facts
    with session.step("the file's header"):
        header = read_gguf(gguf)
        refuse_other_model(header, facts)
        refuse_other_importance(header, session.importance)
    rows = read_rows(Path(arguments["rows"]))
    session.found["file"] = file_facts(gguf, header)
    session.found["experts"] = facts.experts or 0
    session.found["merge_base"] = session.settings.get("merge_base", "original")
    with session.step("token ids, prompt and stops"):
        session.found |= _vocabulary(session, rows)
    with session.step("rows drawn"):
        refuse_too_large(open_checkpoint(base).tensors, available().free)
        vocabulary = facts.vocabulary_size or read_tokenizer(base).vocabulary_size
        refuse_long(rows, facts, header)
        refuse_other_vocabulary(rows, session.found["file"]["vocabulary"])
        drawn = sample.draw(rows, vocabulary, facts.max_positions)
    session.found["sample"] = _sample_facts(rows, drawn)
    with tempfile.TemporaryDirectory(dir=arguments["scratch"], prefix="forge-verify-") as scratch:
        _legs(session, drawn, rows, Path(scratch))
    return session.found


def _vocabulary(session: _Session, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arguments = session.arguments
    tokenizer = Path(arguments["tokenizer"])
    source = arguments["chat_template"]
    template = ChatTemplate(source, read_tokenizer(tokenizer).template_tokens) if source else None
    own = [row["messages"] for row in rows if row.get("messages")][:_OWN_PROMPTS]
    hello = [[{"role": "user", "content": "Hello!"}]]
    system = [[{"role": "system", "content": "Be brief."}, *hello[0]]]
    asked = [messages[:-1] for messages in own if len(messages) > 1]
    added = added_tokens(Path(arguments["base"]), tokenizer)[:_OWN_PROMPTS]
    asked += [[{"role": "user", "content": token}] for token in added]
    end = session.settings.get("end_of_turn_id")
    return check_vocabulary(
        Path(arguments["gguf"]), tokenizer, template, [*hello, *system, *asked, *own], end
    )


def _sample_facts(rows: Sequence[Any], drawn: sample.Sample) -> dict[str, Any]:
    return {
        "rows": len(drawn.rows),
        "rows_given": len(rows),
        "positions": len(drawn.positions),
        "answers": sum(drawn.answers),
        "longest": max(map(len, drawn.rows)),
        "cut_at": sample.LONGEST,
    }


def _legs(
    session: _Session,
    drawn: sample.Sample,
    rows: Sequence[Mapping[str, Any]],
    scratch: Path,
) -> None:
    """Every set of logits once; each is compared with the reference and let go."""
    arguments, found = session.arguments, session.found
    gguf = Path(arguments["gguf"])
    prompts = _prompts(rows)
    context = max([*map(len, drawn.rows), *(len(prompt) + _GREEDY_TOKENS for prompt in prompts)])
    with session.step("the file's greedy answers"), served.loaded(gguf, context, session.lora) as model:
        made = [(prompt, model.greedy(prompt, _GREEDY_TOKENS)) for prompt in prompts[:_GREEDY_PROMPTS]]
        precise = [model.after(prompt) for prompt in prompts]
    with session.step("what its server should answer"):
        with served.loaded(gguf, context, session.lora, like_server=True) as model:
            found["live"] = _expected_live(model, prompts, precise)
    source = session.source
    with session.step("the reference in float32"):
        expected = reference.logits(source, drawn, "the reference")
        found["greedy"] = reference.greedy(source, made)
    measured = _Legs(session, drawn, context, expected)
    measured.of_checkpoints(source)
    files = measured.of_files(gguf, source, scratch)
    with session.step("weights"):
        inside = replace(source, adapter=None) if session.lora else source
        found["weights"] = weights.fit_weights(files, inside, session.facts)


@dataclass(frozen=True)
class _Legs:
    """Compares sets of logits with `expected`, the reference's, and keeps what comes out."""

    session: _Session
    drawn: sample.Sample
    context: int
    expected: Any

    def of_checkpoints(self, source: Weights) -> None:
        """The base alone, the base as it was trained, a merged checkpoint: what there is of them."""
        merged = self.session.arguments["merged"]
        shifts = source.adapter and self.session.settings.get("nf4") and not source.nf4
        held = rounding_of_checkpoint(open_checkpoint(Path(merged))) if merged else None
        legs = {
            "base": replace(source, plain=True) if source.adapter else None,
            "trained": replace(source, nf4=True) if shifts else None,
            "merged": replace(source, base=Path(merged), adapter=None, nf4=False) if merged else None,
            "as merged": replace(source, rounding=held) if held and not held.is_exact else None,
        }
        for name, one in legs.items():
            if one:
                with self.session.step(name):
                    self._compare(name, reference.logits(one, self.drawn, f"the reference, {name}"))

    def of_files(self, gguf: Path, whole: Weights, scratch: Path) -> dict[str, Path]:
        """The file and its yardsticks; returns the files whose weights are worth a look.

        `whole` is what the reference was made of.
        """
        session, kind = self.session, self.session.found["file"]["type"]
        source = {**session.arguments, **session.settings}
        if session.lora:
            source["adapter"] = None  # it is loaded beside the yardsticks too
        measured = self._file("file", gguf)
        if kind in DIRECT:
            self._conversion(whole, gguf, measured)
            legs = session.found["legs"]
            if converts(legs["conversion"], legs.get("arithmetic")):
                return {"file": gguf}
        # For a direct conversion that failed it is the weights' yardstick, to name the stage by.
        with session.step("llama.cpp's own conversion"):
            given = session.arguments.get("f16")
            f16 = Path(given) if given else yardstick.make_f16(source, _directory(scratch / "f16"))
        if kind == "bf16":  # rounds eight times as much as f16 does
            same = yardstick.make_quantized(f16, scratch / "vendor.gguf", kind, usable_cores())
            return {"file": gguf, "f16": f16, "vendor": same}
        if kind in DIRECT:
            return {"file": gguf, "f16": f16}
        direct = self._file("f16", f16)
        self._conversion(whole, f16, direct)
        self._compare("file against f16", measured, direct)
        vendor = scratch / "vendor.gguf"
        with session.step("llama.cpp's own quantization"):
            yardstick.make_quantized(f16, vendor, kind, usable_cores(), session.importance)
            held = _doubted(session.found["file"], read_gguf(gguf), read_gguf(vendor))
            if held != kind:
                yardstick.make_quantized(f16, vendor, held, usable_cores(), session.importance)
        theirs = self._file("vendor", vendor, direct)
        against = session.found["legs"]["file against f16"]
        against["beyond_vendor"] = times_as_far(direct, measured, theirs, self.drawn)
        return {"file": gguf, "f16": f16, "vendor": vendor}

    def _conversion(self, whole: Weights, path: Path, logits: Any) -> None:
        """The unquantized file in `path` against the reference with its weights rounded as the file has them.

        The leg `rounded` is what that rounding does; `arithmetic` what rounding their inputs does beside it,
        as llama.cpp's products of 16 bits do: the scale for what is left, which is the conversion's.
        """
        rounding = rounding_of(path, self.session.facts.layers or 0)
        if rounding.is_exact:
            self._compare("conversion", logits)
            return
        source = replace(whole, rounding=rounding, beside=self.session.lora is not None)
        with self.session.step("the reference, rounded"):
            held = reference.logits(source, self.drawn, "the reference, rounded")
            self._compare("rounded", held)
            self._compare("conversion", logits, held)
            source = replace(source, rounding=replace(rounding, inputs=True))
            computed = reference.logits(source, self.drawn, "the reference, in 16 bits")
            self._compare("arithmetic", computed, held)

    def _file(self, name: str, path: Path, against: Any = None) -> Any:
        with self.session.step(name), served.loaded(path, self.context, self.session.lora) as model:
            logits = model.logits(self.drawn, f"logits of {path.name}")
            self._compare(name, logits, against)
        return logits

    def _compare(self, name: str, logits: Any, against: Any = None) -> None:
        found = compare(self.expected if against is None else against, logits, self.drawn)
        self.session.found.setdefault("legs", {})[name] = found


def _doubted(file: dict[str, Any], header: GgufHeader, vendor: GgufHeader) -> str:
    """The type that the file is held against: its own word, unless its tensors are finer than that allows.

    Else it is held to its word, and `file` says what is unlike it; `vendor` is llama.cpp's file of that type.
    """
    tensors, expected = most_frequent(header), most_frequent(vendor)
    if bits_of(tensors) > bits_of(expected):
        file["type"] = type_of_tensors(header)
    elif tensors != expected:
        file["unlike"] = {"tensors": tensors, "expected": expected}
    return str(file["type"])


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _prompts(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Rows up to their answer: what the model is asked."""
    found = []
    for row in rows[:_LIVE_PROMPTS]:
        labels = row.get("labels") or []
        start = next((at for at, label in enumerate(labels) if label >= 0), len(row["input_ids"]) // 2)
        found.append(list(row["input_ids"][: max(1, min(start, sample.LONGEST))]))
    return found


def _expected_live(
    model: served.ServedModel, prompts: Sequence[Sequence[int]], precise: Sequence[Any]
) -> list[dict[str, Any]]:
    """What the live server's top log-probabilities are held against, with the settings that it has.

    `shift` is the KL divergence of those settings from float32's `precise` logits of the same file.
    """
    expected = []
    for prompt, values in zip(prompts, precise, strict=True):
        logits = model.after(prompt)
        top = top_log_probabilities(logits, _LIVE_TOKENS)
        expected.append({"ids": list(prompt), "top": top, "shift": divergence(logits, values)})
    return expected
