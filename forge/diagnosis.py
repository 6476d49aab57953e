"""What a message of a library or a server means: cause and remedy, from the table in `messages.toml`.

Not covered: messages that no line of the table fits; nothing is guessed about them.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path(__file__).with_name("messages.toml")
_LONGEST = 2000
"""Characters of a line that are looked at: a log may hold a file on one line."""
_SHOWN = 300


@dataclass(frozen=True)
class Known:
    """One line of the table."""

    pattern: re.Pattern[str]
    words: tuple[str, ...]
    """Of the pattern's alternatives, text that each must have: looked for first, since that is fast."""
    cause: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Match:
    """A message that the table knows; `line` counts from 1, `count` says how often it came."""

    message: str
    cause: str
    remedy: str
    source: str
    line: int = 1
    count: int = 1


@functools.cache
def known_faults() -> tuple[Known, ...]:
    """The table, in the order of the file: of two lines that fit a message the first counts."""
    with _TABLE.open("rb") as file:
        entries = tomllib.load(file)["message"]
    return tuple(
        Known(
            re.compile(entry["pattern"], re.IGNORECASE | re.MULTILINE),
            _words(entry["pattern"]),
            entry["cause"],
            entry["remedy"],
            entry["source"],
        )
        for entry in entries
    )


def _words(pattern: str) -> tuple[str, ...]:
    """The longest plain text in each alternative of a pattern, in lower case."""
    words = []
    for alternative in _alternatives(pattern):
        # What stands in parentheses or may be left out proves nothing.
        bare = re.sub(r"\\[a-zA-Z]|\[[^]]*\][*+?]?", "\0", alternative)
        while (inner := re.sub(r"\([^()]*\)[*+?]?", "\0", bare)) != bare:
            bare = inner
        bare = re.sub(r".([?*]|\{[0-9,]+\})", "\0", re.sub(r"\\(.)", r"\1", bare.replace("\\.", "\1")))
        plain = max(re.split(r"[\0\1.+^$|]", bare), key=len).lower()
        words.append(plain)
    assert all(len(word) > 2 for word in words), (
        f"{pattern}: an alternative without plain text is slow to find"
    )
    return tuple(words)


def _alternatives(pattern: str) -> Iterator[str]:
    depth = start = 0
    for at, character in enumerate(pattern):
        if pattern[at - 1] == "\\" and at:
            continue
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            yield pattern[start:at]
            start = at + 1
    yield pattern[start:]


def known_cause(message: str) -> Known | None:
    """The first line of the table that fits a message."""
    text = message[:_LONGEST]
    lowered = text.lower()
    places = _places()
    letters = {lowered[at : at + 3] for at in range(len(lowered) - 2)}
    for place in sorted({place for three in places.keys() & letters for place in places[three]}):
        known = known_faults()[place]
        if any(word in lowered for word in known.words) and known.pattern.search(text):
            return known
    return None


@functools.cache
def _places() -> Mapping[str, Sequence[int]]:
    """Three letters of every word of the table, few of them common, and the lines whose word has them.

    A line of a log has a hundred such threes, the table hundreds of words: it is looked for that way round.
    """
    words = {word for known in known_faults() for word in known.words}
    threes = {word: [word[at : at + 3] for at in range(len(word) - 2)] for word in words}
    often = Counter(three for several in threes.values() for three in several)
    places: dict[str, list[int]] = {}
    for place, known in enumerate(known_faults()):
        for word in known.words:
            places.setdefault(min(threes[word], key=lambda three: often[three]), []).append(place)
    return places


def diagnose(lines: Iterable[str]) -> list[Match]:
    """What is known of the lines of a log, in the order in which they first came; each cause once."""
    matches: dict[str, Match] = {}
    seen: dict[str, Known | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()[:_LONGEST]
        if text not in seen:
            if len(seen) > 10_000:  # a log of any length needs no more memory than this
                seen.clear()
            seen[text] = known_cause(text)
        known = seen[text]
        if known is None:
            continue
        first = matches.get(known.cause)
        matches[known.cause] = Match(
            first.message if first else text[:_SHOWN],
            known.cause,
            known.remedy,
            known.source,
            first.line if first else number,
            first.count + 1 if first else 1,
        )
    return list(matches.values())
