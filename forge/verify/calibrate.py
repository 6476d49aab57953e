"""Which type is small enough and good enough, found by trying. Runs in a worker.

An F16 file is made as the certificate makes it; on it the training rows give an importance matrix.
With a budget, types are exported with that matrix from the largest down, and each file's
probabilities are compared with those of the F16 file on other rows; the smallest by bytes that is within
the budget is taken. Smaller types lose more, but not strictly so, and below four bits the K and IQ types go
each its own way: a type is left out only when two larger ones of its kind in a row are over the budget.

What was measured is kept in `out/work`: a ship's stopped search goes on with the next type. Not covered: an
adapter beside its base, whose products with the weights are no part of the file.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge import report
from forge.codec import from_plain, to_plain
from forge.errors import DataError, UnmadeTypeError
from forge.export import upstream
from forge.export.importance import write_importance
from forge.export.request import ExportRequest
from forge.export.run import GGUF_FILE, export_gguf
from forge.files import kept_json, write_text
from forge.model.config import read_configuration
from forge.model.tokenizer_files import read_tokenizer
from forge.verify import sample, served
from forge.verify.activations import squares
from forge.verify.calibration import (
    Calibrated,
    CalibrationRequest,
    Importance,
    MeasuredOn,
    Search,
    TypeRow,
)
from forge.verify.compare import compare
from forge.verify.inputs import read_token_rows
from forge.verify.yardstick import export_f16

IMPORTANCE_FILE, CHOICE_FILE = "importance.gguf", "choice.json"
_TOKENS = 16384
"""Enough for means of squares: llama.cpp's own matrices are usually made of some 50,000 tokens."""
_LONGEST = 2048
_TIMED_TOKENS = 64
_OVER_THE_BUDGET = 2
_OWN_ROWS = (
    "no rows are held out: the types were measured on the rows that the importance matrix was made of, where "
    "they lose less than on others"
)


def calibrate(request: CalibrationRequest) -> Calibrated:
    """Write `importance.gguf` into the request's directory, and with a budget `choice.json`.

    Raises what `export` raises, `DataError` for rows that cannot be used.
    """
    out, work = request.out, request.out / "work"
    work.mkdir(exist_ok=True)
    upstream.load_converters(request.model.converters)  # before anything imports another gguf
    for left in work.iterdir():
        if left.is_dir() and left.name != "f16":
            shutil.rmtree(left)  # of a type that was being tried when the search was killed
    f16 = work / "f16" / GGUF_FILE
    if not f16.is_file():
        shutil.rmtree(f16.parent, ignore_errors=True)
        f16.parent.mkdir()
        export_f16(request.model, f16.parent)
    importance = _importance(request, f16, work)
    search = None
    if request.types and request.max_kl is not None:
        search = _Search(request, request.max_kl, f16, work).walk()
        (out / CHOICE_FILE).write_text(json.dumps({"quant": search.quant}) + "\n", encoding="utf-8")
    shutil.copyfile(work / IMPORTANCE_FILE, out / IMPORTANCE_FILE)
    shutil.rmtree(work)
    return Calibrated(importance, search)


def smallest(types: Sequence[TypeRow], max_kl: float) -> str | None:
    """The name of the smallest of the measured types that is within the budget."""
    within = [row for row in types if row.kl_mean <= max_kl]
    return min(within, key=lambda row: row.bytes).quant if within else None


def _importance(request: CalibrationRequest, f16: Path, work: Path) -> Importance:
    """Write the importance matrix of the rows; returns what it was made of, which is written last."""
    made = work / "importance.json"
    if (work / IMPORTANCE_FILE).is_file():
        with contextlib.suppress(OSError, ValueError):
            return from_plain(Importance, kept_json(made))
    context = read_configuration(request.model.base).max_positions
    rows = _drawn(read_token_rows(request.rows), context)
    means = squares(f16, rows)
    write_importance(work / IMPORTANCE_FILE, means, len(rows), max(map(len, rows)))
    idle = sum(int((counts == 0).sum()) for _, counts in means.values())
    if idle:
        report.warning(f"no token of the rows came to {idle} matrices of experts: they are rounded evenly")
    importance = Importance(len(means), len(rows), sum(map(len, rows)), idle)
    write_text(made, json.dumps(to_plain(importance)))
    return importance


def _drawn(rows: Sequence[Mapping[str, Any]], context: int | None) -> list[list[int]]:
    """Token ids of rows spread over all, `_TOKENS` at most in all."""
    longest = min(_LONGEST, context or _LONGEST)
    usable = [list(row["input_ids"][:longest]) for row in rows if row["input_ids"]]
    if not usable:
        raise DataError("no row has a token to calibrate on", hint="give rows with data.source, or --data")
    tokens = 0
    kept: list[list[int]] = []
    for number in random.Random(0).sample(range(len(usable)), len(usable)):
        tokens += len(usable[number])
        if kept and tokens > _TOKENS:
            break
        kept.append(usable[number])
    return kept


