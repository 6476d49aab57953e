"""An importance matrix, and a type within a budget, for `forge export` on files, without a ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forge import worker
from forge.chat.template import ChatTemplate
from forge.data.prepare import HELDOUT_FILE
from forge.data.prompt_format import prompt_format
from forge.export.request import ExportRequest
from forge.model.config import Configuration
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer
from forge.recipe.quants import BUDGETED
from forge.resolve.rows import own_rows, plain_rows
from forge.stages.calibrate import failure_of_search, show_search
from forge.verify.calibrate import IMPORTANCE_FILE, calibrate
from forge.verify.calibration import Calibrated, CalibrationRequest


def calibrate_alone(
    request: ExportRequest, data: Path, configuration: Configuration, max_kl: float | None
) -> tuple[ExportRequest, Calibrated]:
    """`request` with the importance matrix of `data`'s rows, and with `max_kl` the type.

    A tenth of the rows is measured on and left out of the matrix. Raises `CheckError` when no type is
    within the budget.
    """
    rows, measured = _rows(request, data, configuration)
    out = request.out / "calibration"
    out.mkdir(exist_ok=True)
    calibrated = worker.perform(
        calibrate,
        CalibrationRequest(
            request.model,
            rows=rows,
            measured_rows=measured,
            out=out,
            name=request.name,
            types=() if max_kl is None else tuple(BUDGETED),
            max_kl=max_kl,
            plain=request.plain,
            threads=request.threads,
        ),
    )
    show_search(calibrated)
    if failure := failure_of_search(calibrated):
        raise failure
    chosen = calibrated.search.quant if calibrated.search else None
    return replace(request, importance=out / IMPORTANCE_FILE, quant=chosen or request.quant), calibrated


def _rows(request: ExportRequest, data: Path, configuration: Configuration) -> tuple[Path, Path]:
    """The rows to calibrate on, and those to measure on: others, where there are enough."""
    files = read_tokenizer(request.model.tokenizer)
    tokenizer, scratch = open_tokenizer(files.directory), request.out
    if request.model.chat_template is None:
        rows = plain_rows(data, tokenizer, scratch)
        return rows, rows
    form = prompt_format(ChatTemplate(request.model.chat_template, files.template_tokens), tokenizer)
    rows = own_rows(data, form, configuration.max_positions, scratch, heldout=0.1)
    held = scratch / HELDOUT_FILE
    return rows, held if held.stat().st_size else rows
