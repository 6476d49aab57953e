"""The only writer to the terminal: rich on a terminal, plain lines elsewhere, JSON when asked.

Code says what happened (`info`, `warning`, `progress`, ...); the sink decides how it looks. In a
worker the sink sends the same calls to the parent, so code need not know where it runs. Chatter
goes to standard error when standard output carries a result (`--json`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from forge.errors import ForgeError, InterruptedByUserError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Cell = str | int | float | None
Item = TypeVar("Item")
_UNSEEN = 0.4  # seconds: what takes less is over before it is read


class Sink(Protocol):
    """Where what is said goes."""

    def text(self, kind: str, text: str) -> None:
        """`kind` is info, detail, success, warning, error, hint or masked."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None: ...

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        """Progress of a long step; `done == total` ends it. `note` is short: a loss, a rate."""


_PREFIXES: Mapping[str, str] = {"warning": "warning: ", "error": "error: ", "hint": "hint: "}


@dataclass
class _Pace:
    """When the progress of a label began, where, and when it was last shown."""

    began: float
    done_then: float
    shown: float

    def left(self, now: float, done: float, total: float) -> str:
        """The time left at the pace so far, which does not count what an earlier run had done."""
        if done <= self.done_then:
            return ""
        seconds = round((now - self.began) * (total - done) / (done - self.done_then))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


class PlainSink:
    """Lines of text; progress within the first second, then at most every ten, with the time left, and at
    its end.
    """

    seconds_at_first, seconds_between = 0.4, 10.0

    def __init__(self, stream: IO[str], errors: IO[str]) -> None:
        self.stream = stream
        self.errors = errors
        self._paces: dict[str, _Pace] = {}

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
        due = now + self.seconds_at_first - self.seconds_between
        pace = self._paces.setdefault(label, _Pace(now, done, due))
        share = f"{100 * done / total:.0f} %" if total else ""
        line = " ".join(part for part in (f"{label}:", share, note) if part)
        if done >= total:
            del self._paces[label]
            self.text("info", line)
        elif now - pace.shown >= self.seconds_between and done > 0:
            pace.shown = now
            left = pace.left(now, done, total)
            self.text("info", f"{line}, {left}" if left else line)


class RichSink:
    """Colours and live progress bars on a terminal."""

    _styles: Mapping[str, str] = {
        "detail": "dim",
        "success": "green",
        "warning": "yellow",
        "error": "bold red",
        "hint": "cyan",
    }

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        # What is said is text of others too (answers, paths): no :smile: in it becomes a picture.
        self.console: Console = Console(file=stream, highlight=False, emoji=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def text(self, kind: str, text: str) -> None:
        prefix = _PREFIXES.get(kind, "")
        if kind == "masked":
            from rich.text import Text

            # The marks stay: a colour is lost where the screen is copied.
            masked = Text(text, style="dim")
            masked.highlight_regex(r"⟦[^⟧]*⟧", "bold green")
            self.console.print(masked, soft_wrap=True)
            return
        self.console.print(prefix + text, style=self._styles.get(kind), markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None, title_justify="left")
        for column in columns:
            table.add_column(Text(column))
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        self.console.print(table)

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        if self._bars is None:
            self._bars = self._start_bars()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, note=note)
        self._bars.update(self._tasks[label], completed=done, total=total, note=note)
        if done >= total:
            del self._tasks[label]
            if not self._tasks:
                self.close()

    def _start_bars(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[note]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )
        bars.start()
        return bars

    def close(self) -> None:
        """Leave the bars as they are, and the cursor below them."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()


class NotebookSink(PlainSink):
    """In Jupyter: text as in a terminal, and one line for each long step that is written over."""

    seconds_between = 0.5

    def __init__(self, stream: IO[str], errors: IO[str]) -> None:
        super().__init__(stream, errors)
        self._lines: dict[str, Any] = {}
        self._shown: dict[str, float] = {}

    def advance(self, label: str, done: float, total: float, note: str) -> None:
        from IPython import display

        now = time.monotonic()
        if done < total and now - self._shown.get(label, -1.0) < self.seconds_between:
            return
        self._shown[label] = now
        share = f"{100 * done / total:3.0f} %" if total else ""
        line = display.Pretty(" ".join(part for part in (f"{label}:", share, note) if part))
        if label in self._lines:
            self._lines[label].update(line)
        else:
            self._lines[label] = display.display(line, display_id=True)
        if done >= total:
            del self._lines[label], self._shown[label]


_sink: Sink | None = None
_verbose = False
_json = False
_copy: IO[str] | None = None


def configure(*, sink: Sink | None = None, verbose: bool = False, as_json: bool = False) -> None:
    """Choose how to speak; without a `sink` it is chosen, when something is said, by what the stream is."""
    global _sink, _verbose, _json
    _sink, _verbose, _json = sink, verbose, as_json
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does by itself: a path or an answer that the terminal's encoding lacks is
        # shown escaped, instead of ending the command.
        sys.stdout.reconfigure(errors="backslashreplace")


def keep_output_clear() -> None:
    """From now on nothing but data goes to standard output, as with `--json`."""
    global _sink  # noqa: PLW0603
    if _json:
        raise RecipeError("--json: its result would stand among the rows on standard output")
    if _sink is None or isinstance(_sink, PlainSink | RichSink):
        _sink = _default_sink(sys.stderr)


def _default_sink(stream: IO[str]) -> Sink:
    if _in_a_notebook():
        return NotebookSink(stream, sys.stderr)
    if stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        return RichSink(stream)
    return PlainSink(stream, sys.stderr)


def _in_a_notebook() -> bool:
    """Whether this is Jupyter's kernel; its modules are imported elsewhere, too, by what starts kernels."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