def _lines(kind: str) -> tuple[str, ...]:
    """The kinds of types, each in one line by size, that `kind` is of: down to four bits there is one."""
    if kind.startswith("iq"):
        return ("IQ",)
    return ("K",) if kind.startswith(("q2", "q3")) else ("K", "IQ")


class _Search:
    """The walk down the types, each exported, measured and removed."""

    def __init__(self, request: CalibrationRequest, max_kl: float, f16: Path, work: Path) -> None:
        self._request = request
        self._max_kl = max_kl
        self._work = work
        self._kept = work / "measured.jsonl"
        base = request.model.base
        facts = read_configuration(base)
        self._rows = read_token_rows(request.measured_rows)
        vocabulary = facts.vocabulary_size or read_tokenizer(base).vocabulary_size
        self._sample = sample.draw(self._rows, vocabulary, facts.max_positions)
        self._expected, size, speed = self._read(f16, "f16")
        self._f16 = self._row("f16", size, speed, self._expected)

    def walk(self) -> Search:
        """The types that were measured, those that were left out with the reason, and the one chosen."""
        measured: list[TypeRow] = []
        left_out: dict[str, str] = {}
        unmade: UnmadeTypeError | None = None
        known, over = self._known(), dict.fromkeys(("K", "IQ"), 0)
        for kind in self._request.types:
            lines = _lines(kind)
            if all(over[line] == _OVER_THE_BUDGET for line in lines):
                left_out[kind] = "two larger types of its kind are over the budget"
                continue
            try:
                row = known.get(kind) or self._try(kind)
            except UnmadeTypeError as failure:
                left_out[kind] = failure.message
                unmade = unmade or failure
                continue
            measured.append(row)
            report.info(f"{kind}: {row.bytes / 1e6:.1f} MB, KL {row.kl_mean:.2g}, top-1 {row.top1:.2%}")
            is_over = row.kl_mean > self._max_kl
            over |= {line: over[line] + 1 if is_over else 0 for line in lines}
        if unmade and not measured:
            raise unmade
        own_rows = self._request.rows == self._request.measured_rows
        return Search(
            max_kl=self._max_kl,
            quant=smallest(measured, self._max_kl),
            types=tuple(measured),
            left_out=left_out,
            f16=self._f16,
            measured_on=MeasuredOn(len(self._sample.rows), len(self._sample.positions)),
            warnings=(_OWN_ROWS,) if own_rows else (),
        )

    def _known(self) -> dict[str, TypeRow]:
        """What a stopped search has measured; a line that was cut or damaged is removed."""
        known: dict[str, TypeRow] = {}
        whole = ""
        for line in self._kept.read_bytes().splitlines() if self._kept.is_file() else ():
            with contextlib.suppress(ValueError):
                row = from_plain(TypeRow, json.loads(line))
                known[row.quant] = row
                whole += json.dumps(to_plain(row)) + "\n"
        write_text(self._kept, whole)
        return known

    def _try(self, kind: str) -> TypeRow:
        """One type's row of the table; its file is gone afterwards."""
        request = self._request
        with tempfile.TemporaryDirectory(dir=self._work, prefix=f"{kind}-") as scratch:
            export_gguf(
                ExportRequest(
                    request.model,
                    Path(scratch),
                    name=request.name,
                    quant=kind,
                    importance=self._work / IMPORTANCE_FILE,
                    plain=request.plain,
                    threads=request.threads,
                )
            )
            logits, size, speed = self._read(Path(scratch) / GGUF_FILE, kind)
        row = self._row(kind, size, speed, logits)
        with self._kept.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(to_plain(row)) + "\n")
        return row

    def _read(self, path: Path, name: str) -> tuple[Any, int, float]:
        """A file's logits at the sampled positions; its bytes and its tokens a second."""
        timed = max(self._sample.rows, key=len)[:_TIMED_TOKENS]
        with served.loaded(path, max(map(len, self._sample.rows))) as model:
            logits = model.logits(self._sample, f"logits of {name}")
            speed = model.tokens_per_second(timed)
        return logits, path.stat().st_size, round(speed, 1)

    def _row(self, kind: str, size: int, speed: float, logits: Any) -> TypeRow:
        leg = compare(self._expected, logits, self._sample)
        return TypeRow(
            quant=kind,
            bytes=size,
            tokens_per_second=speed,
            kl_mean=leg.kl_mean,
            kl_error=leg.kl_error,
            kl_max=leg.kl_max,
            top1=leg.top1,
            perplexity=leg.perplexity,
        )
