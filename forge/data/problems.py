"""Rows that cannot be used: equal faults counted once, and refused together or left out.

What is left out (`data.skip_bad_rows`) is always reported. Not covered: faults of a whole file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from forge import report
from forge.errors import DataError, Problem

_MOST_PROBLEMS = 20
_EXAMPLES = 3
_NUMBER = re.compile(r"\[\d+\]")


def grouped(problems: Sequence[Problem]) -> list[Problem]:
    """Equal faults as one problem at the first's place, with their number and further examples.

    Equal: the same words about the same field of the same file, whichever turn it is.
    """
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        key = (problem.message, _NUMBER.sub("[]", problem.field), problem.file)
        groups.setdefault(key, []).append(problem)
    return [_counted(group) for group in groups.values()]


def _counted(group: Sequence[Problem]) -> Problem:
    if len(group) == 1:
        return group[0]
    others = list(dict.fromkeys(problem.line for problem in group))[1 : 1 + _EXAMPLES]
    more = ", ..." if len(group) > 1 + len(others) else ""
    also = f"; also {', '.join(map(str, others))}{more}" if others else ""
    return replace(group[0], message=f"{group[0].message} ({len(group)} times{also})")


def refuse(problems: Sequence[Problem], message: str, hint: str) -> None:
    """Raise one `DataError` with all `problems`, equal ones counted once, if there are any."""
    if not problems:
        return
    kinds = grouped(problems)
    cut = len(kinds) > _MOST_PROBLEMS
    shown = f" (the first {_MOST_PROBLEMS} of {len(kinds)} kinds are shown)" if cut else ""
    raise DataError(message + shown, hint=hint, problems=kinds[:_MOST_PROBLEMS])


@dataclass
class BadRows:
    """The faults of one reading; `allowed` rows may have some and are then left out."""

    allowed: int = 0
    skipped: list[Problem] = field(default_factory=list)

    def settle(self, problems: Sequence[Problem], message: str, hint: str) -> None:
        """Leave the rows of `problems` out, or raise one `DataError` where they are more than allowed."""
        if not problems:
            return
        if len(self.skipped) + len(problems) > self.allowed:
            most = f"; data.skip_bad_rows allows {self.allowed}" if self.allowed else ""
            way = f"data.skip_bad_rows: {len(self.skipped) + len(problems)} would leave them out"
            refuse([*self.skipped, *problems], message + most, f"{hint}; {way}" if hint else way)
        self.skipped += problems
        for problem in grouped(problems):
            report.warning(f"left out: {problem}")
