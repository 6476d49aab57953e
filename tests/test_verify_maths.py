"""The measures, the sample and the verdict by themselves, on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.codec import from_plain
from forge.errors import DataError
from forge.model.gguf_header import GgufHeader, GgufTensor
from forge.model.safetensors_header import TensorSpec
from forge.verify.beside import compare_tensors
from forge.verify.compare import (
    compare,
    converts,
    converts_mostly,
    distances,
    losses,
    times_as_far,
    top_log_probabilities,
)
from forge.verify.decide import undecided
from forge.verify.inputs import refuse_too_large, type_of_tensors
from forge.verify.measurement import Gates, Measurement
from forge.verify.sample import LONGEST, Sample, draw, least_share
from forge.verify.session import other_numbers
from forge.verify.spread import spread
from forge.verify.verdict import judge
from forge.verify.weights import TensorFit, odd_rows

pytestmark = pytest.mark.training  # numpy


def _sample(follows: list[int], answers: list[bool] | None = None) -> Sample:
    """One row in which `follows` come after token 0, each position sampled."""
    flags = answers or [True] * len(follows)
    return Sample(((0, *follows),), tuple((0, at) for at in range(len(follows))), tuple(flags), 1)


def test_equal_logits_are_no_distance_apart_whatever_is_added_to_them() -> None:
    import numpy as np

    logits = np.random.default_rng(0).normal(size=(100, 40)).astype(np.float32)
    found = compare(logits, logits + 3, _sample([1] * 100))
    assert found.nmse < 1e-12
    assert found.kl_mean < 1e-9
    assert found.top1 == 1.0
    assert found.perplexity == pytest.approx(found.perplexity_reference)
    assert converts(found, None)


def test_the_measures_are_what_they_say() -> None:
    """Two positions, two tokens: p = (3/4, 1/4) twice, against q = (1/4, 3/4) and (3/4, 1/4)."""
    import numpy as np

    p, q = np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([[0.25, 0.75], [0.75, 0.25]])
    found = compare(np.log(p), np.log(q), _sample([0, 1]))
    divergence = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert found.kl_mean == pytest.approx(divergence / 2)
    assert found.kl_max == pytest.approx(divergence)
    assert found.top1 == 0.5
    assert found.perplexity_reference == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.25)) / 2))
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.25)) / 2))
    # All logits are log(3)/2 from their mean; at the first position both are off by twice that.
    assert found.nmse == pytest.approx(2.0)


def test_faults_of_a_part_of_each_row_are_no_near_ties() -> None:
    """Eight rows behind one prompt: at four of ten positions by chance, or at the last third of each row."""
    import numpy as np

    random = np.random.default_rng(0)
    rows = tuple((*range(20), *random.integers(20, 40, size=77).tolist()) for _ in range(8))
    positions = tuple((row, index) for row in range(8) for index in range(96))
    sample = Sample(rows, positions, (True,) * 768, 8)
    logits: Any = random.normal(size=(768, 40))
    late = np.array([index >= 64 for _, index in positions])
    # What is turned in a prompt is turned in every row: half of its positions here.
    ties = np.where([index < 20 for _, index in positions], [index % 2 == 0 for _, index in positions], False)

    def rounded(size: float, *turned: Any) -> Any:
        noise = size * random.normal(size=logits.shape)
        for places in turned:
            noise += places[:, None] * random.normal(size=logits.shape)
        return logits + noise

    by_chance = [random.random(768) < 0.4 for _ in range(2)]
    near_ties = compare(logits, rounded(1e-3, by_chance[0], ties), sample)
    own = compare(logits, rounded(1e-3), sample)
    assert converts_mostly(near_ties, own) and not converts(near_ties, own)
    assert not converts_mostly(compare(logits, rounded(1e-3, late), sample), own)
    theirs = rounded(0.05, by_chance[0], ties)
    assert times_as_far(distances(logits, rounded(0.05, by_chance[1], ties), theirs, sample), sample) < 1.2
    assert (
        times_as_far(distances(logits, rounded(0.05, by_chance[1], ties, late), theirs, sample), sample) > 1.2
    )
    assert times_as_far(distances(logits, rounded(0.07, by_chance[1], ties), theirs, sample), sample) > 1.2
    assert times_as_far(distances(logits, logits, logits, sample), sample) == 0.0


def test_the_loss_of_each_token_is_of_its_own_position() -> None:
    """Three positions, five tokens: no square, in which rows and columns could be mistaken."""
    import numpy as np

    sample = Sample(((0, 3, 1, 4),), ((0, 0), (0, 1), (0, 2)), (True, False, True), 1)
    logits = np.array([[1.0, 2.0, 0.5, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 1.0, 2.0]])
    shares = np.exp(logits) / np.exp(logits).sum(axis=1)[:, None]
    np.testing.assert_allclose(losses(logits, sample), -np.log([shares[0, 3], shares[2, 4]]))


def test_where_in_the_rows_a_file_is_off_is_kept() -> None:
    """Forty places in stretches of equal width; only the last place is off."""
    import numpy as np

    logits = np.random.default_rng(0).normal(size=(40, 8))
    other = logits.copy()
    other[-1] = other[-1][::-1]
    found = compare(logits, other, _sample([1] * 40)).kl_by_position
    assert [one.position for one in found] == list(range(0, 40, found[1].position))
    assert [one.max > 1e-6 for one in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].mean < found[-1].max


def test_perplexity_is_the_answers_and_a_padded_vocabulary_does_not_count() -> None:
    import numpy as np

    wide: Any = np.zeros((2, 6), dtype=np.float32)
    wide[:, 4:] = 50.0  # rows of padding that no tokenizer reaches
    narrow: Any = np.zeros((2, 4), dtype=np.float32)
    narrow[1, 2] = 5.0
    found = compare(wide, narrow, _sample([0, 2], [True, False]))
    assert found.perplexity_reference == pytest.approx(4.0)
    assert found.perplexity == pytest.approx(4.0)


def test_top_log_probabilities() -> None:
    import numpy as np

    found = top_log_probabilities(np.log(np.array([0.1, 0.6, 0.3])), 2)
    assert [token for token, _ in found] == [1, 2]
    assert [value for _, value in found] == pytest.approx([math.log(0.6), math.log(0.3)], abs=1e-5)


def test_the_sample_is_bounded_and_the_same_again() -> None:
    rows = [{"input_ids": list(range(700)), "labels": [-100] * 600 + [1] * 100} for _ in range(200)]
    drawn = draw(rows, 150_000, 4096)
    assert drawn == draw(rows, 150_000, 4096)
    assert drawn != draw(rows, 150_000, 4096, seed=1)
    assert {len(row) for row in drawn.rows} == {LONGEST}
    assert len(drawn.rows) * LONGEST <= 4096
    assert len(drawn.positions) * 150_000 <= 2**26
    assert drawn.offered == 200
    assert len(drawn.follows) == len(drawn.answers) == len(drawn.positions)
    assert not any(drawn.answers)  # all of them lie behind where the rows were cut
    with pytest.raises(DataError, match="no row of two tokens"):
        draw([{"input_ids": [1]}], 100, None)


def test_the_sample_knows_which_tokens_are_answers() -> None:
    """Prompts of tokens under 1000, answers above; a row without labels is an answer whole."""
    ids = [[*range(length), *range(1000, 1000 + length)] for length in range(1, 40)]
    rows = [{"input_ids": row, "labels": [one if one >= 1000 else -100 for one in row]} for row in ids]
    drawn = draw(rows, 2000, None)
    assert list(drawn.answers) == [follow >= 1000 for follow in drawn.follows]
    assert 0.3 < sum(drawn.answers) / len(drawn.answers) < 0.7
    assert all(draw([{"input_ids": row} for row in ids], 2000, None).answers)


@pytest.mark.parametrize("layers", [1, 2, 7, 31, 32, 61, 62, 64, 80])
def test_every_kind_of_tensor_is_looked_at(layers: int) -> None:
    """However many layers there are: 62 of 9 tensors are a multiple of the 62 that are looked at."""
    kinds = [f"mlp.{letter}_proj.weight" for letter in "abcdefghi"]
    outside = ["model.embed_tokens.weight", "model.norm.weight"]
    inside = [f"model.layers.{number}.{kind}" for number in range(layers) for kind in kinds]
    found = spread([outside[0], *inside, outside[1]])
    assert len(found) == len(set(found)) == min(64, 2 + 9 * layers)
    assert set(outside) < set(found) <= {*outside, *inside}
    assert {name.partition("layers.")[2].partition(".")[2] for name in found} == {"", *kinds}
    # Of each kind from the first layers to the last.
    depths = [[name.split(".")[2] for name in found if name.endswith(kind)] for kind in kinds]
    assert all(max(map(int, one)) - min(map(int, one)) >= layers * 0.7 - 1 for one in depths)


@pytest.mark.parametrize("layers", range(1, 33))
def test_the_first_layer_and_the_last_are_looked_at(layers: int) -> None:
    """Of one kind of module, few of them: no quarter of a model is left out."""
    modules = [f"model.layers.{number}.mlp.experts" for number in range(layers)]
    found = spread(modules, 4)
    assert len(set(found)) == len(found) == min(4, layers)
    assert {modules[0], modules[-1]} <= set(found)
    assert all(set(found) & set(modules[start : start + max(1, layers // 2)]) for start in range(layers // 2))


def test_the_confidence_of_a_share() -> None:
    """Wilson's interval, against its published values."""
    assert least_share(1.0, 100) == pytest.approx(0.9630, abs=1e-4)
    assert least_share(0.5, 100) == pytest.approx(0.4038, abs=1e-4)
    assert least_share(1.0, 0) == 0.0


