"""From a measurement to a verdict: a pure function, judged afresh whenever the gates change.

Faults are: a conversion (f16, bf16 or f32) further from the reference, rounded as the file is, than the
type's own arithmetic explains; token ids, prompts or stops that differ at all; a quantized file further from
f16 than llama.cpp's own of that type by more than 20 %; an adapter that changes nothing. What a type loses by
its nature only warns, unless the recipe sets a limit. The words for a fault, and its stage, are in `cause`.

A mixture of experts, of whose routers rounding turns near ties, is held to the limits at half of all
positions and at a quarter of those of every stretch of the rows, to those of a conversion or to llama.cpp's
own quantized file position by position; the weights that can be looked up must say nothing else.

Not covered: in a mixture, a fault in only a few experts or at only a few tokens, for the experts' own
weights are mostly not looked up; the live server (deploy judges that), and what was learned (evaluate does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from forge.codec import to_plain
from forge.verify.cause import (
    Cause,
    cause_of,
    damaged_rows,
    told_by_weights,
    unlike_its_word,
    worse_tensors,
    wrong_numbers,
    wrong_rows,
    wrong_share,
)
from forge.verify.compare import FAR_NMSE, MOST_BEYOND_VENDOR, converts, converts_mostly, rounds_soundly
from forge.verify.decide import is_near
from forge.verify.measurement import FIGURES, FileFacts, Gates, Handover, Leg, Measurement
from forge.verify.sample import least_share

SCHEMA, FORMAT = "forge-certificate", 2
"""Of the first format were certificates without digests and positions."""

_NO_CHANGE_KL = 1e-9
_SHIFT_KL = 1e-4
_STANDARD_ERRORS = 2.0
_LIVE_REMEDY = "the file is sound: look at deploy in the recipe, and at what else serves"
# KL (nats) and top-1 of a Llama-3-8B against f16, as llama.cpp publishes them.
NORMS: Mapping[str, tuple[float, float | None]] = {
    "q8_0": (0.0014, 0.977), "q6_k": (0.0055, None), "q5_k_m": (0.0108, None), "q4_k_m": (0.0313, 0.919),
    "q4_0": (0.0719, None),
}  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """What a quantized type loses beside what it is known to lose."""

    kl_mean: float
    top1: float | None
    worse: bool
    words: str


class Live(Protocol):
    """What deploy measured of the server: a hand-over, and what is wrong."""

    @property
    def handover(self) -> object: ...
    @property
    def problems(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Certificate:
    """The verdict on a measurement. `live` is what deploy measured of the server, where it asked one."""

    ok: bool
    broken_stage: str | None
    verdict: str
    remedy: str
    handovers: tuple[Handover, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    norm: Norm | None
    top1_at_least: float
    measurement: Measurement
    gates: Gates
    live: Live | None = None

    def plain(self) -> Mapping[str, object]:
        """Plain JSON with the fields of the contract."""
        measured, final = self.measurement, self.measurement.legs.file
        handovers = [handover.plain() for handover in self.handovers]
        legs = {"f16": measured.legs.f16, "file": final}
        sample = {"top1_at_least": round(self.top1_at_least, 4), "kl_error": final.kl_error}
        logits = {name: getattr(final, name) for name in (*FIGURES, "perplexity_reference")}
        return {
            "schema": SCHEMA,
            "format": FORMAT,
            "ok": self.ok,
            "broken_stage": self.broken_stage,
            "verdict": self.verdict,
            "remedy": self.remedy,
            "tokens": to_plain(measured.tokens),
            "prompt": to_plain(measured.prompt),
            "stops": to_plain(measured.stops),
            "handovers": [*handovers, to_plain(self.live.handover)] if self.live else handovers,
            "live": to_plain(self.live),
            "norm": to_plain(self.norm),
            "logits": logits | {"perplexity_gguf": final.perplexity},
            "greedy": to_plain(measured.greedy),
            "base": to_plain(replace(measured.legs.base, kl_by_position=())) if measured.legs.base else None,
            "file": to_plain(measured.file),
            "sample": to_plain(measured.sample) | sample,
            "gates": to_plain(self.gates),
            "basis": to_plain(measured.basis),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "kl_by_position": {name: to_plain(leg.kl_by_position) for name, leg in legs.items() if leg},
        }


def judge(measured: Measurement, gates: Gates, live: Live | None = None) -> Certificate:
    """The certificate of a measurement; `live` is what deploy measured of the server, where it asked one."""
    handovers = _handovers(measured)
    causes = [*_vocabulary_causes(measured), *_change_causes(measured)]
    if any(not handover.ok for handover in handovers):
        causes.append(cause_of(measured, handovers))
    if gates.as_trained and (shift := _shift_cause(measured)):
        causes.append(shift)
        handovers[0] = replace(handovers[0], ok=False)
    causes += [cause for cause in (*wrong_rows(measured), *wrong_numbers(measured)) if cause not in causes]
    for look in (worse_tensors, wrong_share, damaged_rows):
        causes += [] if causes else look(measured)
    causes += _gate_causes(measured, gates)
    causes += [Cause("deploy", problem, _LIVE_REMEDY) for problem in live.problems] if live else []
    first = causes[0] if causes else None
    share = least_share(measured.legs.file.top1, measured.legs.file.positions)
    return Certificate(
        ok=not causes,
        broken_stage=first.stage if first else None,
        verdict=first.words if first else _sound_words(measured, share),
        remedy=first.remedy if first else "",
        handovers=tuple(handovers),
        problems=tuple(f"{cause.stage}: {cause.words}" for cause in causes),
        warnings=tuple(_warnings(measured)),
        norm=_norm(measured),
        top1_at_least=share,
        measurement=measured,
        gates=gates,
        live=live,
    )


def _vocabulary_causes(measured: Measurement) -> list[Cause]:
    causes = []
    if not measured.tokens.ok:
        remedy = "convert it again with a llama.cpp that knows this tokenizer, or with forge export"
        causes.append(Cause("convert", measured.tokens.message, remedy))
    if not measured.prompt.ok:
        words = f"the file's chat template is not the one of training: {measured.prompt.message}"
        causes.append(Cause("convert", words, "export again with the template that was trained with"))
    if not measured.stops.ok:
        if measured.stops.words:
            listed = ", ".join(map(repr, measured.stops.words))
            words = f"llama.cpp would end an answer at {listed}, in the middle of a text"
            remedy = "set the file's eos, eot and eom token ids to the base's, or export with forge"
        else:
            words = f"llama.cpp would not stop at {measured.stops.token}, which ends an answer"
            remedy = "set the file's eos or eot token id to it, or export with forge"
        causes.append(Cause("convert", words, remedy))
    return causes


def _change_causes(measured: Measurement) -> list[Cause]:
    base = measured.legs.base
    if base is None or base.kl_mean > _NO_CHANGE_KL:
        return []
    words = "the adapter changes nothing: with it and without it the base gives the same probabilities"
    return [
        Cause("train", words, "train longer or with a higher learning rate; was it saved after training?")
    ]


def _shift_cause(measured: Measurement) -> Cause | None:
    """The exported model answers worse than the one that was trained, by more than chance explains."""
    trained = measured.legs.trained
    if trained is None:
        return None
    worse, error = -trained.loss_difference, trained.loss_error
    if not worse > _STANDARD_ERRORS * error:
        return None
    words = (
        f"training saw the NF4 base, and in the original one the answers are worse: {worse:+.4f} ± "
        f"{error:.4f} nats a token, another top token at {1 - trained.top1:.1%} of the positions"
    )
    remedy = "set export.merge_base: measured or nf4, or accept it with verify.as_trained: warn"
    return Cause("merge", words, remedy)


def _gate_causes(measured: Measurement, gates: Gates) -> list[Cause]:
    final, causes = measured.legs.file, []
    remedy = "choose a finer export.quant, or move the limit"
    if gates.max_kl is not None and final.kl_mean > gates.max_kl:
        words = f"KL {final.kl_mean:.2g} is over verify.max_kl {gates.max_kl:g}"
        causes.append(Cause("quantize", words, remedy))
    if gates.min_top1 is not None and final.top1 < gates.min_top1:
        words = f"top-1 {final.top1:.1%} is under verify.min_top1 {gates.min_top1:.1%}"
        causes.append(Cause("quantize", words, remedy))
    return causes


def _handovers(measured: Measurement) -> list[Handover]:
    legs, kind = measured.legs, measured.file.type
    start = "fp32 base" if measured.merge_base == "original" else "NF4 base"
    start += " + adapter" if legs.base else ""
    listed = []
    if legs.trained:
        # The reference is what is exported; training saw the quantized base. It warns, it never fails.
        shift = replace(legs.trained, perplexity=legs.trained.perplexity_reference)
        listed.append(_handover("as trained (NF4 base + adapter)", start, shift, True))
    if legs.merged:
        listed.append(_handover(start, "merged", legs.merged, converts(legs.merged, legs.as_merged)))
        start = "merged"
    direct = "f16" if legs.f16 else kind
    if legs.rounded:
        # What the type itself does to the weights is no part of the conversion's error.
        ok = rounds_soundly(legs, direct)
        listed.append(_handover(start, f"weights in {direct.upper()}", legs.rounded, ok))
        start = f"weights in {direct.upper()}"
    listed.append(_handover(start, f"GGUF {direct}", legs.conversion, _is_converted(measured)))
    against, vendor = legs.file_against_f16, legs.vendor
    if against is None or vendor is None:
        return listed
    beyond = against.nmse / max(vendor.nmse, 1e-30)
    ok = against.nmse <= MOST_BEYOND_VENDOR * vendor.nmse + FAR_NMSE / 100
    if not ok and legs.beyond is not None and is_near(legs.beyond.mean, legs.beyond.error, 0.0):
        # So few positions may say so by chance: then the weights decide, each tensor beside llama.cpp's own.
        ok = told_by_weights(measured, own=False) is None
    if _has_experts(measured):
        # Which near ties turn depends on the last bit of what was quantized: means differ by chance.
        assert legs.beyond_vendor is not None
        beyond = legs.beyond_vendor
        ok = beyond <= MOST_BEYOND_VENDOR and told_by_weights(measured, own=False) is None
    last = _handover("GGUF f16", f"GGUF {kind}", against, ok)
    return [*listed, replace(last, vendor=vendor, beyond_vendor=round(beyond, 3))]


def _is_converted(measured: Measurement) -> bool:
    leg, own = measured.legs.conversion, measured.legs.arithmetic
    if converts(leg, own) or not _has_experts(measured):
        return converts(leg, own)
    return converts_mostly(leg, own) and told_by_weights(measured, own=measured.legs.f16 is not None) is None


def _has_experts(measured: Measurement) -> bool:
    """Whether the base has experts to choose among; a file's own word for it would excuse any file."""
    return bool(measured.experts > 1)


