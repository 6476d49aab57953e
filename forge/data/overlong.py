"""Rows that are longer than a limit: refused, left out, cut, or parted, as the recipe says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from forge import report
from forge.data.problems import refuse
from forge.data.spool import Line
from forge.data.tokens import IGNORED
from forge.errors import Problem


@dataclass
class Fit:
    """What becomes of the rows of one file that have more than `limit` tokens; and how many there were."""

    limit: int
    way: str
    """`error`, `drop`, `truncate` or `chunk`."""
    rows: int = 0
    overlong: int = 0
    texts: int = 0
    emptied: int = 0
    problems: list[Problem] = field(default_factory=list)

    def look_at(self, lines: Sequence[Line], times: int) -> None:
        """Count the lines of a conversation, which is used so often."""
        self.rows += len(lines) * times
        for line in lines if times else ():
            if line.tokens > self.limit:
                self.overlong += times
                self.texts += line.is_text * times
                message = f"{line.tokens} tokens, {self.limit} fit"
                self.problems += [line.place.problem(message)] if self.way in ("error", "chunk") else []

    def refuse(self) -> None:
        """Raise `DataError` with every row that is too long, where the recipe wants that."""
        is_all_text = self.texts == self.overlong
        if self.way == "error" or (self.way == "chunk" and not is_all_text):
            ways = "drop or truncate" + (", or to chunk" if is_all_text else "")
            refuse(
                self.problems,
                f"{self.overlong} rows are longer than {self.limit} tokens",
                f"raise train.max_length, or set data.overlong to {ways}",
            )

    def of(self, lines: Sequence[Line]) -> Iterator[Line]:
        """The lines that are short enough, and what is made of the others."""
        for line in lines:
            if line.tokens <= self.limit:
                yield line
            elif self.way == "chunk":
                # One token alone predicts nothing.
                yield from (
                    _piece(line, start, self.limit)
                    for start in range(0, line.tokens, self.limit)
                    if line.tokens - start > 1
                )
            elif self.way == "truncate":
                cut = _piece(line, 0, self.limit)
                self.emptied += not cut.supervised
                yield from [cut] if cut.supervised else []

    def warn(self) -> None:
        """Report what was left out or cut."""
        if not self.overlong or self.way == "chunk":
            return
        many = f"{self.overlong} of {self.rows} rows are longer than {self.limit} tokens"
        if self.way == "drop":
            report.warning(f"{many} and were left out")
            return
        words = f"{self.overlong - self.emptied} were cut, without their end of turn"
        if self.emptied:
            words += f", and {self.emptied} had no answer left and were left out"
        report.warning(f"{many}: {words}")


def _piece(line: Line, start: int, limit: int) -> Line:
    """The tokens of a line from `start`, `limit` at most; of a pair, those of both answers."""
    row = json.loads(line.data)
    of_pair = ("rejected_ids", "rejected_labels") if "rejected_ids" in row else ()
    for name in ("input_ids", "labels", *of_pair):
        row[name] = row[name][start : start + limit]
    supervised = len(row["labels"]) - row["labels"].count(IGNORED)
    if of_pair and (row["rejected_ids"] == row["input_ids"] or {*row["rejected_labels"]} == {IGNORED}):
        supervised = 0  # nothing is left to compare
    return replace(
        line,
        data=(json.dumps(row, ensure_ascii=False) + "\n").encode(),
        tokens=max(len(row[name]) for name in ("input_ids", *of_pair[:1])),
        supervised=supervised,
        notes=() if line.is_text else line.notes,
    )