def _leg(**changes: float) -> dict[str, Any]:
    leg = {
        "positions": 1000,
        "nmse": 2e-3,
        "nmse_error": 0.0,
        "kl_mean": 3e-3,
        "kl_error": 1e-4,
        "kl_max": 0.1,
        "top1": 0.98,
    }
    leg |= {"perplexity": 3.0, "perplexity_reference": 3.0, "loss_difference": 0.0, "loss_error": 0.01}
    return {**leg, "nmse_middle": 0.0, "kl_middle": 0.0, "beyond": 0.0, **changes}


def _file(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "type": "q4_k_m",
        "says": None,
        "architecture": "llama",
        "bytes": 1,
        "tensor_types": {},
    }
    return {**facts, "vocabulary": 100, "sampling": {}, **changes}


def _measurement(**legs: dict[str, Any] | float) -> dict[str, Any]:
    """A sound q4_k_m; `legs` replace legs."""
    sound: dict[str, Any] = {
        "file": _leg(), "f16": _leg(nmse=3e-6, kl_mean=1e-5, top1=1.0), "file_against_f16": _leg(),
        "rounded": _leg(nmse=1e-6, kl_mean=4e-6), "conversion": _leg(nmse=1e-6, kl_mean=5e-6, kl_error=5e-7),
        "arithmetic": _leg(nmse=1e-6, kl_mean=5e-6, kl_error=5e-7, nmse_middle=1e-6, kl_middle=2e-6),
        "vendor": _leg(), "base": _leg(kl_mean=5.0, top1=0.2), "beyond_vendor": 1.0,
    }  # fmt: skip
    good = {"ok": True, "compared": 300, "different": 0, "limits": [], "examples": []}
    fit: dict[str, Any] = {
        "scale": 1.0, "rest": 0.07, "adapted": [], "rest_nf4": 0.1, "rest_beside_nf4": 0.07,
        "missing": [], "lost_rows": {}, "layouts": {}, "rests": {}, "touched": [], "scales": {},
    }  # fmt: skip
    return {
        "legs": {**sound, **legs},
        "tokens": good, "prompt": {"ok": True, "compared": 300}, "stops": {"ok": True, "token": "</s>"},
        "file": _file(), "experts": 0, "greedy": {"prompts": 8, "same": 8}, "live": [], "seconds": {},
        "merge_base": "original",
        "sample": {
            "rows": 60, "rows_given": 60, "positions": 1000, "answers": 900, "longest": 40, "cut_at": 512,
            "seed": 0, "positions_in": {"rows": [0], "indices": [[0]]},
        },
        "weights": {"file": fit, "f16": fit, "vendor": fit},
    }  # fmt: skip


