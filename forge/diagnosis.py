"""What a message of a library or a server means: cause and remedy, from the table in `messages.toml`.

Not covered: messages that no line of the table fits; nothing is guessed about them.
"""

from __future__ import annotations

import functools
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_TABLE = Path(__file__).with_name("messages.toml")
_LONGEST = 2000
"""Characters of a line that are looked at: a log may hold a file on one line."""
_BLOCK = 4096
_SLAB = 1 << 16
_DIGITS = str.maketrans("123456789", "000000000")
_SHOWN = 300


@dataclass(frozen=True)
class Known:
    """One line of the table."""

    pattern: re.Pattern[str]
    words: tuple[str, ...]
    """Text that each alternative of the pattern must have, 0 for any digit: looked for first, since fast."""
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
        words.append(plain.translate(_DIGITS))
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
    return _first_that_fits(_possible(text), text)


def _possible(text: str) -> list[Known]:
    """The lines of the table with a word in the text, whatever its numbers."""
    lowered = text.lower().translate(_DIGITS)
    return [known for known in known_faults() if any(word in lowered for word in known.words)]


def _first_that_fits(possible: list[Known], text: str) -> Known | None:
    return next((known for known in possible if known.pattern.search(text)), None)


def diagnose(lines: Iterable[str]) -> list[Match]:
    """What is known of the lines of a log, in the order in which they first came; each cause once.

    Words are looked for in thousands of lines at once, those that differ only in their numbers once.
    """
    matches: dict[str, Match] = {}
    numbered = enumerate((line.strip()[:_LONGEST] for line in lines), start=1)
    while block := list(itertools.islice(numbered, _BLOCK)):
        shapes = "\n".join(text for _, text in block).translate(_DIGITS).split("\n")
        possible = _possible("\n".join(set(shapes)))
        for number, text in block if possible else ():
            if known := _first_that_fits(possible, text):
                first = matches.get(known.cause) or Match(
                    text[:_SHOWN], known.cause, known.remedy, known.source, number, 0
                )
                matches[known.cause] = replace(first, count=first.count + 1)
    return list(matches.values())


def log_lines(path: Path) -> Iterator[str]:
    """The lines of a log of any size, of each the part that is looked at."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(_LONGEST):
            yield line
            while not line.endswith("\n") and (line := file.readline(_SLAB)):
                pass
