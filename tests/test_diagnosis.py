"""`forge doctor MESSAGE` and log files: real messages are known, others are not (S1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.diagnosis import diagnose, known_cause, known_faults

CASES = Path(__file__).parent / "cases" / "messages"
KNOWN = (CASES / "known.txt").read_text(encoding="utf-8").splitlines()
UNKNOWN = (CASES / "unknown.txt").read_text(encoding="utf-8").splitlines()


def test_every_line_of_the_table_has_a_real_message() -> None:
    """S1: the troubleshooting chapter's 25 entries, and those of the field."""
    matched = [known_cause(message) for message in KNOWN]
    assert [message for message, known in zip(KNOWN, matched, strict=True) if known is None] == []
    idle = [known.pattern.pattern for known in known_faults() if known not in matched]
    assert idle == []


def test_the_fast_search_for_words_hides_no_match() -> None:
    """Each message is found by its pattern only, too: the words are derived from the patterns."""
    for message in KNOWN:
        first = next(known for known in known_faults() if known.pattern.search(message))
        assert known_cause(message) is first, message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("AttributeError: 'Parameter' object has no attribute 'quant_state'", "without quantization"),
        ("RuntimeError: CUDA error: device-side assert triggered", "train.max_length"),
        (
            "ValueError: Asking to pad but the tokenizer does not have a padding token.",
            "do not set PAD to EOS",
        ),
        ("Error: could not connect to ollama app, is it running?", "ollama serve"),
        (
            "llama_adapter_lora_init: failed: model arch and LoRA arch mismatch",
            "the base that the adapter names",
        ),
        ("OSError: [Errno 28] No space left on device", "forge gc"),
    ],
)
def test_the_remedy_says_what_to_do(message: str, words: str) -> None:
    known = known_cause(message)
    assert known is not None and words in known.remedy


def test_a_line_is_known_wherever_it_stands_in_a_message() -> None:
    """A pattern that begins with `^` means the beginning of a line, not of the message."""
    for message in KNOWN:
        assert known_cause(f"it ended with status 1:\n{message}\nbye") is known_cause(message), message


def test_unrelated_lines_are_not_known() -> None:
    assert [line for line in UNKNOWN if known_cause(line) is not None] == []


def test_a_log_is_read_once_and_each_cause_reported_once() -> None:
    log = ["starting", *[KNOWN[0]] * 3, "...", KNOWN[2], KNOWN[0]]
    matches = diagnose(log)
    assert [(match.line, match.count) for match in matches] == [(2, 4), (6, 1)]
    assert matches[0].message == KNOWN[0] and matches[1].cause == known_cause(KNOWN[2]).cause  # type: ignore[union-attr]