def _judged(measured: dict[str, Any], gates: Gates) -> Mapping[str, Any]:
    return judge(from_plain(Measurement, measured), gates).plain()


@pytest.mark.parametrize(
    ("tensors", "kind"), [("Q3_K", "q3_k_s"), ("Q5_K", "q5_k_s"), ("Q8_0", "q8_0"), ("F16", "f16")]
)
def test_of_mixtures_the_coarsest_is_taken(tensors: str, kind: str) -> None:
    header = GgufHeader(Path("model.gguf"), 3, 32, {}, {"a": GgufTensor("a", tensors, (1,), 0, 1)})
    assert type_of_tensors(header) == kind


def test_a_misspelt_leg_is_no_leg_that_was_left_out() -> None:
    measured = _measurement()
    measured["legs"]["convertion"] = measured["legs"].pop("conversion")
    with pytest.raises(ValueError, match=r"Measurement\.legs has no convertion"):
        _judged(measured, Gates())


@pytest.mark.parametrize(
    ("check", "changes", "words"),
    [
        ("tokens", {"message": "the tokenizer gives other ids"}, "the tokenizer gives other ids"),
        ("prompt", {"message": "their text differs"}, "not the one of training: their text differs"),
        ("stops", {}, "llama.cpp would not stop at </s>"),
        ("stops", {"words": ("*", "the")}, "llama.cpp would end an answer at '*', 'the', in the middle"),
    ],
)
def test_what_differs_before_any_logit_is_the_converters_fault(
    check: str, changes: dict[str, object], words: str
) -> None:
    measured = _measurement()
    measured[check] = {**measured[check], "ok": False, **changes}
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (False, "convert")
    assert words in found["verdict"] and found["remedy"]


