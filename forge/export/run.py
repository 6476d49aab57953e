"""Export: base and adapter become one quantized GGUF, in three inner steps. Runs in a worker.

First the vocabulary alone is converted and its ids are compared (a wrong pre-tokenizer is found
before anything large is written), then merge, convert to F16, quantize. Everything is written
under `out/work`, and only the finished, read-back file moves to `out`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.read import read_adapter
from forge.adapter.tokenizer import copy_tokenizer
from forge.chat.template import ChatTemplate, Message
from forge.export import pretokenizer, proof
from forge.export.convert import Choices, Converter
from forge.export.merge import merged_tensors
from forge.export.quantize import fallbacks, quantize, refuse_unloadable
from forge.export.tensors import write_safetensors
from forge.model.checkpoint import open_checkpoint
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.model.tokenizer_files import read_tokenizer

GGUF_FILE = "model.gguf"
MERGED_DIRECTORY = "merged"
_UNQUANTIZED = ("f16", "bf16", "f32")
_OWN_ROWS = 100


def export(
    base: str,
    adapter: str | None,
    tokenizer: str,
    chat_template: str | None,
    data: str | None,
    out: str,
    converters: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `out/model.gguf` and say what is in it.

    `tokenizer` is the directory whose tokenizer was trained with, `chat_template` the pinned text
    that the GGUF is to carry, `data` a directory of prepared rows. `settings`: name, quant,
    keep_merged, threads, end_of_turn_id. Raises `DataError` for an adapter or base that cannot be
    merged, `CheckError` when llama.cpp would read prompts differently, `StageError` otherwise.
    """
    started = time.monotonic()
    target, work = Path(out), Path(out) / "work"
    shutil.rmtree(work, ignore_errors=True)
    merged = work / MERGED_DIRECTORY
    merged.mkdir(parents=True)
    _write_description(Path(base), Path(tokenizer), chat_template, merged)
    checkpoint = open_checkpoint(Path(base))
    tensors = merged_tensors(checkpoint, read_adapter(Path(adapter)) if adapter else None)
    convert, compared = _prove_vocabulary(merged, work, data, Path(converters), settings)
    write_safetensors(
        merged / "model.safetensors", tensors, lambda done, total: report.advance("merge", done, total)
    )
    header = _write_gguf(convert, merged, work, target, settings)
    return _facts(target, header, settings["quant"]) | {
        "ids_compared": compared.texts,
        "ids_limits": list(compared.limits),
        "pre_tokenizer": header.metadata.get("tokenizer.ggml.pre"),
        "seconds": round(time.monotonic() - started, 1),
    }


def _write_gguf(
    convert: Converter, merged: Path, work: Path, target: Path, settings: Mapping[str, Any]
) -> GgufHeader:
    """Convert and quantize; the finished file alone goes to `target`, and the merged one if wanted."""
    quant = settings["quant"]
    plain = convert.run(merged, work / "plain.gguf", "--outtype", quant if quant in _UNQUANTIZED else "f16")
    refuse_unloadable(plain)
    finished = work / "finished.gguf"
    if quant in _UNQUANTIZED:
        plain.rename(finished)
        header = read_gguf(finished)
    else:
        if not settings["keep_merged"]:
            shutil.rmtree(merged)
        header = quantize(plain, finished, quant, settings["threads"] or os.cpu_count() or 1)
    if settings["keep_merged"]:
        merged.rename(target / MERGED_DIRECTORY)
    finished.rename(target / GGUF_FILE)
    shutil.rmtree(work)
    return header


def _write_description(base: Path, tokenizer: Path, chat_template: str | None, merged: Path) -> None:
    """Everything of a checkpoint but its weights."""
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "n_positions" in described:
        # GPT-2's converter reads `n_ctx`, which transformers no longer writes.
        described.setdefault("n_ctx", described["n_positions"])
    (merged / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(base, merged)
    if tokenizer != base:
        copy_tokenizer(tokenizer, merged)
    if chat_template is not None:
        # One template alone, and the pinned one: an older file beside it might be preferred.
        (merged / "chat_template.json").unlink(missing_ok=True)
        (merged / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        configuration = merged / "tokenizer_config.json"
        fields = json.loads(configuration.read_text(encoding="utf-8"))
        if fields.pop("chat_template", None) is not None:
            configuration.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")


def _prove_vocabulary(
    merged: Path, work: Path, data: str | None, converters: Path, settings: Mapping[str, Any]
) -> tuple[Converter, proof.Compared]:
    """The converter to use, once the vocabulary that it writes is proved."""
    files = read_tokenizer(merged)
    template = None
    if files.chat_template is not None:
        tokens = {f"{name}_token": token for name, token in files.tokens.items()}
        template = ChatTemplate(files.chat_template, tokens)
    tried = proof.cases(template, proof.test_strings(), _own_conversations(data))
    bos = files.tokens.get("bos")
    choices = Choices(
        pre_tokenizer=pretokenizer.decide(merged),
        adds_bos=None if template is None else bool(bos and tried and tried[0].text.startswith(bos)),
        space_prefix=pretokenizer.space_prefix(merged),
        end_of_turn=settings.get("end_of_turn_id"),
    )
    convert = Converter(converters, choices, pretokenizer.model_name(merged, settings["name"]))
    vocabulary = convert.run(merged, work / "vocabulary.gguf", "--vocab-only")
    report.detail(f"comparing token ids of {len(tried)} texts")
    return convert, proof.compare_ids(merged, vocabulary, tried, end_of_turn=choices.end_of_turn)


def _own_conversations(data: str | None) -> list[list[Message]]:
    found: list[list[Message]] = []
    for path in sorted(Path(data).glob("*.jsonl")) if data else ():
        with path.open(encoding="utf-8") as stream:
            found += [json.loads(line)["messages"] for line in islice(stream, _OWN_ROWS)]
    return found


def _facts(target: Path, header: GgufHeader, quant: str) -> dict[str, Any]:
    size = (target / GGUF_FILE).stat().st_size
    fell_back = fallbacks(header, quant)
    if fell_back:
        report.warning(
            f"{len(fell_back)} of {len(header.tensors)} tensors have rows that {quant} cannot hold "
            f"and got another type: {', '.join(sorted(set(fell_back.values())))}"
        )
    weights = sum(_numel(tensor.shape) for tensor in header.tensors.values())
    return {
        "architecture": header.architecture,
        "quant": quant,
        "bytes": size,
        "tensor_types": header.tensor_types,
        "fallbacks": fell_back,
        "bits_per_weight": round(8 * size / weights, 2),
    }


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
