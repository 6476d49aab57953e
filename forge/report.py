"""The only writer to the terminal: rich on a terminal, plain lines elsewhere, JSON when asked.

Code says what happened (`info`, `warning`, `progress`, ...); the sink decides how it looks. In a
worker the sink sends the same calls to the parent, so code need not know where it runs. Chatter
goes to standard error when standard output carries a result (`--json`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Protocol

from forge.errors import ForgeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Cell = str | int | float | None


class Sink(Protocol):
    """Where what is said goes."""

    def text(self, kind: str, text: str) -> None:
        """`kind` is info, detail, success, warning or error."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None: ...

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        """Progress of a long step; `done == total` ends it. `note` is short: a loss, a rate."""


_PREFIXES: Mapping[str, str] = {"warning": "warning: ", "error": "error: "}


class PlainSink:
    """Lines of text; progress at most every ten seconds and at its end."""

    seconds_between = 10.0

    def __init__(self, stream: IO[str], errors: IO[str]) -> None:
        self.stream = stream
        self.errors = errors
        self._last: dict[str, float] = {}

    def text(self, kind: str, text: str) -> None:
        prefix = _PREFIXES.get(kind, "")
        print(prefix + text, file=self.errors if prefix else self.stream, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        cells = [list(columns)] + [["" if cell is None else str(cell) for cell in row] for row in rows]
        widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
        if title:
            self.text("info", title)
        for row in cells:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.text("info", "  " + line.rstrip())

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        first = self._last.setdefault(label, now)
        if done < total and (now - first < self.seconds_between or done == 0):
            return
        self._last[label] = now
        if done >= total:
            del self._last[label]
        share = f"{100 * done / total:.0f} %" if total else ""
        self.text("info", f"{label}: {share} {note}".rstrip())


class RichSink:
    """Colours and live progress bars on a terminal."""

    _styles: Mapping[str, str] = {
        "detail": "dim",
        "success": "green",
        "warning": "yellow",
        "error": "bold red",
    }

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        self.console: Console = Console(file=stream, highlight=False)
        self._bars: dict[str, tuple[Progress, Any]] = {}

    def text(self, kind: str, text: str) -> None:
        prefix = _PREFIXES.get(kind, "")
        self.console.print(prefix + text, style=self._styles.get(kind), markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        self.console.print(table)

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if label not in self._bars:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}% {task.fields[note]}", markup=False),
                TimeRemainingColumn(),
            )
            bar = Progress(*columns, console=self.console)
            bar.start()
            self._bars[label] = (bar, bar.add_task(label, total=total, note=note))
        bar, task = self._bars[label]
        bar.update(task, completed=done, total=total, note=note)
        if done >= total:
            bar.stop()
            del self._bars[label]

    def close(self) -> None:
        for bar, _ in self._bars.values():
            bar.stop()
        self._bars.clear()


_sink: Sink | None = None
_verbose = False
_json = False
_copy: IO[str] | None = None


def configure(*, sink: Sink | None = None, verbose: bool = False, as_json: bool = False) -> None:
    """Choose how to speak; without a `sink` it is chosen by what the stream is."""
    global _sink, _verbose, _json  # noqa: PLW0603 - the one writer is one per process
    _verbose, _json = verbose, as_json
    _sink = sink or _default_sink(sys.stderr if as_json else sys.stdout)


def _default_sink(stream: IO[str]) -> Sink:
    if stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        return RichSink(stream)
    return PlainSink(stream, sys.stderr)


def _current() -> Sink:
    if _sink is None:
        configure()
    assert _sink is not None
    return _sink


@contextlib.contextmanager
def copied_to(stream: IO[str]) -> Iterator[None]:
    """Also write every line said inside the block to `stream` (a run's log)."""
    global _copy  # noqa: PLW0603
    before, _copy = _copy, stream
    try:
        yield
    finally:
        _copy = before


def say(kind: str, text: str) -> None:
    """Say `text` as one of the kinds of `Sink.text`."""
    if _copy:
        _copy.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {kind}: {text}\n")
        _copy.flush()
    if kind != "detail" or _verbose:
        _current().text(kind, text)


def info(text: str) -> None:
    say("info", text)


def detail(text: str) -> None:
    """Shown with `-v`; always in the log."""
    say("detail", text)


def success(text: str) -> None:
    say("success", text)


def warning(text: str) -> None:
    say("warning", text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    _current().table(title, columns, rows)


def advance(label: str, done: float, total: float, note: str = "") -> None:
    """Move the progress of `label`; `done == total` ends it."""
    _current().advance(label, done, total, note)


def close() -> None:
    """End unfinished progress bars, so that the cursor is left where it should be."""
    if isinstance(_sink, RichSink):
        _sink.close()


def result(fields: Mapping[str, object]) -> None:
    """The command's result: with `--json` the last line of standard output, else nothing."""
    if _json:
        print(json.dumps(fields, ensure_ascii=False), file=sys.stdout, flush=True)


def output(text: str) -> None:
    """Data that the user asked for (a template, a Modelfile, an answer), on standard output.

    With `--json` it stays out: the result carries it.
    """
    if not _json:
        print(text, file=sys.stdout, flush=True)


def error(failure: ForgeError) -> None:
    """Show a failure: every problem on its own line, the hint last; with `--json` as its object too."""
    close()
    if failure.problems:
        for problem in failure.problems:
            say("error", str(problem))
        say("info", failure.message)
    else:
        say("error", failure.message)
    if failure.hint:
        say("info", f"hint: {failure.hint}")
    result({"error": failure.as_json()})