@pytest.mark.parametrize(("nmse", "ok"), [(1e-12, True), (1e-3, False)])
def test_a_merged_checkpoint_is_a_hand_over_of_its_own(nmse: float, ok: bool) -> None:
    found = _judged(_measurement(merged=_leg(nmse=nmse, kl_mean=nmse)), Gates())
    assert (found["handovers"][0]["to"], found["handovers"][0]["ok"]) == ("merged", ok)
    assert (found["ok"], found["broken_stage"]) == (ok, None if ok else "merge")


def test_what_stayed_undecided_is_a_warning() -> None:
    measured = _measurement()
    measured["sample"]["undecided"] = ["verify.max_kl"]
    [warning] = _judged(measured, Gates())["warnings"]
    assert warning.startswith("too near to its limit for 1000 positions to be sure: verify.max_kl")


def test_a_file_that_is_not_its_own_word_says_how_to_fix_it() -> None:
    measured = _measurement(file_against_f16=_leg(nmse=0.1))
    measured["file"] = _file(unlike={"tensors": "Q4_K", "expected": "Q6_K"}, says="q6_k")
    found = _judged(measured, Gates())
    assert (found["broken_stage"], "mostly Q4_K" in found["verdict"]) == ("quantize", True)
    assert "quantize again from f16" in found["remedy"]


def test_rows_are_judged_beside_the_same_rows_only() -> None:
    """A file that lacks rows of tokens has fewer than llama.cpp's own: that is said elsewhere."""
    import numpy as np

    def rows(count: int, kind: str, *, damaged: int = 0) -> TensorFit:
        rests, numbers = np.full(count, 0.1), np.arange(count)
        rests[:damaged] = 5
        return TensorFit("a", None, 0.1, "plain", kind=kind, numbers=numbers, row_rests=rests,
                         row_norms=np.full(count, 10.0))  # fmt: skip

    assert odd_rows(rows(32, "Q8_0", damaged=1), rows(32, "Q8_0")) == (0,)
    assert odd_rows(rows(32, "Q8_0", damaged=1), rows(40, "Q8_0")) == ()
    assert odd_rows(rows(32, "Q8_0", damaged=1), rows(32, "Q4_K")) == ()


