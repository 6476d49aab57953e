"""`forge export --base --adapter --out`: a GGUF without a ship."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from forge import report, worker
from forge.chat.template import ChatTemplate
from forge.codec import to_plain
from forge.data.prompt_format import prompt_format
from forge.errors import DataError, RecipeError
from forge.export.cost import cost_of
from forge.export.request import ExportRequest, Ingredients, MergeBase, Mode
from forge.export.run import ADAPTER_FILE, GGUF_FILE, MERGED_DIRECTORY, export_gguf
from forge.export.types import UNQUANTIZED
from forge.files import work_beside
from forge.model.architectures import check_exportable
from forge.model.config import check_numbers, check_unquantized, read_configuration
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import TokenizerFiles, open_tokenizer
from forge.recipe.quants import NEED_IMATRIX, QUANTS
from forge.resolve.bases import directory_of
from forge.resolve.taught import trained_tokenizer
from forge.runs.files import IMPORTANCE_SUFFIX, adapter_beside
from forge.store.artifacts import open_store
from forge.tools.llama_cpp import find_converters


def export(
    base: str,
    adapter: Path | None,
    out: Path,
    *,
    quant: str | None = None,
    data: Path | None = None,
    max_kl: float | None = None,
    mode: Mode = "merged",
    threads: int | None = None,
    plain: bool = False,
    keep_merged: bool = False,
    merge_base: MergeBase = "original",
) -> Mapping[str, object]:
    """Write the GGUF `out`, and beside it what `mode` and `keep_merged` ask for.

    It is rounded by an importance matrix of the rows in `data`, which `forge verify` asks for; its type is
    `quant`, or the smallest within `max_kl`. Files appear whole or not at all. Raises `RecipeError` for bad
    options, `DataError` for what cannot be exported or a busy `out`, `CheckError` when no type is good.
    """
    _check_options(out, quant, data, max_kl, is_merged=mode == "merged" and not plain)
    quant, out = (quant or "q4_k_m").lower(), out.absolute()
    directory = directory_of(base)
    configuration = read_configuration(directory)
    check_unquantized(configuration, str(directory))
    check_numbers(configuration, str(directory / "config.json"))
    check_exportable(configuration)
    tokenizer = trained_tokenizer(directory, adapter)
    template, end_of_turn = (tokenizer.chat_template, None) if plain else pinned_template(tokenizer)
    with work_beside(out) as scratch:
        model = Ingredients(
            base=directory,
            adapter=adapter.absolute() if adapter else None,
            tokenizer=tokenizer.directory,
            chat_template=template,
            converters=find_converters(open_store(read_only=True).root),
            end_of_turn_id=end_of_turn,
            merge_base=merge_base,
        )
        request = ExportRequest(
            model, scratch, name=out.stem, quant=quant, mode=mode, keep_merged=keep_merged, plain=plain,
            threads=threads,
        )  # fmt: skip
        calibration = None
        if data:
            # Imported here: it brings a recipe's code, which other exports start without.
            from forge.commands.calibrate import calibrate_alone

            request, calibration = calibrate_alone(request, data, configuration, max_kl)
        exported = worker.perform(export_gguf, request)
        files = _publish(scratch, out, request.importance)
    report.success(f"wrote {out}: {exported.bytes / 1e6:.1f} MB in {exported.seconds:.1f} s")
    report.info(cost_of(read_gguf(out), exported.quant))
    return {**files, **to_plain(exported), "calibration": calibration.facts() if calibration else None}


def _check_options(
    out: Path, quant: str | None, data: Path | None, max_kl: float | None, *, is_merged: bool
) -> None:
    """Raise `RecipeError` for options that cannot be, or do not go together."""
    if out.is_dir():
        raise RecipeError(f"--out: {out.absolute()} is a directory", hint="name the GGUF file to write")
    if quant and quant.lower() not in QUANTS:
        raise RecipeError(f"--quant: no type {quant.lower()}", hint=f"there is {', '.join(QUANTS)}")
    if quant and max_kl is not None:
        raise RecipeError("--max-kl chooses the type, and --quant names one", hint="give one of the two")
    if max_kl is not None and not math.isfinite(max_kl):
        raise RecipeError(f"--max-kl: {max_kl} is no limit", hint="such as 0.03")
    if data is not None and (quant or "").lower() in UNQUANTIZED:
        raise RecipeError(f"{quant} is not rounded by importance", hint="leave --data out")
    if data is None and max_kl is not None:
        raise RecipeError("--max-kl needs rows to measure on", hint="name them with --data")
    if data is None and (quant or "").lower() in NEED_IMATRIX:
        raise RecipeError(f"{quant} needs an importance matrix", hint="name rows to make it of with --data")
    if data is not None and not is_merged:
        raise RecipeError("--data looks at one merged model", hint="leave --plain out, and use --mode merged")


def pinned_template(tokenizer: TokenizerFiles) -> tuple[str | None, int | None]:
    """The template as a ship would pin it, and the id that ends an answer."""
    if tokenizer.chat_template is None:
        return None, None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.template_tokens)
    read = open_tokenizer(tokenizer.directory)
    try:
        return template.pinned_source(), prompt_format(template, read).end_of_turn_id
    except DataError as error:
        error.hint = f"{error.hint}; --plain leaves all of this to llama.cpp's converter"
        raise


def _publish(scratch: Path, out: Path, importance: Path | None) -> dict[str, str | None]:
    """Move what was made to its final names: the GGUF last, since that is what people look for."""
    files: dict[str, str | None] = {}
    adapter, merged = adapter_beside(out), out.with_name(f"{out.stem}-merged")
    matrix = out.with_name(f"{out.stem}{IMPORTANCE_SUFFIX}")
    for old, made in ((adapter, (scratch / ADAPTER_FILE).is_file()), (matrix, bool(importance))):
        if old.is_file() and not made:
            report.warning(f"{old.name} is of an earlier export: it does not belong to the new {out.name}")
    if (scratch / ADAPTER_FILE).is_file():
        out.unlink(missing_ok=True)  # it may be merged already: nobody is to find the two together
        (scratch / ADAPTER_FILE).replace(adapter)
        files["adapter_gguf"] = str(adapter)
    if (scratch / MERGED_DIRECTORY).is_dir():
        shutil.rmtree(merged, ignore_errors=True)
        (scratch / MERGED_DIRECTORY).rename(merged)
        files["merged"] = str(merged)
    if importance:
        importance.replace(matrix)
        files["imatrix"] = str(matrix)
    (scratch / GGUF_FILE).replace(out)
    return {"gguf": str(out), **files}
