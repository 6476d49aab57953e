"""Export: base and adapter become one quantized GGUF, in three inner steps. Runs in a worker.

First the vocabulary alone is converted and its ids are compared (a wrong pre-tokenizer is found
before anything large is written), then merge, convert to F16, quantize. Everything is written
under `out/work`, and only the finished, read-back file moves to `out`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge import process, report
from forge.adapter.read import read_adapter
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import StageError
from forge.export import pretokenizer, proof
from forge.export.merge import merged_tensors
from forge.export.quantize import fallbacks, quantize
from forge.export.tensors import write_safetensors
from forge.model.checkpoint import open_checkpoint
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.train.save import copy_tokenizer

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
    that the GGUF is to carry. `settings`: name, quant, keep_merged, threads.
    """
    started = time.monotonic()
    target, work = Path(out), Path(out) / "work"
    shutil.rmtree(work, ignore_errors=True)
    merged = work / MERGED_DIRECTORY
    merged.mkdir(parents=True)
    _write_description(Path(base), Path(tokenizer), chat_template, merged)
    decided = pretokenizer.decide(merged)
    convert = _Converter(Path(converters), decided, settings["name"])
    vocabulary = convert.run(merged, work / "vocabulary.gguf", "--vocab-only")
    compared = _prove_ids(merged, vocabulary, data)
    checkpoint = open_checkpoint(Path(base))
    tensors = merged_tensors(checkpoint, read_adapter(Path(adapter)) if adapter else None)
    write_safetensors(
        merged / "model.safetensors", tensors, lambda done, total: report.advance("merge", done, total)
    )
    quant = settings["quant"]
    plain = convert.run(merged, work / "plain.gguf", "--outtype", quant if quant in _UNQUANTIZED else "f16")
    if settings["keep_merged"]:
        merged.rename(target / MERGED_DIRECTORY)
    else:
        shutil.rmtree(merged)
    finished = work / "finished.gguf"
    if quant in _UNQUANTIZED:
        plain.rename(finished)
        header = read_gguf(finished)
    else:
        header = quantize(plain, finished, quant, settings["threads"] or os.cpu_count() or 1)
    finished.rename(target / GGUF_FILE)
    return _facts(target, header, quant) | {
        "ids_compared": compared.texts,
        "ids_limits": list(compared.limits),
        "pre_tokenizer": header.metadata.get("tokenizer.ggml.pre"),
        "seconds": round(time.monotonic() - started, 1),
    }


def _write_description(base: Path, tokenizer: Path, chat_template: str | None, merged: Path) -> None:
    """Everything of a checkpoint but its weights."""
    shutil.copyfile(base / "config.json", merged / "config.json")
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


def _prove_ids(merged: Path, vocabulary: Path, data: str | None) -> proof.Compared:
    texts = proof.test_strings()
    for name in (TRAIN_FILE, HELDOUT_FILE) if data else ():
        with (Path(str(data)) / name).open(encoding="utf-8") as stream:
            for line, _ in zip(stream, range(_OWN_ROWS), strict=False):
                texts += [message["content"] for message in json.loads(line)["messages"]]
    report.detail(f"comparing token ids of {len(texts)} texts")
    return proof.compare_ids(merged / "tokenizer.json", vocabulary, texts)


class _Converter:
    """llama.cpp's converter in a process of its own, with its own gguf-py."""

    def __init__(self, tree: Path, pre_tokenizer: str, name: str) -> None:
        entry = Path(__file__).with_name("convert_entry.py")
        self._command = [sys.executable, "-I", str(entry), str(tree), pre_tokenizer]
        self._name = name

    def run(self, source: Path, target: Path, *options: str) -> Path:
        command = [*self._command, str(source), "--outfile", str(target), "--model-name", self._name]
        label = "convert the vocabulary" if "--vocab-only" in options else "convert"
        report.advance(label, 0, 1)
        finished = process.run([*command, *options], log=sys.stderr, on_line=None)
        if finished.status or not target.is_file():
            target.unlink(missing_ok=True)
            lines = [line for line in finished.output.splitlines() if line.strip()]
            raise StageError(
                f"llama.cpp's converter failed: {lines[-1] if lines else 'no output'}",
                hint="its whole output is in the run's log",
            )
        report.advance(label, 1, 1)
        return target


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
