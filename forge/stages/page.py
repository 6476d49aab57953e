"""`report.html` of a run: one file, no scripts, nothing fetched; made from what the manifest holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from forge.pipeline.stage import Result
from forge.store import durable
from forge.train.run import LOG_FILE

_WIDTH, _HEIGHT, _MARGIN = 640, 220, 44


def write_page(path: Path, manifest: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Write the report; the loss curve comes from the training log in the store."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    durable.write_text(
        path,
        template.render(
            manifest=manifest,
            facts=manifest["facts"],
            curve=loss_curve(_losses(results)),
            answers=_answers(manifest["facts"]),
        ),
    )


def _losses(results: Mapping[str, Result]) -> list[tuple[int, float]]:
    train = results.get("train")
    log = train.artifact.path / LOG_FILE if train and train.artifact else None
    if log is None or not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def _answers(facts: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Held-out answers, the served ones where the shipped file was asked."""
    served = (facts.get("smoke") or {}).get("heldout")
    exact = (facts.get("evaluate") or {}).get("exact")
    found: Sequence[Mapping[str, Any]] = (served or exact or {}).get("answers", [])
    return found


def loss_curve(points: Sequence[tuple[int, float]]) -> str:
    """The loss by step as an SVG picture; empty for fewer than two points."""
    if len(points) < 2:
        return ""
    steps, losses = [point[0] for point in points], [point[1] for point in points]
    top, right = max(losses) * 1.05 or 1.0, max(steps)
    x_scale = (_WIDTH - 2 * _MARGIN) / max(right - steps[0], 1)
    y_scale = (_HEIGHT - 2 * _MARGIN) / top

    def place(step: float, loss: float) -> str:
        return f"{_MARGIN + (step - steps[0]) * x_scale:.1f},{_HEIGHT - _MARGIN - loss * y_scale:.1f}"

    line = " ".join(place(step, loss) for step, loss in points)
    floor = _HEIGHT - _MARGIN
    labels = [
        f'<text x="{_MARGIN - 6}" y="{_MARGIN + 4}" text-anchor="end">{top:.2f}</text>',
        f'<text x="{_MARGIN - 6}" y="{floor + 4}" text-anchor="end">0</text>',
        f'<text x="{_MARGIN}" y="{floor + 18}">step {steps[0]}</text>',
        f'<text x="{_WIDTH - _MARGIN}" y="{floor + 18}" text-anchor="end">step {right}</text>',
    ]
    axes = f'<path d="M{_MARGIN} {_MARGIN} V{floor} H{_WIDTH - _MARGIN}" class="axis"/>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="training loss by step">'
        f'{axes}<polyline points="{line}"/>{"".join(labels)}</svg>'
    )
