"""The stage *verify*: the exported file against base and adapter, judged afresh on every run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from forge import report, worker
from forge.chat.hand_over import MODELFILE_JINJA
from forge.codec import Json, from_plain, to_plain
from forge.errors import CheckError, ForgeError, Problem
from forge.export.run import GGUF_FILE, MERGED_DIRECTORY
from forge.files import write_text
from forge.model.estimate import certificate_disk
from forge.pipeline.stage import Result
from forge.resolve.certified import basis_of
from forge.resolve.derived import gguf_name, largest_type, of_each_type
from forge.resolve.resolved import Resolved
from forge.resolve.rows import certificate_rows
from forge.resolve.stage import GgufStage, OfType, installed
from forge.runs.files import ADAPTER, CALIBRATION, CERTIFICATE, adapter_beside, of_type, withdraw_types
from forge.serve.live import LiveProof
from forge.stages.calibrate import CALIBRATION_STAGE, importance_in
from forge.stages.data import DATA_STAGE
from forge.stages.export import EXPORT_STAGE, ExportFacts, adapter_in
from forge.stages.modelfile import ModelfileFacts, ModelfileStage
from forge.stages.train import ADAPTER_STAGE
from forge.store.artifacts import Artifact
from forge.store.digest import digest, file_digest
from forge.store.lock import hold_lock
from forge.tools.llama_cpp import find_converters
from forge.verify.basis import Evidence, certificate_text, evidence_of
from forge.verify.calibrate import IMPORTANCE_FILE
from forge.verify.kept import holds_any
from forge.verify.measure import measure
from forge.verify.measurement import Gates, Measurement, VerifyRequest
from forge.verify.verdict import Certificate, judge

VERIFY_STAGE = "verify"
_EVIDENCE = "evidence.json"


class VerifyStage(OfType, GgufStage):
    """Measures the file; the measurement is kept, the verdict is not."""

    name = VERIFY_STAGE
    rank = 10
    lists_facts = False
    version = 12

    def __init__(self, ship: Resolved) -> None:
        super().__init__(ship)
        data = (DATA_STAGE,) if ship.recipe.data else ()
        calibrated = (CALIBRATION_STAGE,) if ship.recipe.export.is_calibrated else ()
        adapted = (ADAPTER_STAGE,) if ship.recipe.train is not None else ()
        self.needs = (*data, *adapted, *calibrated, of_type(EXPORT_STAGE, ship.further_type))

    def params(self) -> Mapping[str, Json]:
        return {
            "base": self.ship.base_digest,
            "base.tokenizer": self.ship.tokenizer_digest,
            "train.method": self.ship.training.method if self.ship.training else None,
            "chat template": self.ship.template_digest,
        }

    def recorded(self) -> Mapping[str, str]:
        return {**super().recorded(), "bitsandbytes": installed("bitsandbytes")}

    def packages(self) -> Collection[str]:
        return ("torch", "transformers", "accelerate", "safetensors", "llama_cpp", "gguf")

    def bytes_beside(self) -> Mapping[str, int]:
        """The yardsticks: an F16 file, and a quantized one."""
        needed = certificate_disk(self.ship.parameters, largest_type(self.ship)).total
        return {"files to compare with": needed}

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        if self.ship.further_type:
            return {}
        verdict = certificate(self.ship, results[self.name].read(Measurement)).plain()
        types = [_of_type(ship, results) for ship in of_each_type(self.ship)]
        return {"certificate": verdict, "certificate_reason": None, "types": types}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Measurement:
        export = inputs[EXPORT_STAGE].path
        merged, lora = export / MERGED_DIRECTORY, adapter_in(inputs[EXPORT_STAGE])
        work = out / "work"
        work.mkdir(exist_ok=True)
        rows = certificate_rows(self.ship, inputs, work)
        request = VerifyRequest(
            base=self.ship.base_directory,
            adapter=inputs[ADAPTER_STAGE].path if ADAPTER_STAGE in inputs else None,
            gguf=export / GGUF_FILE,
            merged=merged if merged.is_dir() else None,
            lora=lora,
            importance=importance_in(inputs),
            tokenizer=self.ship.tokenizer.directory,
            chat_template=self.ship.template.pinned_source(),
            rows=rows,
            converters=find_converters(self.ship.store.root),
            scratch=work,
            merge_base=inputs[EXPORT_STAGE].read(ExportFacts).merge_base,
            trained_in_4bit=bool(self.ship.training and self.ship.training.method == "qlora"),
            end_of_turn_id=self.ship.prompt_format.end_of_turn_id,
            trust_remote_code=self.ship.runs_own_code,
            max_kl=self.ship.recipe.verify.max_kl,
            min_top1=self.ship.recipe.verify.min_top1,
            minutes=self.ship.recipe.verify.minutes,
            goes_on=True,
            shared=self._shared(inputs, rows, beside=lora is not None),
        )
        measured = worker.perform(measure, request, log=self.ship.log)
        quant = inputs[EXPORT_STAGE].read(ExportFacts).quant
        basis = basis_of(request, _names(self.ship, quant), self.ship.store.digests)
        evidence = to_plain(evidence_of(request.rows, measured.sample))
        write_text(out / _EVIDENCE, json.dumps(evidence, ensure_ascii=False))
        return measured.of(basis)

    def _shared(self, inputs: Mapping[str, Artifact], rows: Path, *, beside: bool) -> Path | None:
        """What the certificates of this ship's types have in common, by what it is made of."""
        if len(self.ship.recipe.export.types) == 1:
            return None
        made_of: dict[str, Json] = {
            **self.params(),
            **self.tools(),
            "adapter": inputs[ADAPTER_STAGE].digest if ADAPTER_STAGE in inputs else None,
            "merge_base": inputs[EXPORT_STAGE].read(ExportFacts).merge_base,
            "beside": beside,
            "rows": file_digest(rows),
        }
        return self.ship.store.work(VERIFY_STAGE, _shared_by(self.ship)) / digest(made_of)

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        """The certificate with its rows, for whoever wants to repeat it."""
        evidence = from_plain(Evidence, json.loads((artifact.path / _EVIDENCE).read_text(encoding="utf-8")))
        text = certificate_text(certificate(self.ship, artifact.read(Measurement)).plain(), evidence)
        if self.ship.further_type is None:
            withdraw_types(CERTIFICATE, run)
        write_text(run / of_type(CERTIFICATE, self.ship.further_type), text)

    def goes_on(self, work: Path) -> bool:
        return holds_any(work)

    def judge(self, artifact: Artifact) -> ForgeError | None:
        verdict = certificate(self.ship, artifact.read(Measurement))
        show_certificate(verdict)
        return failure_of_certificate(verdict)


