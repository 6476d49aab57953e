"""Makes the built-in data: `python -m tests.makers.make_yoda OUT.jsonl`.

Sentences of the built-in grammar and how Yoda would say them: the tail first, then the head. Which
word Yoda adds depends on the kind of sentence alone, so each sentence has one right answer and
exact match is a fair measure. Beside OUT.jsonl it writes OUT_heldout.jsonl: sentences that the rows
do not have, the last third of them made of content words that no row has. All held-out sentences
are kept back from the built-in model's pre-training too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from forge import report
from tests.makers.sentences import (
    COMMON_WORDS,
    FRESH_WORDS,
    KINDS,
    Sentence,
    Words,
    capitalized,
    is_kept_back,
    make_sentence,
)

TRAINING_ROWS = 720
HELDOUT_COMMON = 40
HELDOUT_FRESH = 20
_SEED = 900
# Drawn after the built-in base and the quickstart's settings were chosen, so that its figures are no
# choice's. Whoever chooses anew draws anew.
_HELDOUT_SEED = 2612

_EXTRAS = {"place": " Yes, hrrrm.", "deed": " Hmm.", "state": " Yes.", "existence": " Hmm.", "duty": ""}

Row = dict[str, str]


def to_row(sentence: Sentence) -> Row:
    """The data's three columns."""
    translation = f"{capitalized(sentence.tail)}, {sentence.head}."
    return {
        "sentence": sentence.text,
        "translation": translation,
        "translation_extra": translation + _EXTRAS[sentence.kind],
    }


def _sentences(random: Random, words: Words, *, kept_back: bool) -> Iterator[Sentence]:
    """Sentences without end and without a repetition, each kind in turn."""
    seen: set[str] = set()
    while True:
        for kind in KINDS:
            sentence = make_sentence(kind, random, words)
            while sentence.text in seen or is_kept_back(sentence.text) != kept_back:
                sentence = make_sentence(kind, random, words)
            seen.add(sentence.text)
            yield sentence


def training_rows() -> list[Row]:
    """The rows to train on, made of the common words."""
    sentences = _sentences(Random(_SEED), COMMON_WORDS, kept_back=False)
    return [to_row(sentence) for sentence in islice(sentences, TRAINING_ROWS)]


def heldout_rows() -> list[Row]:
    """The rows to test on: first those of common words, then those of words that no row has."""
    random = Random(_HELDOUT_SEED)
    common = islice(_sentences(random, COMMON_WORDS, kept_back=True), HELDOUT_COMMON)
    fresh = islice(_sentences(random, FRESH_WORDS, kept_back=True), HELDOUT_FRESH)
    return [to_row(sentence) for sentence in (*common, *fresh)]


def write(out: Path) -> None:
    """Write `out` and, beside it, the held-out rows."""
    _write_rows(out, training_rows())
    _write_rows(out.with_name(f"{out.stem}_heldout{out.suffix}"), heldout_rows())


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    report.info(f"{path}: {text.count(chr(10))} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
