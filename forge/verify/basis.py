"""What a certificate is of, so that another machine can repeat it: the certificate's file and its parts.

A certificate names its schema, the digests of all it compared, the versions that computed it, its seed and
its positions. Its file holds the rows besides: whoever has the model's files needs nothing else. So it shows
the text of those rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.codec import from_plain, to_plain
from forge.errors import DataError
from forge.verify.measurement import Basis, Drawn, Gates, Positions
from forge.verify.sample import FIRST_ROWS
from forge.verify.verdict import FORMAT, SCHEMA

_AGAIN = "verify the file anew: forge verify --base BASE --gguf FILE --certificate CERTIFICATE.json"


@dataclass(frozen=True)
class Evidence:
    """The rows that were compared, and which positions of them; `positions` counts these rows."""

    rows: tuple[Mapping[str, Any], ...]
    positions: Positions


@dataclass(frozen=True)
class Verdict:
    """What must be the same in a certificate that is repeated."""

    ok: bool
    broken_stage: str | None
    handovers: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)

    def unlike(self, other: Verdict) -> Iterator[str]:
        """Each thing that is another in `other`, in words."""
        words = {True: "sound", False: "broken"}
        if self.ok is not other.ok:
            yield f"the file was {words[self.ok]}, here it is {words[other.ok]}"
        if self.broken_stage != other.broken_stage:
            yield f"the stage at fault was {self.broken_stage or 'none'}, here {other.broken_stage or 'none'}"
        own, others = (
            {(leg["from"], leg["to"]): leg["ok"] for leg in kept.handovers if leg["to"] != "live server"}
            for kept in (self, other)
        )
        for name in dict.fromkeys([*own, *others]):
            was, here = own.get(name, "not compared"), others.get(name, "not compared")
            if was != here:
                before, after = (words.get(value, value) for value in (was, here))
                yield f"{' → '.join(name)} was {before}, here it is {after}"


@dataclass(frozen=True)
class KeptCertificate:
    """A certificate's file as far as it is read again."""

    basis: Basis
    gates: Gates
    evidence: Evidence
    verdict: Verdict


def evidence_of(path: Path, drawn: Drawn) -> Evidence:
    """Of the rows in `path` those that a measurement looked at, without what stands behind the cut."""
    wanted = sorted({*range(min(FIRST_ROWS, drawn.rows_given)), *drawn.positions_in.rows})
    numbers = {number: place for place, number in enumerate(wanted)}
    rows = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            if number in numbers:
                row = json.loads(line)
                cut = {name: row[name][: drawn.cut_at] for name in ("input_ids", "labels") if row.get(name)}
                rows.append({**row, **cut})
    places = tuple(numbers[number] for number in drawn.positions_in.rows)
    return Evidence(tuple(rows), Positions(places, drawn.positions_in.indices))


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The rows of a certificate as the JSONL that a measurement reads."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def certificate_text(certificate: Mapping[str, Any], evidence: Evidence) -> str:
    """A certificate's file: its plain JSON, and the rows."""
    return json.dumps({**certificate, "evidence": to_plain(evidence)}, ensure_ascii=False) + "\n"


def read_certificate(path: Path) -> KeptCertificate:
    """Raises `DataError` for what is no certificate's file of this format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise DataError(f"{path}: cannot be read: {failure.strerror}") from failure
    except ValueError as failure:
        raise DataError(f"{path}: no certificate: {failure}", hint=_AGAIN) from failure
    if not isinstance(content, dict) or not {"ok", "handovers"} <= content.keys():
        raise DataError(
            f"{path}: no certificate",
            hint="forge verify --certificate writes it, and a ship as certificate.json in its run",
        )
    schema, number = content.get("schema"), content.get("format")
    if schema != SCHEMA or not isinstance(number, int) or number < FORMAT:
        version = f"of format {number}" if schema == SCHEMA else "of an older forge"
        raise DataError(
            f"{path}: a certificate {version}, without what is needed to repeat it (format {FORMAT})",
            hint=_AGAIN,
        )
    if number > FORMAT:
        raise DataError(f"{path}: a certificate of format {number}, known is {FORMAT}", hint="update forge")
    try:
        basis = from_plain(Basis, content["basis"], is_strict=False)
        gates = from_plain(Gates, content["gates"], is_strict=False)
        evidence = from_plain(Evidence, content["evidence"], is_strict=False)
        verdict = from_plain(Verdict, content, is_strict=False)
    except KeyError as lacks:
        raise DataError(
            f"{path}: a certificate without {lacks}",
            hint="only the certificate's file can be repeated, not what --json prints",
        ) from lacks
    except ValueError as failure:
        raise DataError(f"{path}: no certificate: {failure}", hint=_AGAIN) from failure
    return KeptCertificate(basis, gates, evidence, verdict)
