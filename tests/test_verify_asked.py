"""What a file is asked besides the rows: greedy answers and what its server should say, of a known model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.verify import sample
from forge.verify.asked import GREEDY_TOKENS, answer, expected_live, prompts_of
from forge.verify.sample import Sample
from forge.verify.served import loaded
from tests.test_stages_deployed import CHARACTERS, FIRST
from tests.tiny_gguf import END_OF_TURN, REPLY, write_tiny_gguf

pytestmark = pytest.mark.training

NEWLINE = CHARACTERS.index("\n")
WORDS = [FIRST + number for number in range(len(REPLY.split(" ")))]
QUESTION = [1, *(CHARACTERS.index(letter) for letter in "assistant"), NEWLINE]


def test_a_prompt_is_a_row_up_to_its_answer() -> None:
    ids = list(range(100, 140))
    rows: list[dict[str, Any]] = [
        {"input_ids": ids, "labels": [-100] * 7 + ids[7:]},
        {"input_ids": ids, "labels": ids},  # all of it carries loss: one token is asked at least
        {"input_ids": ids, "labels": None},  # nothing says where its answer begins
        {"input_ids": ids, "labels": [-100] * 40},
        {"input_ids": list(range(2000)), "labels": [-100] * 1999 + [5]},
    ]
    assert prompts_of(rows)[:5] == [ids[:7], ids[:1], ids[:20], ids[:20], list(range(sample.LONGEST))]
    assert len(prompts_of(rows * 4)) == 16


def test_few_rows_are_cut_within_their_answers() -> None:
    """A gate over one prompt failed a sound ship: its divergence was four times what 16 have on average."""
    ids = list(range(100, 140))
    row = {"input_ids": ids, "labels": [-100] * 8 + ids[8:]}
    assert prompts_of([row]) == [ids[:length] for length in range(8, 40, 2)]
    short = {"input_ids": ids[:10], "labels": [-100] * 8 + ids[8:10]}
    assert prompts_of([row, short]) == [
        ids[:8], ids[:8], ids[:12], ids[:9], *(ids[:length] for length in range(16, 40, 4)),
    ]  # fmt: skip
    assert prompts_of([]) == []


def test_the_file_answers_greedily_and_says_what_its_server_should(tmp_path: Path) -> None:
    prompts = [QUESTION[number % 3 :] for number in range(9)]
    with loaded(write_tiny_gguf(tmp_path / "m.gguf"), 64) as model:
        answered = answer(model, prompts)
        live = expected_live(model, prompts, answered.precise)
        cut = model.go_on(QUESTION, model.after(QUESTION), 3)
    assert answered.made == [(prompt, [*WORDS, END_OF_TURN]) for prompt in prompts[:8]]
    assert cut == WORDS[:3] and len(WORDS) < GREEDY_TOKENS
    assert [list(one.ids) for one in live] == prompts
    for one in live:
        assert len(one.top) == 8 and one.top[0][0] == WORDS[0]
        assert one.top[0][1] == pytest.approx(0.0, abs=1e-6)
        assert one.shift == pytest.approx(0.0, abs=1e-6)
    assert [int(values.argmax()) for values in answered.precise] == [WORDS[0]] * 9


def test_logits_are_those_of_the_positions_that_are_asked(tmp_path: Path) -> None:
    """A row of several batches; each position by itself gives the same."""
    import numpy as np

    row = tuple((QUESTION * 20)[:200])
    at = (0, 10, 127, 128, 150, 199)
    drawn = Sample((row, row[:11]), (*((0, place) for place in at), (1, 10)), (True,) * 7, 2)
    with loaded(write_tiny_gguf(tmp_path / "m.gguf"), 256) as model:
        found = model.logits(drawn, "logits")
        model.read(row)
        alone = [model.after(row[: place + 1]) for place in at]
    assert found.shape == (7, model.vocabulary_size)
    np.testing.assert_allclose(found[:6], alone, atol=1e-4)
    np.testing.assert_allclose(found[6], found[1], atol=1e-4)
    assert int(found[1].argmax()) == WORDS[0] and row[10] == NEWLINE


def test_a_model_goes_on_behind_what_its_speed_was_measured_with(tmp_path: Path) -> None:
    """Every token of it was read, one after another, from the beginning."""
    with loaded(write_tiny_gguf(tmp_path / "m.gguf"), 64) as model:
        values = model.after(QUESTION)
        expected = model.go_on(QUESTION, values, 4)
        model.read(WORDS)
        assert model.tokens_per_second(QUESTION) > 0
        assert model.go_on(QUESTION, values, 4) == expected


def test_what_llama_cpp_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(DataError, match=r"broken.gguf: llama.cpp cannot load it"),
        loaded(tmp_path / "broken.gguf", 64),
    ):
        pass
    file = write_tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(DataError, match=r"m.gguf: llama.cpp cannot load this adapter"):
        with loaded(file, 64, file):
            pass


def test_a_file_with_nothing_finite_in_it_is_refused(tmp_path: Path) -> None:
    import numpy as np

    from tests.specimens import rewrite

    file = write_tiny_gguf(tmp_path / "m.gguf")
    broken = rewrite(file, tmp_path / "nan.gguf", {"output_norm.weight": np.full(128, np.nan, np.float32)})
    drawn = Sample((tuple(QUESTION),), ((0, 3),), (True,), 1)
    with loaded(broken, 64) as model, pytest.raises(DataError, match="its logits are not finite"):
        model.logits(drawn, "logits")
