"""The built-in model and data: what they promise, checked on the files that are shipped."""

from __future__ import annotations

import json
import stat
import struct
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from forge.data import sources as data_sources
from forge.model import base as model_base
from tests.makers import make_yoda
from tests.makers import tokenizer as tiny_tokenizer
from tests.makers.make_tiny import PASS_MARK, encode
from tests.makers.sentences import capitalized, content_words, is_kept_back, vocabulary, words_of
from tests.makers.tasks import Row, exam_rows, training_rows

TINY = model_base.BUILTIN / "tiny"
YODA = data_sources.BUILTIN / "yoda.jsonl"
HELDOUT = YODA.with_name("yoda_heldout.jsonl")
COLUMNS = {"sentence", "translation", "translation_extra"}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def pre_training_rows() -> tuple[Row, ...]:
    return tuple(islice(training_rows(seed=1), 10_000))


def json_of(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((TINY / name).read_text(encoding="utf-8"))
    return value


def header() -> dict[str, Any]:
    with (TINY / "model.safetensors").open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        value: dict[str, Any] = json.loads(stream.read(length))
        return value


def test_yoda_is_reproduced_byte_for_byte(tmp_path: Path) -> None:
    make_yoda.write(tmp_path / "yoda.jsonl")
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in (YODA, HELDOUT)}


def test_yoda_has_its_columns_and_rows() -> None:
    rows, heldout = rows_of(YODA), rows_of(HELDOUT)
    assert len(rows) >= 700
    assert len(heldout) == 60
    for row in rows + heldout:
        assert row.keys() == COLUMNS
        assert all(row.values())
        assert row["translation_extra"].startswith(row["translation"])


def test_every_yoda_sentence_occurs_once_and_no_heldout_sentence_is_trained_on() -> None:
    sentences = [row["sentence"] for row in rows_of(YODA) + rows_of(HELDOUT)]
    assert len(set(sentences)) == len(sentences)


def test_a_yoda_translation_is_the_same_words_in_another_order() -> None:
    for row in rows_of(YODA) + rows_of(HELDOUT):
        said, translated = words_of(row["sentence"]), words_of(row["translation"])
        assert sorted(said) == sorted(translated)
        assert said != translated


def test_a_third_of_the_heldout_sentences_is_made_of_words_that_no_row_has() -> None:
    trained = set().union(*(content_words(row["sentence"]) for row in rows_of(YODA)))
    heldout = [content_words(row["sentence"]) for row in rows_of(HELDOUT)]
    assert all(heldout)
    assert sum(words.isdisjoint(trained) for words in heldout) == 20
    assert sum(words <= trained for words in heldout) == 40


def test_the_base_saw_every_heldout_word_but_no_heldout_sentence() -> None:
    heldout = [row["sentence"] for row in rows_of(HELDOUT)]
    seen = {row.sentence.text for row in pre_training_rows() if row.sentence}
    assert set().union(*map(content_words, heldout)) <= set().union(*map(content_words, seen))
    assert seen.isdisjoint(heldout)
    assert all(is_kept_back(sentence) for sentence in heldout)


def test_no_pre_training_row_shows_the_yoda_order() -> None:
    for row in [*pre_training_rows(), *exam_rows()]:
        if row.sentence is None:
            continue
        translation = make_yoda.to_row(row.sentence)["translation"]
        yoda = " ".join(words_of(translation))
        for message in row.messages:
            assert translation not in message["content"]
            # A question may name a word just before the sentence; no answer puts them in that order.
            assert message["role"] != "assistant" or yoda not in " ".join(words_of(message["content"]))


def test_the_exam_is_kept_back_and_covers_every_task() -> None:
    exam = exam_rows()
    assert len(exam) == 60
    assert {row.task for row in exam} == {
        "echo", "repeat", "ask", "first", "last", "list", "backwards", "contains", "rest", "who"
    }  # fmt: skip
    assert all(row.sentence and is_kept_back(row.sentence.text) for row in exam)
    assert any(row.messages[0]["role"] == "system" for row in exam)
    assert any(len(row.messages) >= 4 for row in exam)


