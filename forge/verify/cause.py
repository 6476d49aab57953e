"""Which stage broke a hand-over, in plain words and with what to do, from the weights' own testimony.

Pure: it reads what `weights` measured. The stages: *merge* (which base, which adapter, how often),
*convert* (order of rows, lost rows, missing tensors), *quantize* (only the rounding is worse).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from forge.verify.measurement import PLUS_ONE, TRANSPOSED, FileFacts, Fits, Handover, Lost, Measurement

_SCALE_SLACK, _DIRECT_SLACK = 0.2, 0.05
"""Of how often the adapter is in the file: four bits hide a fifth of a small one, 16 bits next to nothing."""
_SURELY = 8.0
_LEAST_ERROR = 0.01
"""Of a module's share: one that rounding hides nothing of does not speak for all others."""
_HEADS = ("output.weight", "token_embd.weight")


@dataclass(frozen=True)
class Cause:
    """A fault: the stage, what is wrong, what to do."""

    stage: str
    words: str
    remedy: str


@dataclass(frozen=True)
class _Differ:
    """Tensors that are not as in the yardstick, of those `compared`; `worse_beside` no adapter touches."""

    worse: tuple[str, ...]
    worse_beside: tuple[str, ...]
    moved: tuple[str, ...]
    compared: int


def cause_of(measured: Measurement, handovers: Sequence[Handover]) -> Cause:
    """The cause of the first hand-over that is not ok."""
    broken = next(handover for handover in handovers if not handover.ok)
    if broken.after == "merged":
        return _merged(measured, broken)
    if lost := measured.legs.most_lost if broken.after.startswith("weights in") else None:
        return _unkept(lost, broken)
    if broken.beyond_vendor is not None and (words := unlike_its_word(measured.file)):
        return Cause("quantize", words, "quantize again from f16 to the type that is wanted, or forge export")
    # Where the f16 made here is wrong too, that file is looked at: the quantized one follows from it.
    if cause := told_by_weights(measured, own=broken.after == "GGUF f16" and measured.legs.f16 is not None):
        return cause
    if shares := wrong_share(measured):
        return shares[0]
    if rows := wrong_rows(measured):
        return rows[0]
    if numbers := wrong_numbers(measured):
        return numbers[0]
    figures = f"NMSE {broken.nmse:.2g}, KL {broken.kl_mean:.2g}, top-1 {broken.top1:.1%}"
    if unmatched := measured.weights.unmatched:
        figures += f"; of its metadata {'; '.join(unmatched)}, which may be why"
    if broken.beyond_vendor is not None:
        words = (
            f"the quantized file is {broken.beyond_vendor:.3g} times as far from f16 as llama.cpp's own, "
            f"though its base and adapter are the right ones ({figures})"
        )
        return Cause(
            "quantize", words, "quantize again from f16 with llama.cpp's own quantizer, or forge export"
        )
    words = f"the file does not compute what the checkpoint does, though its weights look right ({figures})"
    return Cause("convert", words, "convert again; llama.cpp may not cover this configuration of the family")


def told_by_weights(measured: Measurement, *, own: bool) -> Cause | None:
    """What the weights of the file say is wrong, or with `own` those of the f16 made here."""
    fits = measured.weights
    file = fits.f16 if own else fits.file
    direct = own or fits.vendor is None
    yardstick = fits.f16 if direct else fits.vendor
    assert file and yardstick  # they are looked at where a hand-over broke
    differ = _unlike(file, yardstick, direct=direct)
    # Of the f16 made here the share of the adapter is itself in question, and hardly rounded.
    usual = None if direct else yardstick
    return _converted_wrongly(file, yardstick, differ) or _merged_wrongly(file, yardstick, differ, usual)


def wrong_rows(measured: Measurement) -> list[Cause]:
    """Rows of tokens that are not peft's: of the file, or of the f16 made here that it is held against."""
    causes: list[Cause] = []
    for fits, whose in ((measured.weights.file, "the file"), (measured.weights.f16, "the f16 made here")):
        for name, rows in fits.rows.items() if fits and not causes else ():
            if not rows.wrong:
                continue
            wrong, kind = rows.wrong_trained or rows.wrong, "trained" if rows.wrong_trained else "untouched"
            tokens = ", ".join(map(str, wrong[:3])) + (", ..." if len(wrong) > 3 else "")
            words = (
                f"in {name} of {whose} {len(rows.wrong)} of {rows.compared} rows that were compared are not "
                f"those of base and adapter in peft, such as the {kind} tokens' {tokens}"
            )
            stage = "merge" if rows.wrong_trained else "convert"
            causes.append(Cause(stage, words, "merge the adapter again, with peft, and convert that"))
    return causes


