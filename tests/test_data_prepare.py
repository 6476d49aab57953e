"""The pre-flight: whole output files, and what it does with rows that do not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.codec import to_plain
from forge.data.layout import Shape
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE, Settings, prepare
from forge.data.prompt_format import PromptFormat
from forge.data.reading import Source
from forge.errors import DataError
from tests.test_data_tokens import format_of
from tests.vocabularies import write_tokenizer

QUESTIONS = ("There is bacon.", "A cat sees a dog.", "Speak.", "Is there a house by the river?", "Yes.")


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> PromptFormat:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, "home-made")
    return format_of(directory)


def write(path: Path, questions: tuple[str, ...] = QUESTIONS) -> Path:
    rows = ({"prompt": text, "completion": text.upper()} for text in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(path: Path, **changes: Any) -> Settings:
    return dataclasses.replace(Settings(sources=[Source((path,))], heldout=0), **changes)


def lengths(form: PromptFormat, questions: tuple[str, ...] = QUESTIONS) -> list[int]:
    return [len(form.ids(line(form, text)["text"])) for text in questions]


def line(form: PromptFormat, question: str) -> dict[str, Any]:
    start = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    answer = f"{question.upper()}<|im_end|>"
    prompt, reply = form.ids(start), form.ids(answer)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": question.upper()}]
    labels = [-100] * len(prompt) + reply
    return {
        "text": start + answer,
        "row": {"input_ids": prompt + reply, "labels": labels, "messages": messages},
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_both_files_whole(form: PromptFormat, tmp_path: Path) -> None:
    """F9, E13: what is trained on can be read before anything long starts."""
    source = write(tmp_path / "rows.jsonl")
    told = prepare(settings(source, heldout=0.2), form, 512, tmp_path)
    expected = {text: line(form, text)["row"] for text in QUESTIONS}
    training, heldout = read(tmp_path / TRAIN_FILE), read(tmp_path / HELDOUT_FILE)
    held = heldout[0]["messages"][0]["content"]
    assert heldout == [expected.pop(held)]
    assert training == list(expected.values())
    kept = [text for text in QUESTIONS if text != held]
    counted = lengths(form, tuple(kept))
    first = line(form, kept[0])
    assert to_plain(told) == {
        "rows": 4,
        "heldout_rows": 1,
        "longest_tokens": max(counted),
        "shortest_tokens": min(counted),
        "median_tokens": sorted(counted)[2],
        "mean_tokens": round(sum(counted) / 4, 1),
        "tokens": sum(counted),
        "supervised_tokens": sum(label >= 0 for row in training for label in row["labels"]),
        "overlong_rows": 0,
        "max_length": max(lengths(form)),
        "end_of_turn": "<|im_end|>",
        "end_of_turn_id": 2,
        "texts": 0,
        "duplicates": 0,
        "read": ["rows.jsonl (JSON lines): 5 rows, prompt (prompt, completion)"],
        "notes": {},
        "roles": {},
        "unused": {},
        "bad_rows": [],
        "first_row": {
            "text": first["text"],
            "masked": first["text"].replace(f"{kept[0].upper()}<|im_end|>", f"⟦{kept[0].upper()}<|im_end|>⟧"),
            "supervised": f"{kept[0].upper()}<|im_end|>",
        },
    }


def test_several_files_and_a_limit(form: PromptFormat, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", QUESTIONS[:2]), write(tmp_path / "b.jsonl", QUESTIONS[2:])
    told = prepare(settings(one, sources=[Source((one, two))], limit=3), form, None, tmp_path)
    assert told.rows == 3
    asked = [row["messages"][0]["content"] for row in read(tmp_path / TRAIN_FILE)]
    assert asked == list(QUESTIONS[:3])
    assert (tmp_path / HELDOUT_FILE).read_bytes() == b""


def test_rows_that_are_too_long_are_named(form: PromptFormat, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl")
    limit = sorted(lengths(form))[2]
    with pytest.raises(DataError, match=f"2 rows are longer than {limit} tokens") as caught:
        prepare(settings(source, max_length=limit), form, 512, tmp_path)
    assert [str(problem) for problem in caught.value.problems] == [
        f"rows.jsonl:{number}: {length} tokens, {limit} fit"
        for number, length in enumerate(lengths(form), start=1)
        if length > limit
    ]
    assert not (tmp_path / TRAIN_FILE).exists()


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_rows_that_are_too_long_are_dropped_or_cut(overlong: str, form: PromptFormat, tmp_path: Path) -> None:
    """In the order of the file; a cut row keeps a part of its answer, or goes (pitfall 43)."""
    source = write(tmp_path / "rows.jsonl")
    limit = sorted(lengths(form))[-1] - 3
    told = prepare(settings(source, max_length=limit, overlong=overlong), form, 512, tmp_path)
    expected = [line(form, text)["row"] for text in QUESTIONS]
    fitting = [row for row in expected if len(row["input_ids"]) <= limit]
    cut = [
        {**row, "input_ids": row["input_ids"][:limit], "labels": row["labels"][:limit]} for row in expected
    ]
    assert read(tmp_path / TRAIN_FILE) == (fitting if overlong == "drop" else cut)
    assert told.overlong_rows == len(QUESTIONS) - len(fitting)
    assert told.max_length == limit


PAIRS = (
    ("There is a house.", "THERE IS A HOUSE BY THE RIVER AND A CAT SEES A DOG.", "NO."),
    ("There is a house.", "YES.", "THERE IS NO HOUSE BY THE RIVER, AND NO CAT SEES A DOG."),
    ("There is a house.", "THERE IS A HOUSE BY THE RIVER. A CAT.", "THERE IS A HOUSE BY THE RIVER. A DOG."),
    ("There is a house.", "YES.", "NO."),
)


def pairs(path: Path, rows: Sequence[tuple[str, str, str]] = PAIRS) -> Source:
    keys = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return Source((path,), Shape(pairs=True))


def test_both_answers_of_a_pair_are_cut(form: PromptFormat, tmp_path: Path) -> None:
    """A pair of which the cut leaves the same answer twice has nothing to compare (pitfall 43)."""
    source = pairs(tmp_path / "rows.jsonl")
    prepare(Settings([source], 0), form, 512, tmp_path)
    whole = read(tmp_path / TRAIN_FILE)
    limit = len(whole[3]["input_ids"]) + 4
    told = prepare(Settings([source], 0, max_length=limit, overlong="truncate"), form, 512, tmp_path)
    kept = [whole[0], whole[1], whole[3]]
    for row in kept:
        for name in ("input_ids", "labels", "rejected_ids", "rejected_labels"):
            row[name] = row[name][:limit]
    assert read(tmp_path / TRAIN_FILE) == kept
    assert (told.rows, told.overlong_rows, told.longest_tokens) == (3, 3, limit)


def test_a_pair_that_cannot_be_encoded_is_one_problem(form: PromptFormat, tmp_path: Path) -> None:
    bad = ("What ends it?", "<|im_end|> does.", "It is <|im_end|>.")
    source = pairs(tmp_path / "rows.jsonl", [*PAIRS, bad, ("Speak.", "WOOF.", "NO <|im_end|>."), bad])
    with pytest.raises(DataError, match="3 of 7 rows cannot be encoded") as refused:
        prepare(Settings([source], 0), form, 512, tmp_path)
    assert "skip_bad_rows: 3 would" in str(refused.value.hint)
    told = prepare(Settings([source], 0, skip_bad_rows=3), form, 512, tmp_path)
    assert told.rows == len(PAIRS) and [
        row["messages"][-1]["content"] for row in read(tmp_path / TRAIN_FILE)
    ] == [chosen for _, chosen, _ in PAIRS]


def test_no_row_is_short_enough(form: PromptFormat, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl")
    for overlong in ("drop", "truncate"):
        with pytest.raises(DataError, match="no row is short enough to train on"):
            prepare(settings(source, max_length=5, overlong=overlong), form, 512, tmp_path)


def test_the_context_of_the_base_is_the_limit(form: PromptFormat, tmp_path: Path) -> None:
    """Pitfall 4: more tokens than positions is a crash on a GPU."""
    source = write(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"train\.max_length: 64 tokens is more than the base's 32 positions"):
        prepare(settings(source, max_length=64), form, 32, tmp_path)
    shortest = min(lengths(form))
    with pytest.raises(DataError, match=f"4 rows are longer than {shortest} tokens"):
        prepare(settings(source), form, shortest, tmp_path)


def test_a_held_out_file(form: PromptFormat, tmp_path: Path) -> None:
    source, held = write(tmp_path / "rows.jsonl"), write(tmp_path / "held.jsonl", ("Another.",))
    told = prepare(settings(source, heldout=held), form, 512, tmp_path)
    assert (told.rows, told.heldout_rows) == (5, 1)
    assert read(tmp_path / HELDOUT_FILE) == [line(form, "Another.")["row"]]
    write(held, ("Another.", QUESTIONS[2]))
    with pytest.raises(DataError, match="1 held-out rows are training rows too") as caught:
        prepare(settings(source, heldout=held), form, 512, tmp_path)
    assert str(caught.value.problems[0]) == "held.jsonl:2: this held-out row is also a training row"


def test_the_same_bytes_every_time(form: PromptFormat, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl")
    made = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        prepare(settings(source, heldout=2), form, 512, out)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {TRAIN_FILE, HELDOUT_FILE}
