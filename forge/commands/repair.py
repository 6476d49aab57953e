"""`forge repair FILE.gguf --base BASE`: somebody's GGUF with the metadata that base and adapter give it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from forge import report, worker
from forge.codec import to_plain
from forge.commands.export import pinned_template
from forge.commands.verify import Files, judged_of
from forge.errors import CheckError, Problem, RecipeError
from forge.export.repair import MetadataChange, Repair, repair
from forge.export.request import Ingredients
from forge.files import work_beside
from forge.model.architectures import check_exportable
from forge.model.config import check_unquantized, read_configuration
from forge.model.gguf_header import GgufHeader, read_whole_gguf
from forge.resolve.bases import directory_of
from forge.resolve.taught import trained_tokenizer
from forge.store.artifacts import open_store
from forge.tools.llama_cpp import find_converters
from forge.verify.inputs import type_of
from forge.verify.verdict import Certificate

SUFFIX = "-repaired.gguf"


def repair_file(files: Files, out: Path | None = None) -> Mapping[str, object]:
    """Write a verified copy to `out`, whole or not at all; nothing where the file is sound as it is.

    Raises `RecipeError` for an `out` that cannot be, `DataError` for what cannot be read, and `CheckError`
    with the export that makes them where new weights are needed.
    """
    gguf = files.gguf.absolute()
    out = (out or gguf.with_name(f"{gguf.stem}{SUFFIX}")).absolute()
    if out == gguf or out.is_dir():
        what = "the file that is repaired" if out == gguf else "a directory"
        raise RecipeError(f"--out: {out} is {what}", hint="name the copy to write")
    header = read_whole_gguf(gguf)
    model = _ingredients(files)
    with work_beside(out) as scratch:
        made = scratch / gguf.name
        repaired = worker.perform(repair, Repair(model, gguf, made))
        if repaired.beyond:
            problems = [Problem(fault) for fault in repaired.beyond]
            raise _beyond_repair(files, header, "its tensors are not the model's", problems)
        _show(repaired.changes)
        copy = Files(**{**vars(files), "gguf": made}) if repaired.changes else files
        judged, _ = judged_of(copy, called=out if repaired.changes else gguf)
        if not judged.ok:
            raise _unsound(files, header, judged)
        if repaired.changes:
            made.replace(out)
    if repaired.changes:
        report.success(f"wrote {out}: {len(repaired.changes)} keys repaired, verified")
    else:
        report.success(f"{gguf} needs no repair: nothing was written")
    return {
        "gguf": str(out if repaired.changes else gguf),
        "repaired": to_plain(repaired.changes),
        "left": [],
        "certificate": judged.plain(),
    }


def _ingredients(files: Files) -> Ingredients:
    base = directory_of(files.base)
    configuration = read_configuration(base)
    check_unquantized(configuration, str(base))
    check_exportable(configuration)
    tokenizer = trained_tokenizer(base, files.adapter)
    template, end_of_turn = pinned_template(tokenizer)
    return Ingredients(
        base=base.absolute(),
        adapter=files.adapter.absolute() if files.adapter else None,
        tokenizer=tokenizer.directory,
        chat_template=template,
        converters=find_converters(open_store(read_only=True).root),
        end_of_turn_id=end_of_turn,
        merge_base=files.merge_base,
    )


def _show(changes: tuple[MetadataChange, ...]) -> None:
    for change in changes:
        report.info(str(change))


def _unsound(files: Files, header: GgufHeader, judged: Certificate) -> CheckError:
    failure = _beyond_repair(files, header, judged.verdict, [Problem(problem) for problem in judged.problems])
    failure.fields = {**failure.fields, "certificate": judged.plain()}
    return failure


def _beyond_repair(files: Files, header: GgufHeader, why: str, problems: list[Problem]) -> CheckError:
    words = ["forge", "export", "--base", files.base]
    if files.adapter:
        words += ["--adapter", str(files.adapter)]
    if files.merge_base != "original":
        words += ["--merge-base", files.merge_base]
    words += ["--quant", type_of(header), "--out", f"{header.path.stem}-new.gguf"]
    failure = CheckError(
        f"{header.path} cannot be repaired without new weights: {why}",
        hint=f"make them: {shlex.join(words)}",
        problems=problems,
    )
    failure.fields = {"repaired": [], "left": [str(problem) for problem in problems]}
    return failure