def wrong_share(measured: Measurement) -> list[Cause]:
    """The adapter is in the file another number of times; the type's rounding hides that from the logits.

    In all modules together, each by how well it is known, or in one of them.
    """
    for fits, whose in ((measured.weights.file, "the file"), (measured.weights.f16, "the f16 made here")):
        if fits is None or not fits.shares:
            continue
        more, sure = _together(fits.shares.values())
        other = {
            name: share
            for name, (share, error) in fits.shares.items()
            if abs(share) > _SCALE_SLACK + _SURELY * error
        }
        if other and 2 * len(other) <= len(fits.shares):
            name = max(other, key=lambda name: abs(other[name]))
            count, times = f"{len(other)} of {len(fits.shares)}", f"{1 + other[name]:.3g} in {name}"
            words = f"in {count} adapted tensors of {whose} the adapter is not once: {times}"
        elif other or abs(more) > _DIRECT_SLACK + _SURELY * sure:
            words = f"the adapter is in {whose} {1 + more:.3g} times, in a sound one once"
        else:
            continue
        remedy = "check alpha, r and the patterns in adapter_config.json; merge it again"
        if more < 0:
            remedy += ", in float32: a merge in 16 bits loses small changes"
        return [Cause("merge", words, remedy)]
    return []


def _together(shares: Collection[tuple[float, float]]) -> tuple[float, float]:
    """The mean of what several modules say, and its standard error."""
    weights = [1 / (error**2 + _LEAST_ERROR**2) for _, error in shares]
    mean = sum(weight * share for weight, (share, _) in zip(weights, shares, strict=True)) / sum(weights)
    return mean, sum(weights) ** -0.5


def worse_tensors(measured: Measurement) -> list[Cause]:
    """Tensors that keep less than llama.cpp's own, too few to show in the logits; or that are missing."""
    beside = measured.weights.beside
    if missing := beside.missing:
        words = f"the file lacks {missing[0]}{f' and {len(missing) - 1} more tensors' if missing[1:] else ''}"
        return [Cause("convert", words, "convert the same checkpoint again, with forge export")]
    if not beside.worse:
        return []
    coarse = {name: tensor for name, tensor in beside.worse.items() if tensor.kind != tensor.own}
    name, tensor = next(iter((coarse or beside.worse).items()))
    count = f" and {len(beside.worse) - 1} more" if len(beside.worse) > 1 else ""
    if coarse:
        words = (
            f"{name}{count} is {tensor.kind} in the file, {tensor.own} in llama.cpp's own: it keeps less "
            f"(a share of {tensor.rest:.2g} is gone, there {tensor.usual:.2g})"
        )
        remedy = "quantize again from f16 with llama.cpp's own quantizer, or forge export"
        return [Cause("quantize", words, remedy)]
    if cause := told_by_weights(measured, own=False):
        return [cause]
    if causes := wrong_share(measured):
        return causes
    words = (
        f"{name}{count} is not what base and adapter are: a share of {tensor.rest:.2g} is another, which the "
        f"type's rounding ({tensor.usual:.2g}) does not explain"
    )
    return [Cause("convert", words, "convert and quantize the checkpoint again; was the file damaged since?")]


def damaged_rows(measured: Measurement) -> list[Cause]:
    """Rows that are further off than the type's rounding explains, too few to show in the logits."""
    if not (odd := measured.weights.file.odd_rows):
        return []
    name, rows = next(iter(odd.items()))
    listed = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
    beside = f", and rows of {len(odd) - 1} more tensors" if len(odd) > 1 else ""
    words = f"rows {listed} of {name} are not the base's, with or without the adapter{beside}"
    stage = "quantize" if measured.legs.vendor else "convert"
    return [Cause(stage, words, "convert and quantize the checkpoint again; was the file damaged since?")]