@contextlib.contextmanager
def shared_by_types(ship: Resolved) -> Iterator[None]:
    """Keep what the certificates of several types have in common while the block lasts.

    What is left of a ship that was stopped, or of which a stage failed, the next of this run goes on with.
    """
    key = _shared_by(ship)
    with hold_lock(ship.store.lock(VERIFY_STAGE, key), what=VERIFY_STAGE, run=ship.recipe.name):
        try:
            yield
        except CheckError:
            shutil.rmtree(ship.store.partial(VERIFY_STAGE, key), ignore_errors=True)
            raise
        shutil.rmtree(ship.store.partial(VERIFY_STAGE, key), ignore_errors=True)


def _shared_by(ship: Resolved) -> str:
    return digest({"run": str(ship.run_directory)})


def _of_type(ship: Resolved, results: Mapping[str, Result]) -> Mapping[str, object]:
    """One type's files, by their names in the run, and its verdict; None for what is not there."""
    quant = ship.further_type
    exported, handed, verified = (
        results.get(of_type(stage, quant)) for stage in (EXPORT_STAGE, ModelfileStage.name, VERIFY_STAGE)
    )
    verdict = certificate(ship, verified.read(Measurement)).plain() if verified else None
    export = exported.read(ExportFacts) if exported else None
    modelfile = handed.read(ModelfileFacts).modelfile if handed else None
    return {
        "quant": export.quant if export else quant,
        "gguf": gguf_name(ship, export.quant) if export else None,
        "bytes": export.bytes if export else None,
        "modelfile": of_type(modelfile, quant) if modelfile else None,
        "modelfile_jinja": of_type(MODELFILE_JINJA, quant) if handed else None,
        "certificate": of_type(CERTIFICATE, quant) if verdict else None,
        **{name: verdict[name] if verdict else None for name in ("ok", "verdict", "logits")},
    }