def _handover(before: str, after: str, leg: Leg, ok: bool) -> Handover:
    return Handover(before, after, ok, leg.nmse, leg.kl_mean, leg.kl_max, leg.top1, leg.perplexity)


def _sound_words(measured: Measurement, share: float) -> str:
    final, kind = measured.legs.file, measured.file.type
    what = "base and adapter" if measured.legs.base else "the base"
    return (
        f"the {kind} file is {what}: token ids, prompts and stops are equal, "
        f"KL {final.kl_mean:.2g}, the same top token at {final.top1:.1%} of {final.positions} "
        f"positions (at least {share:.1%} with 95 % confidence)"
    )


def _warnings(measured: Measurement) -> list[str]:
    legs, remarks = measured.legs, [*_type_remarks(measured.file), *_mix_remarks(measured)]
    trained = legs.trained
    if trained and trained.kl_mean > _SHIFT_KL:
        remarks.append(
            f"training saw the NF4 base, the export has the full one: KL {trained.kl_mean:.2g}, top-1 "
            f"{trained.top1:.1%}; where that matters merge into the base as trained (export.merge_base), "
            "or train with method: lora"
        )
    leg = legs.conversion
    if _has_experts(measured) and leg.beyond and _is_converted(measured):
        remarks.append(
            f"rounding turned near ties between experts: {leg.beyond:.1%} of the positions are "
            f"beyond NMSE {FAR_NMSE:g} ({leg.nmse:.2g} over all); half of all and a quarter of "
            "every stretch of the rows are within, and the weights that could be looked up are right; the "
            "experts' mostly could not: a fault in only a few of them would not show"
        )
    norm = _norm(measured)
    if norm and norm.worse:
        remarks.append(f"{norm.words}; small models lose more")
    if other := measured.weights.padding:
        remarks.append(f"{other}: no answer depends on it; who trains the model further should know")
    remarks += [f"not compared: {limit}" for limit in measured.tokens.limits]
    if measured.prompt.compared and measured.prompt.reason:
        remarks.append(measured.prompt.reason)
    if measured.sample.undecided:
        remarks.append(
            f"too near to its limit for {measured.sample.positions} positions to be sure: "
            f"{', '.join(measured.sample.undecided)}; give more rows, or raise verify.minutes"
        )
    return remarks


