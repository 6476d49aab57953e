"""Makes the built-in synthetic rows: `python -m tests.makers.make_synthetic DIRECTORY`.

Three small sets of the kinds that tutorials train on: the sentiment of a review (18 positive, 18 negative,
14 neutral), lines of Python for a request, and answers to common questions of health. They show a shape and
teach a format; nobody is to be treated, judged or programmed by them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random

SEED = 42
_THINGS = ("camera", "hotel", "film", "laptop", "book", "meal", "phone", "train", "coat")
_REVIEWS: Mapping[str, tuple[int, Sequence[str]]] = {
    "positive": (18, ("I love this {}: it is better than I hoped.", "A wonderful {}, worth every penny.")),
    "negative": (18, ("I regret this {}: it broke my patience.", "A terrible {}, I want my money back.")),
    "neutral": (14, ("The {} arrived on Tuesday and is grey.", "It is a {} like any other.")),
}
_CODE: Mapping[str, str] = {
    "adds the numbers in {0}": "total = sum({0})",
    "counts the items in {0}": "count = len({0})",
    "sorts {0} from the largest down": "ordered = sorted({0}, reverse=True)",
    "keeps the even numbers of {0}": "even = [number for number in {0} if number % 2 == 0]",
    "finds the largest item of {0}": "largest = max({0})",
    "reverses {0}": "backwards = {0}[::-1]",
    "removes repeated items from {0}": "unique = list(dict.fromkeys({0}))",
    "joins the words in {0} with commas": 'text = ", ".join({0})',
}
_NAMES = ("values", "prices", "scores", "ages", "names")
_ADVICE: Mapping[str, str] = {
    "a common cold": "Rest, drink enough, and see a doctor if the fever lasts more than three days.",
    "a mild headache": "Drink water and rest in the dark; see a doctor if it is sudden and severe.",
    "a small burn": "Cool it under running water for twenty minutes; see a doctor if it is large.",
    "a sprained ankle": "Rest, cool and raise it; see a doctor if it cannot bear weight.",
    "a nosebleed": "Lean forward and pinch the nose for ten minutes; see a doctor if it does not stop.",
    "a mosquito bite": "Cool it and do not scratch; see a doctor if the redness spreads.",
    "mild sunburn": "Cool the skin and drink enough; see a doctor if there are blisters or a fever.",
    "a stiff neck": "Keep it warm and move gently; see a doctor at once if there is fever as well.",
    "a sore throat": "Take warm drinks and rest the voice; see a doctor if swallowing becomes hard.",
    "hay fever": "Keep the windows shut and rinse the nose; see a doctor if breathing becomes hard.",
}
_QUESTIONS = ("What helps against {}?", "What should I do about {}?", "When should I see a doctor with {}?")

Row = Mapping[str, str]


def sentiment() -> list[Row]:
    """Alpaca's columns: what to do, on what, and the label."""
    rows: list[Row] = []
    for label, (number, forms) in _REVIEWS.items():
        texts = [form.format(thing) for form, thing in product(forms, _THINGS)][:number]
        rows += [
            {"instruction": "Is this review positive, negative or neutral?", "input": text, "output": label}
            for text in texts
        ]
    Random(SEED).shuffle(rows)
    return rows


def code() -> list[Row]:
    """A request and the line of Python."""
    rows: list[Row] = [
        {"prompt": f"Write a line of Python that {request.format(name)}.", "completion": line.format(name)}
        for (request, line), name in product(_CODE.items(), _NAMES)
    ]
    Random(SEED).shuffle(rows)
    return rows


def medical() -> list[Row]:
    """A question and its answer."""
    rows: list[Row] = [
        {"question": form.format(complaint), "answer": advice}
        for (complaint, advice), form in product(_ADVICE.items(), _QUESTIONS)
    ]
    Random(SEED).shuffle(rows)
    return rows


SETS = {"sentiment": sentiment, "code": code, "medical": medical}


def main(directory: str) -> None:
    for name, make in SETS.items():
        text = "".join(json.dumps(row) + "\n" for row in make())
        (Path(directory) / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
