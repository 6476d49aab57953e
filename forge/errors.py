"""The errors a user sees: one tree, each with an exit code, a hint and every problem at once.

Anything that is not a `ForgeError` is a bug (exit code 1, traceback in the run's log).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with the place where it was written."""

    message: str
    field: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        field = "" if place == f"-o {self.field}" else self.field  # an override's place is its field
        return ": ".join(part for part in (place, field, self.message) if part)


class ForgeError(Exception):
    """The root of what a user can cause or fix.

    `code` is the process's exit code; `hint` says what to do; `problems` lists all that was found.
    """

    code = 1
    fields: Mapping[str, object] = MappingProxyType({})
    """What `--json` shows beside the error: what there is of the command's result."""

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def as_json(self) -> dict[str, object]:
        """The value of `error` in the last line of `--json` output."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "problems": [asdict(problem) for problem in self.problems],
        }


class RecipeError(ForgeError):
    """The recipe or the command's arguments are wrong."""

    code = 2


class DataError(ForgeError):
    """The user's data, base or adapter is missing, broken or does not fit."""

    code = 2


class MissingToolError(ForgeError):
    """A program, package or service that is needed is not there."""

    code = 3


def require_each(checks: Iterable[Callable[[], object]]) -> None:
    """Make every check; raise one `MissingToolError` with all that they raise of it."""
    problems: dict[Problem, None] = {}  # two checks may need one tool
    hints: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except MissingToolError as missing:
            problems |= dict.fromkeys(missing.problems or (Problem(missing.message),))
            hints[missing.hint] = None
    if problems:
        first = next(iter(problems))
        message = first.message if len(problems) == 1 else f"{len(problems)} tools are missing"
        raise MissingToolError(message, hint="; ".join(hints), problems=tuple(problems))


class StageError(ForgeError):
    """A stage of the pipeline failed."""

    code = 4


class OutOfMemoryError(StageError):
    """The memory of the device or of the machine is full: less at once may fit."""


class UnexportableError(StageError):
    """llama.cpp's converter, or llama.cpp itself, does not take this model."""


class UnmadeTypeError(StageError):
    """This type cannot be made of this model, or not without an importance matrix; another may be."""


class CheckError(ForgeError):
    """A check or a smoke query came out wrong: the artifact exists but is not what it should be."""

    code = 5


class InterruptedByUserError(ForgeError):
    """Ctrl-C or SIGTERM; everything was stopped cleanly."""

    code = 130


_KINDS: dict[int, type[ForgeError]] = {
    kind.code: kind
    for kind in (ForgeError, DataError, MissingToolError, StageError, CheckError, InterruptedByUserError)
}


def error_from_json(error: Mapping[str, object], *, is_of_memory: bool = False) -> ForgeError:
    """Rebuild an error that crossed a process boundary; the inverse of `ForgeError.as_json`.

    Of its class only the exit code crosses, and whether it was an `OutOfMemoryError`.
    """
    code = error.get("code")
    kind = OutOfMemoryError if is_of_memory else _KINDS.get(code if isinstance(code, int) else 1, ForgeError)
    listed = error.get("problems")
    problems = [Problem(**item) for item in listed] if isinstance(listed, list) else []
    return kind(str(error.get("message", "")), hint=str(error.get("hint", "")), problems=problems)