def wrong_numbers(measured: Measurement) -> list[Cause]:
    """Metadata that is not the base's; what it changes may show only in rows longer than those compared."""
    if not (numbers := measured.weights.numbers):
        return []
    words = f"the file's metadata is not the base's, though its weights are: {'; '.join(numbers)}"
    return [Cause("convert", words, "forge repair puts the base's in its place; or convert it again")]


def unlike_its_word(file: FileFacts) -> str:
    """What the tensors of a file are that its type does not have; empty where they are as it says."""
    if not (unlike := file.unlike):
        return ""
    return (
        f"the file says that it is {file.type}, its weights are mostly {unlike.tensors}, "
        f"those of llama.cpp's own mostly {unlike.expected}"
    )


def _unkept(lost: Lost, broken: Handover) -> Cause:
    kind = broken.after.rpartition(" ")[2]
    words = (
        f"{kind} does not hold the weights: of {lost.tensor} a share of {lost.share:.2g} is gone, and the "
        f"model is another (KL {broken.kl_mean:.2g})"
    )
    remedy = "export bf16 or f32, which have float32's range; look at that tensor of base and adapter"
    return Cause("convert", words, remedy)


def _merged(measured: Measurement, broken: Handover) -> Cause:
    words = (
        f"the merged checkpoint is not base + adapter (KL {broken.kl_mean:.2g}): it is of another run, "
        "another base, or merged another way"
    )
    return Cause("merge", words, "delete the merged directory and merge again")


def _converted_wrongly(file: Fits, yardstick: Fits, differ: _Differ) -> Cause | None:
    again = "convert the same checkpoint again with an up-to-date llama.cpp, or with forge export"
    gone = sorted(set(file.missing) - set(yardstick.missing)) if file is not yardstick else []
    if gone:
        return Cause("convert", f"{len(gone)} tensors are missing from the file, such as {gone[0]}", again)
    usual = {} if file is yardstick else yardstick.lost_rows
    lost = {name: count for name, count in file.lost_rows.items() if count > usual.get(name, 0)}
    if lost:
        name, count = next(iter(lost.items()))
        return Cause(
            "convert",
            f"{count} rows of {name} are zeros in the file or not there: added tokens were lost",
            again,
        )
    if differ.moved:
        names = ", ".join(differ.moved[:4])
        words = f"the rows of {names} are in another order: query and key were permuted by the wrong factor"
        if all(TRANSPOSED in (file.layouts[name], yardstick.layouts[name]) for name in differ.moved):
            words = f"{names} is transposed"
        if all(PLUS_ONE in (file.layouts[name], yardstick.layouts[name]) for name in differ.moved):
            words = f"{names} is off by one, which converters add to some families' norms"
        return Cause("convert", words, again)
    worse = list(differ.worse)
    if worse and set(worse) <= set(_HEADS) - set(file.touched):
        return Cause(
            "convert", f"{' and '.join(worse)} are not the checkpoint's: the head was lost or retied", again
        )
    return None


def _merged_wrongly(
    file: Fits,
    yardstick: Fits,
    differ: _Differ,
    usual: Fits | None,
) -> Cause | None:
    once, scale = _usual_scale(usual), file.scale
    slack = _SCALE_SLACK if usual else _DIRECT_SLACK
    beside, few = differ.worse_beside, _is_of_few(file, differ)
    if beside and not few:
        words = (
            f"{beside[0]}{' and others differ' if len(beside) > 1 else ' differs'} from the base, though no "
            "adapter touches it: it was merged into another base or revision"
        )
        return Cause(
            "merge", words, "merge into the very revision that was trained on, or name the right --base"
        )
    if scale is None:
        return _damaged(differ) if few else None
    nf4, full = file.rest_nf4, file.rest_beside_nf4
    if nf4 is not None and full is not None and nf4 < 0.7 * full:
        words = "the adapter was merged into the 4-bit (NF4) base: its rounding is in the weights"
        remedy = (
            "merge into the unquantized base in float32: forge export does; where NF4 was meant, as a ship "
            "chooses it when held-out rows say so, give --merge-base nf4"
        )
        return Cause("merge", words, remedy)
    if abs(scale) < _SCALE_SLACK < once and _is_clean(file, yardstick):
        words = "the adapter was not applied: nothing of it is in the file's weights"
        return Cause("merge", words, "merge the adapter before converting, or serve it with --lora")
    if abs(scale - 2) < _SCALE_SLACK and once < 2 and _is_clean(file, yardstick):
        return Cause("merge", "the adapter was merged twice", "merge it once, into the base as it was")
    if abs(scale - once) > slack and _is_clean(file, yardstick):
        words = f"the adapter is in the file {scale:.3g} times: its scale was computed wrongly"
        return Cause("merge", words, "check alpha, r, use_rslora and alpha_pattern in adapter_config.json")
    # A share says something only where nothing but rounding is left beside it: else it is another adapter.
    if not differ.worse and (other := _other_scales(file, usual)):
        name, times = next(iter(other.items()))
        words = (
            f"in {len(other)} of {len(file.scales)} adapted tensors the adapter is not once, but "
            f"another number of times: {times:.3g} in {name}"
        )
        return Cause("merge", words, "check rank_pattern, alpha_pattern and target_modules; export again")
    if few:
        return _damaged(differ)
    if differ.worse:
        names = ", ".join(list(differ.worse)[:3])
        words = (
            f"{len(differ.worse)} of {differ.compared} tensors are neither base + adapter nor its "
            f"rounding ({names}): another adapter was merged, a merged directory of an earlier run was used, "
            "or they were damaged on the way"
        )
        return Cause("merge", words, "delete the merged directory, merge again, convert again")
    return None