def _type_remarks(file: FileFacts) -> list[str]:
    """Where a file's word for its type and its tensors differ."""
    says, kind = file.says, file.type
    if says and says != kind:
        return [f"the file says that it is {says}, its weights are {kind}: held against that"]
    unlike = unlike_its_word(file)
    return [unlike] if unlike else []


def _mix_remarks(measured: Measurement) -> list[str]:
    """Tensors of other types than llama.cpp gives them, which keep as much."""
    beside = measured.weights.beside
    others = {name: kinds for name, kinds in beside.other_types.items() if name not in beside.worse}
    if not others:
        return []
    name, (kind, own) = next(iter(others.items()))
    count = f"{len(others)} tensors are" if len(others) > 1 else "one tensor is"
    return [
        f"{count} of another type than in llama.cpp's own {measured.file.type}: {name} is {kind}, there {own}"
    ]


def _norm(measured: Measurement) -> Norm | None:
    """What a quantized type loses beside what it is known to lose; None where no figure is published."""
    final, kind = measured.legs.file, measured.file.type
    if kind not in NORMS:
        return None
    kl_mean, top1 = NORMS[kind]
    share = f", top-1 {top1:.1%}" if top1 else ""
    worse = final.kl_mean > kl_mean or (top1 is not None and round(final.top1, 3) < top1)
    words = (
        f"{kind} of this model has KL {final.kl_mean:.2g}, top-1 {final.top1:.1%}; "
        f"of an 8B model KL {kl_mean:g}{share}"
    )
    return Norm(kl_mean, top1, worse, words)