def _current() -> Sink:
    global _sink  # noqa: PLW0603
    if _sink is None:
        _sink = _default_sink(sys.stderr if _json else sys.stdout)
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
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {kind}: {text}\n"
        _copy.write(line.encode("utf-8", "backslashreplace").decode("utf-8"))
        _copy.flush()
    if kind != "detail" or _verbose:
        _current().text(kind, text)


def info(text: str) -> None:
    say("info", text)


def masked(text: str) -> None:
    """A row as the model sees it, ⟦what carries loss⟧ in colour."""
    say("masked", text)


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


def track(
    label: str, items: Iterable[Item], total: int, size: Callable[[Item], int] | None = None
) -> Iterator[Item]:
    """The items, with progress shown where they take long: their number, or their sizes, in all `total`."""
    done, last, is_shown = 0, time.monotonic(), False
    for item in items:
        if (now := time.monotonic()) - last > _UNSEEN:
            advance(label, min(done, total - 1), total)
            last, is_shown = now, True
        yield item
        done += size(item) if size else 1
    if is_shown:
        advance(label, total, total)


def close() -> None:
    """End unfinished progress bars, so that the cursor is left where it should be."""
    if isinstance(_sink, RichSink):
        _sink.close()


def result(fields: Mapping[str, object]) -> None:
    """The command's result: with `--json` the last line of standard output, else nothing."""
    if _json:
        from forge.codec import to_plain  # loaded by no command that shows help only

        print(json.dumps(to_plain(fields)), file=sys.stdout, flush=True)


def output(text: str) -> None:
    """Data that the user asked for (a template, a Modelfile, an answer), on standard output.

    With `--json` it stays out: the result carries it.
    """
    if not _json:
        print(text, file=sys.stdout, flush=True)


def write(text: str) -> None:
    """Text as it comes (a streamed answer, a prompt), without a line's end of its own."""
    print(text, end="", file=sys.stderr if _json else sys.stdout, flush=True)


def ask(question: str) -> bool:
    """Whether the person at the terminal says yes; False where nobody can be asked."""
    if _json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def error(failure: ForgeError) -> None:
    """Show a failure: every problem on its own line, what they come to, the hint last.

    With `--json` as its object too.
    """
    close()
    for problem in failure.problems:
        say("error", str(problem))
    if failure.message not in map(str, failure.problems):
        # An interruption is what the user asked for, not a fault.
        say("info" if isinstance(failure, InterruptedByUserError) else "error", failure.message)
    if failure.hint:
        say("hint", failure.hint)
    result({**failure.fields, "error": failure.as_json()})