def _names(ship: Resolved, quant: str) -> dict[str, str]:
    """Where each item of the certificate is in the run, beside `certificate.json`."""
    base, gguf = ship.base, gguf_name(ship, quant)
    hub = f"{base.spec.partition('@')[0]}@{base.revision}" if base.revision else None
    return {
        "base": hub or (base.spec if base.spec.startswith("builtin:") else str(ship.base_directory)),
        "gguf": gguf,
        "adapter": ADAPTER,
        "lora": adapter_beside(Path(gguf)).name,
        "merged": MERGED_DIRECTORY,
        "imatrix": f"{CALIBRATION}/{IMPORTANCE_FILE}",
    }


def _as_in(ship: Resolved, measured: Measurement) -> Measurement:
    """The measurement, its items by their names in this run: another recipe's may be of the same file."""
    if (basis := measured.basis) is None:
        return measured
    quant = Path(basis.items["gguf"].where).stem.rpartition("-")[2]
    names = _names(ship, quant)
    items = {option: replace(item, where=names[option]) for option, item in basis.items.items()}
    return measured.of(replace(basis, items=items))


def certificate(ship: Resolved, measured: Measurement, live: LiveProof | None = None) -> Certificate:
    """The verdict on this ship's file, with the server's leg `live` where one was asked."""
    verify, measured = ship.recipe.verify, _as_in(ship, measured)
    gates = Gates(verify.max_kl, verify.min_top1, verify.as_trained == "required")
    return judge(measured, gates, live)


def show_certificate(certificate: Certificate) -> None:
    """Show the hand-overs, the warnings and a good verdict; a bad one is an error's to say."""
    columns = ("hand-over", "", "NMSE", "KL mean", "KL max", "top-1")
    rows = [
        (
            f"{handover.before} → {handover.after}",
            "ok" if handover.ok else "BROKEN",
            *(f"{figure:.2g}" for figure in (handover.nmse, handover.kl_mean, handover.kl_max)),
            f"{handover.top1:.2%}",
        )
        for handover in certificate.handovers
    ]
    report.table("certificate", columns, rows)
    greedy = certificate.measurement.greedy
    if greedy.prompts:
        agreement = f"{greedy.same} of {greedy.prompts} greedy answers are the reference's, token by token"
        say = report.warning if 2 * greedy.same < greedy.prompts else report.info
        say(agreement)
    if certificate.norm and not certificate.norm.worse:  # else it is one of the warnings
        report.info(certificate.norm.words)
    for warning in certificate.warnings:
        report.warning(warning)
    if certificate.ok:
        report.success(f"verified: {certificate.verdict}")


def failure_of_certificate(certificate: Certificate) -> CheckError | None:
    """The error of a certificate that is not ok, with every problem; None for a good one."""
    if certificate.ok:
        return None
    failure = CheckError(
        f"{certificate.broken_stage} broke it: {certificate.verdict}",
        hint=certificate.remedy,
        problems=[Problem(problem) for problem in certificate.problems],
    )
    failure.fields = certificate.plain()
    return failure
