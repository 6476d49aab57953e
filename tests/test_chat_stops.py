"""The stop contract: held, and broken at each of its places by one change."""

# ruff: noqa: E501 - one fault a line
from __future__ import annotations

from pathlib import Path

import pytest

from forge.chat.modelfile import parse_modelfile
from forge.chat.stops import GENERATION, GGUF, LIVE, LOSS_MASK, StopContract, require
from forge.errors import CheckError, Problem
from forge.model.gguf_header import read_gguf
from tests.tiny_gguf import write_tiny_gguf

STOPS = StopContract("<|im_end|>", {"<|im_end|>": 2, "</s>": 7})
DIALOGUE = {"messages": [{"role": "user"}, {"role": "assistant"}] * 2, "labels": [-100, 5, 2, -100, 7, 2]}
ROW = {"labels": [-100, -100, 5, 6, 2]}


def test_its_texts() -> None:
    assert STOPS.texts == ("<|im_end|>", "</s>")


def test_it_holds_everywhere(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    modelfile = parse_modelfile('FROM x\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n')
    require(
        [
            *STOPS.in_mask([ROW], may_be_cut=False),
            *STOPS.in_mask([{"labels": [-100, 5]}], may_be_cut=True),
            *STOPS.in_generation_config({"eos_token_id": [7, 2]}),
            *STOPS.in_generation_config({}),
            *STOPS.in_gguf(read_gguf(path)),
            *STOPS.in_modelfile(modelfile, "Modelfile"),
            *STOPS.in_replies([("Yes.", "stop"), ("No", "length")], should_end=True),
        ]
    )


def test_a_break_names_its_place(tmp_path: Path) -> None:
    """Silent wrongs 4 and 5, pitfalls 16, 27, 28, 54."""
    header = read_gguf(write_tiny_gguf(tmp_path / "m.gguf"))
    other = StopContract("<|end|>", {"<|end|>": 9})
    broken: dict[str, list[Problem]] = {
        "row 1: <|im_end|> is not supervised": STOPS.in_mask([{"labels": [-100, 5, 6]}], may_be_cut=False),
        "row 2: <|im_end|> is not supervised": STOPS.in_mask([ROW, {"labels": [-100, 5, 6, -100, 7, 2]}], may_be_cut=True),
        "row 3: <|im_end|> is not supervised": STOPS.in_mask([DIALOGUE, DIALOGUE, {**DIALOGUE, "labels": [-100, -100, -100, 7, 2]}], may_be_cut=False, every_turn=True),
        "row 1: nothing is supervised": STOPS.in_mask([{"labels": [-100, -100]}], may_be_cut=True),
        "eos_token_id is 7, without the end of turn <|im_end|> (2)": STOPS.in_generation_config({"eos_token_id": 7}),
        "its end ids are eos 2, eot 2; the end of turn is <|end|> (9)": other.in_gguf(header),
        "no PARAMETER stop for </s>": STOPS.in_modelfile(parse_modelfile("FROM x\nPARAMETER stop <|im_end|>"), "Modelfile"),
        "a reply holds <|im_end|> as text: 'Yes.<|im_end|>'": STOPS.in_replies([("Yes.<|im_end|>", "stop")], should_end=False),
        "no reply ends by itself; the tuned model's did": STOPS.in_replies([("on and on", "length")], should_end=True),
    }  # fmt: skip
    places = [*4 * [LOSS_MASK], GENERATION, GGUF, "Modelfile", LIVE, LIVE]
    for (said, problems), place in zip(broken.items(), places, strict=True):
        assert problems == [Problem(said, place)]
        with pytest.raises(CheckError, match=f"broken at {place}"):
            require(problems)
    assert STOPS.in_replies([("on and on", "length")], should_end=False) == []
