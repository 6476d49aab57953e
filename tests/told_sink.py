"""A sink of `report` that remembers what was said."""

from __future__ import annotations


class Told:
    """A sink that remembers what was said."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []
        self.steps: list[tuple[str, float, float]] = []

    def text(self, kind: str, text: str) -> None:
        self.texts.append((kind, text))

    def table(self, title: str, columns: object, rows: object) -> None:
        raise AssertionError("no table is shown here")

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        self.steps.append((label, done, total))
