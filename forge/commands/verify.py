"""`forge verify` on files, without a ship: anybody's GGUF against the base and adapter that it should be."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forge import report, worker
from forge.adapter.read import read_adapter
from forge.chat.template import ChatTemplate
from forge.errors import DataError
from forge.export.importance import weights_in
from forge.files import write_text
from forge.model.checkpoint import open_checkpoint
from forge.model.config import check_unquantized, read_configuration
from forge.model.estimate import certificate_disk
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import TokenizerFiles, open_tokenizer
from forge.resolve.bases import directory_of
from forge.resolve.certified import basis_of
from forge.resolve.rows import builtin_rows, own_rows, plain_rows
from forge.resolve.taught import trained_tokenizer
from forge.stages.verify import failure_of_certificate, show_certificate
from forge.store.artifacts import open_store
from forge.tools.llama_cpp import find_converters
from forge.tools.scratch import scratch
from forge.verify.basis import Evidence, certificate_text, evidence_of
from forge.verify.measure import measure
from forge.verify.measurement import Gates, VerifyRequest
from forge.verify.verdict import Certificate, judge


@dataclass(frozen=True)
class Files:
    """A GGUF, and what it should have been made of.

    `lora` is the adapter's own GGUF where `gguf` is only the base; `merge_base` (original or nf4) what the
    adapter was merged into; `merged` a merged checkpoint on the way; `imatrix` the importance matrix that
    `gguf` was rounded by. `trained_in_4bit`: the adapter saw the base in NF4.
    """

    base: str
    gguf: Path
    adapter: Path | None = None
    lora: Path | None = None
    merge_base: Literal["original", "nf4"] = "original"
    merged: Path | None = None
    imatrix: Path | None = None
    trained_in_4bit: bool = False


@dataclass(frozen=True)
class Terms:
    """On which rows and within which limits a file is measured, and where its certificate goes."""

    data: Path | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    minutes: float | None = None
    certificate: Path | None = None


def certify(files: Files, terms: Terms) -> Mapping[str, object]:
    """Measure and judge; the certificate goes to `--json` whatever it says.

    Raises `CheckError` for a file that is not base and adapter, and what `judged_on` raises.
    """
    judged = judged_on(files, terms)
    if failure := failure_of_certificate(judged):
        raise failure
    plain = judged.plain()
    report.result(plain)
    return plain


def judged_on(files: Files, terms: Terms) -> Certificate:
    """Measure and judge, and keep the certificate where `terms` say.

    Raises `DataError` for a file that cannot be compared.
    """
    gates = Gates(terms.max_kl, terms.min_top1)
    judged, evidence = judged_of(files, data=terms.data, gates=gates, minutes=terms.minutes)
    if terms.certificate:
        write_text(terms.certificate, certificate_text(judged.plain(), evidence))
        report.info(f"the certificate is in {terms.certificate}; it holds the rows that were compared")
    return judged


def judged_of(
    files: Files,
    *,
    data: Path | None = None,
    gates: Gates | None = None,
    minutes: float | None = None,
    called: Path | None = None,
) -> tuple[Certificate, Evidence]:
    """Measure, judge and show; `called` is the name that the certificate knows the file by.

    Raises `DataError` for a file that cannot be compared.
    """
    gates = gates or Gates()
    base = directory_of(files.base)
    configuration = read_configuration(base)
    _check(files, base)
    tokenizer = trained_tokenizer(base, files.adapter, max_positions=configuration.max_positions)
    with scratch("verify") as place:
        _check_space(open_checkpoint(base).numel, files.gguf, place)
        rows, end = _rows(tokenizer, data, configuration.max_positions, place)
        request = VerifyRequest(
            base=base.absolute(),
            gguf=files.gguf.absolute(),
            adapter=_absolute(files.adapter),
            lora=_absolute(files.lora),
            merged=_absolute(files.merged),
            importance=_absolute(files.imatrix),
            tokenizer=tokenizer.directory.absolute(),
            chat_template=tokenizer.chat_template,
            rows=rows,
            converters=find_converters(open_store(read_only=True).root),
            scratch=place,
            merge_base=files.merge_base,
            trained_in_4bit=files.trained_in_4bit,
            end_of_turn_id=end,
            max_kl=gates.max_kl,
            min_top1=gates.min_top1,
            minutes=minutes,
        )
        measured = worker.perform(measure, request)
        names = {**_names(files, request), "gguf": str((called or files.gguf).absolute())}
        basis = basis_of(request, names, open_store(read_only=True).digests)
        evidence = evidence_of(rows, measured.sample)
    judged = judge(measured.of(basis), gates)
    show_certificate(judged)
    return judged, evidence


def _names(files: Files, request: VerifyRequest) -> dict[str, str]:
    """Where each item is: a base by its name, if it has one."""
    named = {
        "base": request.base if Path(files.base).is_dir() else files.base,
        "gguf": request.gguf,
        "adapter": request.adapter,
        "lora": request.lora,
        "merged": request.merged,
        "imatrix": request.importance,
    }
    return {option: str(where) for option, where in named.items() if where}


def _absolute(path: Path | None) -> Path | None:
    return path.absolute() if path else None


def _check(files: Files, base: Path) -> None:
    """Raise `DataError` for a file that is not what it is named as, before anything is loaded."""
    check_unquantized(read_configuration(base), str(base))
    for gguf in (files.gguf, files.lora):
        if gguf:
            read_gguf(gguf)
    if files.imatrix:
        weights_in(files.imatrix)
    if files.adapter:
        read_adapter(files.adapter)
    elif files.lora:
        raise DataError("--lora needs the adapter that it was made from", hint="name it with --adapter")
    elif files.trained_in_4bit:
        raise DataError("--trained-in-4bit speaks of an adapter", hint="name it with --adapter")
    if files.merged:
        open_checkpoint(files.merged)


def _rows(
    files: TokenizerFiles, data: Path | None, context: int | None, scratch: Path
) -> tuple[Path, int | None]:
    """The rows to compare on, and the id that ends an answer."""
    from forge.data.prompt_format import prompt_format

    tokenizer = open_tokenizer(files.directory)
    if files.chat_template is None:
        return plain_rows(data, tokenizer, scratch), None
    form = prompt_format(ChatTemplate(files.chat_template, files.template_tokens), tokenizer)
    rows = own_rows(data, form, context, scratch) if data else builtin_rows(form, context, scratch)
    return rows, form.end_of_turn_id


def _check_space(parameters: int, gguf: Path, scratch: Path) -> None:
    """The yardsticks are an F16 file and one of the type of `gguf`."""
    needed = certificate_disk(parameters, "f16").total + gguf.stat().st_size
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise DataError(
            f"comparing needs {needed / 1e9:.1f} GB of disk in {scratch.parent}, "
            f"there are {free / 1e9:.1f} GB",
            hint="set TMPDIR to a directory on a larger disk",
        )