def _is_of_few(file: Fits, differ: _Differ) -> bool:
    """Whether only few tensors are worse, which no other base and no other adapter leaves so.

    Those that an adapter has whole may be few.
    """
    worse, touched = set(differ.worse), set(file.touched)
    if worse & (touched - set(file.adapted)) or 4 * len(worse) > differ.compared:
        return False
    return bool(worse) and (not touched or 2 * len(worse & touched) < len(touched))


def _damaged(differ: _Differ) -> Cause:
    words = (
        f"{len(differ.worse)} of {differ.compared} tensors ({', '.join(differ.worse[:3])}) are not what base "
        "and adapter make of them, the others are: rows or tensors went to another place, or were damaged on "
        "the way"
    )
    return Cause("convert", words, "convert the same checkpoint again, with forge export")


def _other_scales(file: Fits, usual: Fits | None) -> dict[str, float]:
    """Tensors in which the adapter is not as often as in a sound file, by more than the rounding explains."""
    expected = usual.scales if usual else {}
    return {
        name: scale
        for name, (scale, sure) in file.scales.items()
        if abs(scale - (expected[name][0] if name in expected else 1)) > _SCALE_SLACK + _SURELY * sure
    }


def _usual_scale(usual: Fits | None) -> float:
    """How often the adapter seems to be in a sound file: once, but for what a type's rounding adds to it.

    Beside four bits' rounding a small adapter is hardly seen: llama.cpp's own file showed one 1.25 times.
    That file is only believed behind an f16 that was held to once.
    """
    scale = usual.scale if usual else None
    return 1.0 if scale is None else float(scale)


def _is_clean(file: Fits, yardstick: Fits) -> bool:
    """Beside the adapter there is no more rest than the type's rounding."""
    return file.rest is None or not _is_worse(file.rest, yardstick.rest or 0.0)


def _is_worse(rest: float, usual: float) -> bool:
    """Whether a rest is more than the type's rounding; errors add up as squares, so 15 % is a lot."""
    return rest > 1.15 * usual + 1e-3


def _unlike(file: Fits, yardstick: Fits, *, direct: bool) -> _Differ:
    """Tensors of the file whose rest is over the yardstick's, and those in another order of rows.

    `direct`: the yardstick is an f16.
    """
    rests, usual = file.rests, yardstick.rests
    if direct:
        # The f16 made here is merged by the same export; what was merged is rounded once, and no more.
        usual = {**usual, **dict.fromkeys(file.touched, 0.0)}
    both = rests.keys() & usual.keys()
    worse = {name: rests[name] for name in both if _is_worse(rests[name], usual[name])}
    layouts, expected = file.layouts, yardstick.layouts
    # Of a tensor that fits in no order the best says nothing.
    moved = [name for name in both if layouts[name] != expected[name] and name not in worse]
    plain = {name for name in both if name not in file.touched}
    return _Differ(tuple(sorted(worse)), tuple(sorted(worse.keys() & plain)), tuple(sorted(moved)), len(both))
