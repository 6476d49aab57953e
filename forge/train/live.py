"""The report of a run while it trains: one page that loads itself again, drawn from the training log.

The ship's own report takes its place at the end. Runs in a worker.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from forge.files import write_text
from forge.train.log import Evaluation, Step, in_words
from forge.train.questions import LiveQuestions

_WIDTH, _HEIGHT, _MARGIN = 640, 180, 44
_SECONDS_BETWEEN = 3.0
_MOST_POINTS = 400
_MOST_ANSWERS = 8
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}<title>{name}: training</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; }}
polyline {{ fill: none; stroke-width: 1.5; }} text {{ font: 11px sans-serif; fill: #57606a; }}</style></head>
<body><h1>{name}</h1><p>{state}</p>
{pictures}
</body></html>
"""
_AGAIN = '<meta http-equiv="refresh" content="5">'

Points = Sequence[tuple[float, float]]


class LivePage:
    """Writes the page at `path`, no more often than every few seconds; nothing where there is no path."""

    def __init__(self, path: Path | None, asked: LiveQuestions) -> None:
        self._path, self._asked, self._written = path, asked, 0.0
        self._steps: list[Step] = []
        self._began = (0.0, 0)

    def begin(self, state: Any, steps: Sequence[Step], evaluations: Sequence[Evaluation]) -> None:
        """`steps` are those of the training log so far; `state` is the trainer's."""
        self._steps = list(steps)
        self._began = (time.monotonic(), state.global_step)
        self._write(state, evaluations, "training begins")

    def add(self, state: Any, step: Step, evaluations: Sequence[Evaluation], note: str) -> None:
        """A step more; `note` is what the console says of it."""
        self._steps.append(step)
        if time.monotonic() - self._written < _SECONDS_BETWEEN:
            return
        began, first = self._began
        step_seconds = (time.monotonic() - began) / max(state.global_step - first, 1)
        minutes = step_seconds * (state.max_steps - state.global_step) / 60
        self._write(state, evaluations, f"{note}, {minutes:.0f} min left")

    def end(self, state: Any, evaluations: Sequence[Evaluation]) -> None:
        """The page stays as it is from here on."""
        self._write(state, evaluations, "training has ended", again="")

    def _write(
        self, state: Any, evaluations: Sequence[Evaluation], note: str, *, again: str = _AGAIN
    ) -> None:
        if self._path is None:
            return
        self._written = time.monotonic()
        text = f"step {state.global_step} of {state.max_steps}: {note}"
        heldout = [(entry.step, entry.loss) for entry in evaluations]
        if evaluations:
            text += f"; {in_words(evaluations[-1])}"
        pictures = [
            _picture("loss (blue) and held-out loss (brown)", self._curve(lambda step: step.loss), heldout),
            _picture("gradient norm", self._curve(lambda step: step.gradient_norm)),
            _picture("learning rate", self._curve(lambda step: step.learning_rate)),
        ]
        page = _PAGE.format(
            refresh=again,
            name=html.escape(self._path.parent.name),
            state=html.escape(f"{text}; written at {time.strftime('%H:%M:%S')}"),
            pictures="\n".join([*pictures, *self._answers()]),
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, page)

    def _answers(self) -> Iterator[str]:
        """Of each question what was answered before training, and at the last evaluations."""
        answers = self._asked.answers
        for number, question in enumerate(self._asked.questions):
            yield f"<h2>{html.escape(question.text)}</h2>\n<dl>"
            for entry in [*answers[:1], *answers[1:][-_MOST_ANSWERS:]]:
                when = f"step {entry.step}" if entry.step else "before training"
                yield f"<dt>{when}</dt><dd>{html.escape(entry.texts[number])}</dd>"
            yield "</dl>"

    def _curve(self, value_of: Callable[[Step], float | None]) -> Points:
        """A value by step, thinned to what a picture shows; the last always."""
        values = ((step.step, value_of(step)) for step in self._steps)
        points = [(step, value) for step, value in values if value is not None]
        every = -(-len(points) // _MOST_POINTS) or 1
        return points[:-1:every] + points[-1:]


def _picture(title: str, *curves: Points) -> str:
    """The curves on one pair of axes from zero; nothing for none."""
    points = [point for curve in curves for point in curve]
    if not points:
        return ""
    last, top = max(step for step, _ in points), max(value for _, value in points) or 1.0
    floor = _HEIGHT - _MARGIN
    drawn = []
    for colour, curve in zip(("#0969da", "#bf8700"), curves, strict=False):
        places = " ".join(
            f"{_MARGIN + step / last * (_WIDTH - 2 * _MARGIN):.1f},"
            f"{floor - value / top * (floor - _MARGIN / 2):.1f}"
            for step, value in curve
        )
        drawn.append(f'<polyline points="{places}" stroke="{colour}"/>')
    drawn.append(f'<text x="4" y="{_MARGIN / 2 + 4:.0f}">{top:.3g}</text>')
    drawn.append(f'<text x="{_WIDTH - _MARGIN}" y="{floor + 16}">step {last:.0f}</text>')
    return f'<h2>{html.escape(title)}</h2>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(drawn)}</svg>'