def test_metadata_that_both_have_and_differs_is_the_cause() -> None:
    """What only one of them has may be what the other takes for granted: it is named as what may be why."""
    own: dict[str, Any] = {"general.architecture": "llama", "llama.a": 0, "llama.b": 0.1, "llama.c": (1, 2.5)}
    beside = {"llama.context_length": 8192, "general.name": "another"}

    def numbers(**changes: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        theirs = {**own, **beside, **{f"llama.{name}": value for name, value in changes.items()}}
        kept = {name: value for name, value in theirs.items() if value is not None}
        file, base = (GgufHeader(Path("model.gguf"), 3, 32, values, {}) for values in (kept, own))
        return other_numbers(file, base)

    assert numbers(b=0.1 * (1 + 1e-7), c=(1, 2.5)) == ((), ())
    assert numbers(a=(0, 0)) == ((), ())
    assert numbers(b=0.10001) == (("llama.b is 0.10001, the base's is 0.1",), ())
    assert numbers(c=(1, 3.5)) == (("llama.c is [1, 3.5], the base's is [1, 2.5]",), ())
    assert numbers(a=None, d=0) == (
        (),
        ("llama.a is missing, the base's is 0", "llama.d is 0, the base has none"),
    )


@pytest.mark.parametrize("own", ["conversion", "file_against_f16"])
def test_only_metadata_that_both_have_names_the_cause(own: str) -> None:
    measured = _measurement(**{own: _leg(nmse=0.1, kl_mean=0.1)})
    measured["weights"]["unmatched"] = ["llama.rope.freq_base is missing, the base's is 500000"]
    found = _judged(measured, Gates())
    assert "though its" in found["verdict"]
    assert "of its metadata llama.rope.freq_base is missing, the base's is 500000" in found["verdict"]
    measured["weights"]["numbers"] = ["llama.rope.dimension_count is 32, the base's is 64"]
    found = _judged(measured, Gates())
    assert found["verdict"].endswith(
        "though its weights are: llama.rope.dimension_count is 32, the base's is 64"
    )
    assert (found["broken_stage"], "forge repair" in found["remedy"]) == ("convert", True)


@pytest.mark.parametrize(
    ("shares", "error", "words"),
    [
        ((0.0, 0.0, 0.0), 0.001, None),
        ((0.04, 0.04, 0.04), 0.001, None),
        ((-0.1, -0.1, -0.1), 0.001, "the adapter is in {} 0.9 times, in a sound one once"),
        ((-0.1, -0.1, -0.1), 0.03, None),  # which chance explains
        ((-0.5, -0.5, -0.5), 0.03, "the adapter is in {} 0.5 times, in a sound one once"),
        (
            (0.0, 0.0, -1.0),
            0.01,
            "in 1 of 3 adapted tensors of {} the adapter is not once: 0 in blk.2.attn_q",
        ),
        ((0.0, 0.0, -1.0), 0.15, None),
    ],
)
@pytest.mark.parametrize(("file", "whose"), [("file", "the file"), ("f16", "the f16 made here")])
def test_an_adapter_that_rounding_hides_is_there_as_often_as_in_a_sound_file(
    file: str, whose: str, shares: tuple[float, ...], error: float, words: str | None
) -> None:
    measured = _measurement()
    fit = measured["weights"][file]
    listed = {f"blk.{number}.attn_q.weight": (share, error) for number, share in enumerate(shares)}
    measured["weights"][file] = {**fit, "shares": listed}
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (words is None, None if words is None else "merge")
    assert words is None or found["verdict"].startswith(words.format(whose))


def test_what_another_tool_may_write_otherwise_is_no_fault(tmp_path: Path) -> None:
    """A router in 16 bits of a file whose types are its own, and a head that is the embedding again."""
    import gguf
    import numpy as np

    values = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)

    def written(name: str, **tensors: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for tensor, array in tensors.items():
            writer.add_tensor(f"{tensor}.weight", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    half, other = values.astype(np.float16), (values * 2).astype(np.float16)
    file = written("file.gguf", token_embd=half, router=half)
    tied = written("tied.gguf", token_embd=half, router=values, output=half)
    apart = written("apart.gguf", token_embd=half, router=values, output=other)
    beside = compare_tensors(file, tied, tied, same_types=False)
    assert (beside.worse, beside.missing) == ({}, ())
    assert beside.other_types == {"router.weight": ("F16", "F32")}
    assert compare_tensors(file, apart, apart, same_types=False).missing == ("output.weight",)


@pytest.mark.parametrize(
    ("worse", "missing", "stage", "words"),
    [
        ({}, [], None, ""),
        ({"a": ("Q4_K", "Q6_K", 0.08, 0.02)}, [], "quantize", "a is Q4_K in the file, Q6_K in llama.cpp's"),
        (
            {"a": ("Q6_K", "Q6_K", 1.4, 0.02)},
            [],
            "convert",
            "a is not what base and adapter are: a share of 1.4",
        ),
        (
            {"a": ("Q6_K", "Q6_K", 1.4, 0.02), "b": ("Q4_0", "Q6_K", 0.1, 0.02)},
            [],
            "quantize",
            "b and 1 more is",
        ),
        ({}, ["c"], "convert", "the file lacks c"),
    ],
)
def test_a_tensor_that_is_worse_than_llama_cpps_own_is_a_fault(
    worse: dict[str, tuple[str, str, float, float]], missing: list[str], stage: str | None, words: str
) -> None:
    """Whatever the logits say: one of many tensors moves them by less than four bits do."""
    measured = _measurement()
    others = {name: (kind, own) for name, (kind, own, _, _) in {**worse, "d": ("Q8_0", "Q6_K", 0, 0)}.items()}
    fields = ("kind", "own", "rest", "usual")
    listed = {name: dict(zip(fields, values, strict=True)) for name, values in worse.items()}
    measured["weights"]["beside"] = {"worse": listed, "other_types": others, "missing": missing}
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (stage is None, stage)
    assert words in found["verdict"]
    remark = "one tensor is of another type than in llama.cpp's own q4_k_m: d is Q8_0, there Q6_K"
    assert remark in found["warnings"]


def test_the_gates_are_judged_afresh_on_one_measurement() -> None:
    found = _measurement()
    assert _judged(found, Gates())["ok"]
    over = _judged(found, Gates(max_kl=1e-3))
    assert (over["ok"], over["broken_stage"]) == (False, "quantize")
    assert "verify.max_kl" in over["verdict"]
    under = _judged(found, Gates(min_top1=0.99))
    assert (under["ok"], under["broken_stage"]) == (False, "quantize")
    assert _judged(found, Gates(max_kl=1e-2, min_top1=0.9))["ok"]


@pytest.mark.parametrize(("beyond", "ok"), [(1.0, True), (1.19, True), (1.25, False), (0.5, True)])
def test_a_quantized_file_may_be_a_fifth_further_than_the_vendors_own(beyond: float, ok: bool) -> None:
    found = _judged(_measurement(file_against_f16=_leg(nmse=2e-3 * beyond)), Gates())
    assert found["ok"] is ok
    assert found["handovers"][-1]["beyond_vendor"] == pytest.approx(beyond)
    assert found["broken_stage"] == (None if ok else "quantize")


@pytest.mark.parametrize(
    ("error", "scale", "stage"), [(0.1, 1.0, None), (0.01, 1.0, "quantize"), (0.1, 0.0, "merge")]
)
def test_where_so_few_positions_say_further_by_chance_the_weights_decide(
    error: float, scale: float, stage: str | None
) -> None:
    """A sound q8_0 of a few held-out tokens was 1.3 times as far as llama.cpp's own."""
    measured = _measurement(file_against_f16=_leg(nmse=2.6e-3))
    measured["legs"]["beyond"] = {"mean": 0.1, "error": error}
    measured["weights"]["file"] = measured["weights"]["file"] | {"scale": scale}
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (stage is None, stage)
    assert found["handovers"][-1]["beyond_vendor"] == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("share", "nmse", "ok"),
    [
        (4.8e-4, 1.0, True),  # rounding alone, however much it moves
        (4.9e-4, 3.9e-6, True),  # more than that, which does not show
        (4.9e-4, 4.3e-6, False),
        (1.0, 1.0, False),
    ],
)
def test_rounding_is_held_to_half_a_step_of_the_type_where_more_shows(
    share: float, nmse: float, ok: bool
) -> None:
    """A step of F16 is 2^-10; what shows is four times what the type's arithmetic does (NMSE 1e-6 here)."""
    lost = {"most_lost": {"tensor": "model.layers.3.mlp.down_proj.weight", "share": share}}
    measured = _measurement(rounded=_leg(nmse=nmse), arithmetic=_leg(nmse=1e-6, kl_mean=1e-3), **lost)
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (ok, None if ok else "convert")
    assert ("F16 does not hold the weights: of model.layers.3.mlp" in found["verdict"]) is not ok


@pytest.mark.parametrize("own", [1e-6, 1e-3, 0.0])
@pytest.mark.parametrize(
    ("nmse", "kl", "ok"), [(3.9, 3.9, True), (4.2, 0.1, False), (0.1, 4.2, False), (0.0, 0.0, True)]
)
def test_a_conversion_is_held_to_what_its_type_does_to_this_model(
    nmse: float, kl: float, ok: bool, own: float
) -> None:
    """Times what rounding the inputs moves; a file of float32 has nothing but the order of sums."""
    least = 2.4e-8  # a quarter of what float32 may leave
    leg = _leg(nmse=nmse * max(own, least), kl_mean=kl * max(own, least), beyond=0.0)
    measured = _measurement(conversion=leg, arithmetic=_leg(nmse=own, kl_mean=own))
    if not own:
        del measured["legs"]["arithmetic"], measured["legs"]["rounded"]
    found = _judged(measured, Gates())
    assert found["ok"] is ok
    assert found["broken_stage"] == (None if ok else "convert")


def test_what_rounding_alone_moves_is_a_hand_over_of_its_own() -> None:
    """SmolLM2-135M in float32: KL 1.3e-5 from rounding to F16, of which the conversion has no part."""
    found = _judged(_measurement(rounded=_leg(nmse=1e-3, kl_mean=1e-3)), Gates())
    assert found["ok"]
    assert [(one["from"], one["to"]) for one in found["handovers"]] == [
        ("fp32 base + adapter", "weights in F16"),
        ("weights in F16", "GGUF f16"),
        ("GGUF f16", "GGUF q4_k_m"),
    ]


@pytest.mark.parametrize(
    ("experts", "middle", "scale", "ok"),
    [(8, 1e-6, 1.0, True), (0, 1e-6, 1.0, False), (8, 1e-3, 1.0, False), (8, 1e-6, 2.0, False)],
)
def test_near_ties_between_experts_are_no_fault(experts: int, middle: float, scale: float, ok: bool) -> None:
    """Nor an excuse: half of the positions are within the limits, and the weights say nothing else."""
    turned = _leg(nmse=0.01, kl_mean=0.01, nmse_middle=middle, kl_middle=1e-6, beyond=0.2)
    measured = _measurement(conversion=turned, beyond_vendor=1.0)
    measured["experts"] = experts
    measured["weights"]["f16"] = measured["weights"]["f16"] | {"scale": scale}
    found = _judged(measured, Gates())
    assert found["ok"] is ok
    assert ("near ties" in str(found["warnings"])) is ok


@pytest.mark.parametrize(("rest", "ok"), [(3e-4, True), (5e-3, False)])
def test_what_was_merged_into_a_mixture_is_rounded_once(rest: float, ok: bool) -> None:
    """The f16 made here has no other to be held against: what float16 rounds is the measure."""
    turned = _leg(nmse=0.01, kl_mean=0.01, nmse_middle=1e-6, kl_middle=1e-6, beyond=0.2)
    measured = _measurement(conversion=turned, beyond_vendor=1.0) | {"experts": 8}
    name = "blk.0.attn_q.weight"
    seen = {"adapted": [name], "touched": [name], "rests": {name: rest}, "layouts": {name: "plain"}}
    measured["weights"]["f16"] = measured["weights"]["f16"] | seen
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (ok, None if ok else "merge")


@pytest.mark.parametrize(
    ("share", "times", "scale", "stage"),
    [(1.3, 1.1, 1.0, None), (1.0, 1.3, 1.0, "quantize"), (1.0, 1.1, 0.0, "merge")],
)
def test_a_quantized_mixture_is_held_to_the_middle_position_and_to_its_weights(
    share: float, times: float, scale: float, stage: str | None
) -> None:
    """Other near ties turned in llama.cpp's own: the means differ by more, or hide a fault."""
    measured = _measurement(file_against_f16=_leg(nmse=2e-3 * share), beyond_vendor=times) | {"experts": 8}
    measured["weights"]["file"] = measured["weights"]["file"] | {"scale": scale}
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (stage is None, stage)
    assert found["handovers"][-1]["beyond_vendor"] == times
    assert _judged(measured | {"experts": 0}, Gates())["ok"] is (share < 1.2)


def test_rows_that_the_file_lost_are_those_that_llama_cpps_own_has() -> None:
    """Rows so small that the type rounds them to zeros are lost in both."""
    measured = _measurement(file=_leg(nmse=1.0), file_against_f16=_leg(nmse=1.0))
    fit = measured["weights"]["vendor"]
    lost = {"token_embd.weight": 2}
    measured["weights"] |= {"file": {**fit, "lost_rows": lost}, "vendor": {**fit, "lost_rows": lost}}
    assert _judged(measured, Gates())["broken_stage"] == "quantize"
    measured["weights"]["vendor"] = fit
    found = _judged(measured, Gates())
    assert (found["broken_stage"], "2 rows of token_embd.weight" in found["verdict"]) == ("convert", True)


@pytest.mark.parametrize(
    ("file", "wrong", "wrong_trained", "stage", "words"),
    [
        ("file", [5, 6, 7, 8], [5], "merge", "of the file 4 of 9 rows"),
        ("file", [5, 6, 7, 8], [], "convert", "the untouched tokens' 5, 6, 7, ..."),
        ("f16", [5, 6], [5, 6], "merge", "of the f16 made here 2 of 9 rows"),
        ("file", [], [], None, ""),
    ],
)
def test_rows_of_tokens_that_are_not_pefts(
    file: str, wrong: list[int], wrong_trained: list[int], stage: str | None, words: str
) -> None:
    """Whatever the logits say: no text of the sample may have that token."""
    rows = {"compared": 9, "trained": 2, "wrong": wrong, "wrong_trained": wrong_trained}
    measured = _measurement()
    fits = measured["weights"]
    fits[file] = {**fits[file], "rows": {"token_embd.weight": rows}}
    found = _judged(measured, Gates())
    assert (found["ok"], found["broken_stage"]) == (stage is None, stage)
    assert words in " ".join([found["verdict"], *found["problems"]])


@pytest.mark.parametrize(("difference", "ok"), [(-0.019, True), (-0.021, False), (0.5, True)])
def test_a_shift_that_makes_answers_worse_than_as_trained_is_a_fault(difference: float, ok: bool) -> None:
    """Pitfall 22: the loss is that of the model as trained less that of the exported one, ± 0.01."""
    measured = _measurement(trained=_leg(kl_mean=0.5, loss_difference=difference))
    found = _judged(measured, Gates(as_trained=True))
    assert (found["ok"], found["broken_stage"]) == (ok, None if ok else "merge")
    assert found["handovers"][0]["ok"] is ok
    assert ("+0.0210 ± 0.0100 nats" in found["verdict"]) is not ok
    assert _judged(measured, Gates())["ok"]


def test_a_shift_that_worsens_nothing_warns() -> None:
    found = _judged(_measurement(trained=_leg(kl_mean=0.5, top1=0.6)), Gates())
    assert found["ok"]
    assert found["handovers"][0]["from"] == "as trained (NF4 base + adapter)"
    assert any("export.merge_base" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("leg", "worse"),
    [
        ({"kl_mean": 0.2, "top1": 0.95}, True),
        ({"kl_mean": 0.01, "top1": 0.8}, True),
        ({"kl_mean": 0.01, "top1": 0.9186}, False),  # published as 91.9 %
    ],
)
def test_a_lossy_type_is_shown_beside_the_published_norm(leg: dict[str, float], worse: bool) -> None:
    found = _judged(_measurement(file=_leg(**leg)), Gates())
    assert found["ok"]
    words = (
        f"q4_k_m of this model has KL {leg['kl_mean']:.2g}, top-1 {leg['top1']:.1%}; of an 8B model KL 0.0313"
    )
    assert found["norm"]["words"] == f"{words}, top-1 91.9%"
    assert (found["norm"]["kl_mean"], found["norm"]["top1"]) == (0.0313, 0.919)
    assert found["norm"]["worse"] is worse
    assert (f"{found['norm']['words']}; small models lose more" in found["warnings"]) is worse


def test_a_type_without_a_published_norm_is_shown_beside_none() -> None:
    found = _judged(_measurement(file=_leg(kl_mean=0.2)) | {"file": _file(type="iq4_xs")}, Gates())
    assert found["norm"] is None and found["warnings"] == []


def test_a_base_that_does_not_fit_even_in_pieces(tmp_path: Path) -> None:
    """The largest piece counts: two layers of 32 values, an embedding of 64."""
    shapes = {
        "model.embed_tokens.weight": (8, 8),
        **{f"model.layers.{n}.mlp.weight": (4, 8) for n in range(2)},
    }
    tensors = {
        name: TensorSpec(name, "BF16", shape, tmp_path, 0, 2 * shape[0] * shape[1])
        for name, shape in shapes.items()
    }
    refuse_too_large(tensors, 2 * 64 * 4)
    with pytest.raises(DataError, match="does not fit even in pieces"):
        refuse_too_large(tensors, 2 * 64 * 4 - 1)


@pytest.mark.parametrize(
    ("changes", "limits", "left"),
    [
        ({}, {}, ()),
        ({"conversion": {"kl_mean": 1.9e-5, "kl_error": 1e-6}}, {}, ("the conversion's KL",)),
        ({"conversion": {"kl_mean": 1.0, "kl_error": 0.1}}, {}, ()),
        ({"beyond": {"mean": -1e-4, "error": 1e-4}}, {}, ("the quantized file beside llama.cpp's own",)),
        ({"beyond": {"mean": -4e-4, "error": 1e-4}}, {}, ()),
        ({"file": {"kl_mean": 0.01, "kl_error": 0.001}}, {"max_kl": 0.012}, ("verify.max_kl",)),
        ({"file": {"kl_mean": 0.01, "kl_error": 0.001}}, {"max_kl": 0.02}, ()),
        ({"file": {"top1": 0.9}}, {"min_top1": 0.91}, ("verify.min_top1",)),
        ({"file": {"top1": 0.9}}, {"min_top1": 0.95}, ()),
        ({"trained": {"loss_difference": -0.02}}, {}, ("whether answers are worse than as trained",)),
        ({"trained": {"loss_difference": -0.5}}, {}, ()),
    ],
)
def test_positions_are_added_until_every_gate_is_decided(
    changes: dict[str, dict[str, float]], limits: dict[str, float], left: tuple[str, ...]
) -> None:
    """A gate is open as long as its figure is within three standard errors of its limit."""
    measured = _measurement()
    for name, figures in changes.items():
        measured["legs"][name] = {**(_leg() if name != "beyond" else {}), **figures}
        if name == "conversion":
            measured["legs"][name] |= {"nmse": 1e-6}
    legs = from_plain(Measurement, measured).legs
    asked = {"max_kl": None, "min_top1": None, **limits}
    assert undecided(legs, 0, **asked) == left
    assert "near ties between experts" in undecided(legs, 8, **asked)
