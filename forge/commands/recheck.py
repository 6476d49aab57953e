"""`forge verify --recheck`: a certificate's measurement made again, at exactly its positions.

The files are held to the certificate's digests first: of other files it says nothing. What the certificate
names is read only, and nothing in it is run.

Not covered: its server's leg, for which there must be the server; a base that runs its own code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from forge import report, worker
from forge.errors import CheckError, DataError, Problem
from forge.model.tokenizer_files import read_tokenizer
from forge.resolve.bases import directory_of
from forge.resolve.certified import basis_of, digest_of, versions
from forge.resolve.taught import trained_tokenizer
from forge.stages.verify import failure_of_certificate, show_certificate
from forge.store.artifacts import open_store
from forge.store.digest import DigestCache, file_digest
from forge.tools.llama_cpp import find_converters
from forge.verify.basis import KeptCertificate, Verdict, read_certificate, write_rows
from forge.verify.measure import measure
from forge.verify.measurement import VerifyRequest
from forge.verify.verdict import judge


@dataclass(frozen=True)
class Elsewhere:
    """Where the certificate's files are here, of those that are not where it says."""

    base: str | None = None
    gguf: Path | None = None
    adapter: Path | None = None
    lora: Path | None = None
    merged: Path | None = None
    imatrix: Path | None = None


def recheck(certificate: Path, elsewhere: Elsewhere) -> Mapping[str, object]:
    """Measure again and compare the verdicts; the JSON is the new certificate and what differs.

    Raises `DataError` for another file or base than the certificate's, `CheckError` for another verdict, or
    for the same one of a broken file.
    """
    kept = read_certificate(certificate)
    store = open_store(read_only=True)
    paths = _locate(kept, certificate.absolute().parent, elsewhere)
    _refuse_others(kept, paths, store.digests)
    with tempfile.TemporaryDirectory(prefix="forge-verify-") as scratch:
        request = VerifyRequest(
            base=paths["base"],
            gguf=paths["gguf"],
            adapter=paths.get("adapter"),
            lora=paths.get("lora"),
            merged=paths.get("merged"),
            importance=paths.get("imatrix"),
            tokenizer=_tokenizer(kept, paths),
            chat_template=kept.basis.chat_template,
            rows=write_rows(kept.evidence.rows, Path(scratch) / "rows.jsonl"),
            converters=find_converters(store.root),
            scratch=Path(scratch),
            merge_base=kept.basis.merge_base,
            trained_in_4bit=kept.basis.trained_in_4bit,
            end_of_turn_id=kept.basis.end_of_turn_id,
            max_kl=kept.gates.max_kl,
            min_top1=kept.gates.min_top1,
            positions=kept.evidence.positions,
        )
        measured = worker.perform(measure, request)
        basis = basis_of(request, {name: str(path) for name, path in paths.items()}, store.digests)
    again = judge(measured.of(basis), kept.gates)
    show_certificate(again)
    here = Verdict(again.ok, again.broken_stage, tuple(leg.plain() for leg in again.handovers))
    differences, others = list(kept.verdict.unlike(here)), dict(_other_versions(kept))
    for name, (was, now) in others.items():
        report.info(f"computed with {name} {was}, here with {now}")
    fields_told = {"same": not differences, "differences": differences, "versions": others, **again.plain()}
    if differences:
        failure = CheckError(
            f"{certificate}: another verdict here: {differences[0]}",
            hint="the files are the certificate's; look at the versions that differ, and at this machine"
            if others
            else "the files and versions are the certificate's: look at this machine, or at who wrote it",
            problems=[Problem(difference) for difference in differences],
        )
        failure.fields = fields_told
        raise failure
    report.success(f"the same verdict at the same {measured.sample.positions} positions")
    if broken := failure_of_certificate(again):
        broken.fields = fields_told
        raise broken
    report.result(fields_told)
    return fields_told


def _locate(kept: KeptCertificate, beside: Path, elsewhere: Elsewhere) -> dict[str, Path]:
    """Each of the certificate's files: where it is named now, where it was, or beside the certificate."""
    paths = {}
    for option, item in kept.basis.items.items():
        if option not in {field.name for field in fields(Elsewhere)}:
            raise DataError(f"the certificate is of a {option}, which is not known", hint="update forge")
        named = getattr(elsewhere, option)
        if named is None:
            there = beside / item.where
            near = beside / Path(item.where).name
            named = there if there.exists() else near if near.exists() else None
        if option == "base":
            paths[option] = directory_of(str(named or item.where)).absolute()
        elif named is None:
            raise DataError(
                f"{item.where}: not here, and not beside the certificate", hint=f"name it with --{option}"
            )
        else:
            paths[option] = Path(named).absolute()
    if not {"base", "gguf"} <= paths.keys():
        raise DataError("the certificate names no base or no GGUF", hint="verify the file anew")
    return paths


def _refuse_others(kept: KeptCertificate, paths: Mapping[str, Path], cache: DigestCache) -> None:
    problems = []
    for option, path in paths.items():
        was, here = kept.basis.items[option].sha256, digest_of(option, path, cache)
        if was != here:
            problems.append(
                Problem(f"{path} has the digest {here[:12]}, the certificate's {was[:12]}", option)
            )
    if problems:
        names = " and ".join(problem.field for problem in problems)
        raise DataError(
            f"not what the certificate is of: {names}",
            hint="give the very files that it names, or verify these anew",
            problems=problems,
        )


def _tokenizer(kept: KeptCertificate, paths: Mapping[str, Path]) -> Path:
    """The directory of the tokenizer that was trained with: the adapter's own, or the base's."""
    own = trained_tokenizer(paths["base"], paths.get("adapter")).directory
    for directory in (own, read_tokenizer(paths["base"]).directory):
        if file_digest(directory / "tokenizer.json") == kept.basis.tokenizer:
            return directory.absolute()
    raise DataError(
        f"not what the certificate is of: the tokenizer in {own}",
        hint="give the adapter or base with the tokenizer that was trained with",
    )


def _other_versions(kept: KeptCertificate) -> Iterator[tuple[str, tuple[str, str]]]:
    here = versions()
    for name, was in kept.basis.versions.items():
        if (now := here.get(name, "not installed")) != was:
            yield name, (was, now)