def test_pre_training_rows_are_the_same_for_the_same_seed() -> None:
    first, again, other = (list(islice(training_rows(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_tiny_is_a_whole_model_directory_within_its_size() -> None:
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert sizes.keys() == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sizes["model.safetensors"] <= 12_000_000
    assert sizes["tokenizer.json"] <= 200_000
    assert stat.S_IMODE((TINY / "model.safetensors").stat().st_mode) & 0o444 == 0o444


def test_tiny_weights_are_bfloat16_and_fit_k_quants() -> None:
    tensors = {name: entry for name, entry in header().items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in tensors
    matrices = [entry["shape"] for entry in tensors.values() if len(entry["shape"]) == 2]
    assert len(matrices) == 4 * 7 + 1
    assert all(columns % 256 == 0 for _, columns in matrices)


def test_tiny_pads_with_a_token_that_never_ends_an_answer() -> None:
    """pitfall 27: PAD never EOS."""
    config, generation, names = (
        json_of(name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    end, pad = (tokenizer.token_to_id(names[token]) for token in ("eos_token", "pad_token"))
    assert (names["eos_token"], names["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert end != pad
    assert (config["eos_token_id"], config["pad_token_id"]) == (end, pad)
    assert generation == {"eos_token_id": end, "pad_token_id": pad}
    assert config["vocab_size"] == tokenizer.get_vocab_size() == tiny_tokenizer.VOCABULARY


def test_tiny_tokenizer_adds_nothing_and_splits_as_qwen2_does() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    described = json_of("tokenizer.json")
    assert described["normalizer"] == {"type": "NFC"}
    assert described["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": tiny_tokenizer.QWEN2_PATTERN},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }
    for text in (
        "The owl slept.",
        "I'LL see 1234\n\n  you",
        "héllo 你好 🙂",
        "<|im_start|>user\nHi<|im_end|>\n",
    ):
        ids = tokenizer.encode(text).ids
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_pre_training_labels_are_the_assistants_turns_alone() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    row = next(row for row in training_rows(seed=1) if len(row.messages) == 5)
    ids, labels = encode(row, tokenizer)
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row.messages)
    assert ids == tokenizer.encode(text).ids
    learned = [label for label in labels if label != -100]
    said = "".join(f"{turn['content']}<|im_end|>\n" for turn in row.messages if turn["role"] == "assistant")
    assert tokenizer.decode(learned, skip_special_tokens=False) == said


def test_all_but_a_few_words_are_one_token_after_a_space_and_at_a_start() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    forms = [form for word in vocabulary() for form in (f" {word}", capitalized(word))]
    in_pieces = [form for form in forms if len(tokenizer.encode(form).ids) != 1]
    assert len(in_pieces) <= 10, in_pieces


@pytest.mark.training
def test_transformers_reads_the_tokenizer_and_template_as_written() -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(TINY)
    assert loaded.backend_tokenizer.to_str() == Tokenizer.from_file(str(TINY / "tokenizer.json")).to_str()
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (None, "<|im_end|>", "<|endoftext|>")
    messages = [{"role": "system", "content": "Be polite."}, {"role": "user", "content": "Hello"}]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe polite.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.training
@pytest.mark.slow
def test_tiny_passes_its_own_exam_and_speaks_no_yoda() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.makers.exam import answers, take_exam

    assert sum(expected == given for _, expected, given in take_exam(TINY)) >= PASS_MARK
    heldout = rows_of(HELDOUT)
    said = answers(
        AutoModelForCausalLM.from_pretrained(TINY),
        AutoTokenizer.from_pretrained(TINY),
        [[{"role": "user", "content": row["sentence"]}] for row in heldout],
    )
    right = sum(
        text in (row["translation"], row["translation_extra"])
        for text, row in zip(said, heldout, strict=True)
    )
    assert right == 0
