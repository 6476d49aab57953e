"""Pictures of a report, as inline SVG: curves and bars, drawn from numbers, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 640, 220, 44
_COLOURS = ("#0969da", "#bf8700", "#8250df")
_MOST_OF_A_NAME = 36
_FLOOR = 1e-9
"""Below this KL is rounding; a logarithm needs a floor."""

Points = Sequence[tuple[float, float]]


def loss_curve(points: Sequence[tuple[int, float]]) -> str:
    """The loss by step; empty for fewer than two points."""
    if len(points) < 2:
        return ""
    top = max(point[1] for point in points) * 1.05 or 1.0
    labels = ((0.0, "0"), (1.0, f"{top:.2f}"))
    return _curves({"": points}, lambda loss: loss / top, labels, "step", "training loss by step")


def kl_by_position(legs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Mean KL divergence by place in the row, logarithmic; one line a file."""
    lines = {
        name: [(float(point["position"]), max(float(point["mean"]), _FLOOR)) for point in points]
        for name, points in legs.items()
        if len(points) > 1
    }
    if not lines:
        return ""
    values = [math.log10(value) for points in lines.values() for _, value in points]
    low, high = math.floor(min(values)), math.ceil(max(values))
    high += high == low
    labels = tuple(((power - low) / (high - low), f"1e{power}") for power in range(low, high + 1))
    title = "KL divergence from the reference by position"

    def share(value: float) -> float:
        return (math.log10(value) - low) / (high - low)

    return _curves(lines, share, labels, "position", title)


def kl_by_size(types: Sequence[Mapping[str, Any]], max_kl: float, chosen: str | None) -> str:
    """KL divergence of each type over its size in MB, logarithmic, with the budget as a line."""
    values = [math.log10(max(float(row["kl_mean"]), _FLOOR)) for row in types] + [math.log10(max_kl)]
    low, high = math.floor(min(values)), math.ceil(max(values))
    high += high == low
    sizes = [row["bytes"] / 1e6 for row in types]
    first, last = min(sizes), max(sizes)
    wide, tall, floor = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN, _HEIGHT - _MARGIN

    def height(power: float) -> float:
        return floor - (power - low) / (high - low) * tall

    drawn = [f'<path d="M{_MARGIN} {_MARGIN} V{floor} H{_WIDTH - _MARGIN}" class="axis"/>']
    for power in range(low, high + 1):
        label = height(power) + 4
        drawn.append(f'<text x="{_MARGIN - 6}" y="{label:.1f}" text-anchor="end">1e{power}</text>')
    y = height(values.pop())
    drawn.append(f'<path d="M{_MARGIN} {y:.1f} H{_WIDTH - _MARGIN}" stroke="#cf222e" stroke-dasharray="4"/>')
    drawn.append(f'<text x="{_WIDTH - _MARGIN}" y="{y - 5:.1f}" text-anchor="end">budget {max_kl:g}</text>')
    for row, value, size in zip(types, values, sizes, strict=True):
        x, y = _MARGIN + 12 + (size - first) / max(last - first, 1e-9) * (wide - 60), height(value)
        fill = "#1a7f37" if row["quant"] == chosen else _COLOURS[0]
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}"/>')
        # Slanted: neighbouring types are close, and their names would lie on each other.
        place = f'x="{x + 5:.1f}" y="{y - 5:.1f}" transform="rotate(-40 {x + 5:.1f} {y - 5:.1f})"'
        drawn.append(f"<text {place}>{escape(str(row['quant']))}</text>")
    for size, x in ((first, _MARGIN + 12), (last, _MARGIN + wide - 48)):
        drawn.append(f'<text x="{x}" y="{floor + 18}" text-anchor="middle">{size:.1f} MB</text>')
    return _picture(_HEIGHT, "KL divergence from F16 by size, one point a type", drawn)


def _curves(
    lines: Mapping[str, Points],
    share: Callable[[float], float],
    labels: Sequence[tuple[float, str]],
    axis: str,
    title: str,
) -> str:
    """Lines over one axis; `share` places a value between bottom (0) and top (1)."""
    places = [place for points in lines.values() for place, _ in points]
    first, last = min(places), max(places)
    wide, high = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    floor = _HEIGHT - _MARGIN
    drawn = [f'<path d="M{_MARGIN} {_MARGIN} V{floor} H{_WIDTH - _MARGIN}" class="axis"/>']
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(
            f"{_MARGIN + (place - first) / max(last - first, 1) * wide:.1f},{floor - share(value) * high:.1f}"
            for place, value in points
        )
        drawn.append(f'<polyline points="{line}" style="stroke: {colour}"/>')
        if name:
            x = _MARGIN + 8 + number * 160
            drawn.append(f'<text x="{x}" y="{_MARGIN - 12}" style="fill: {colour}">{escape(name)}</text>')
    for at, text in labels:
        drawn.append(
            f'<text x="{_MARGIN - 6}" y="{floor - at * high + 4:.1f}" text-anchor="end">{text}</text>'
        )
    drawn.append(f'<text x="{_MARGIN}" y="{floor + 18}">{axis} {first:g}</text>')
    drawn.append(f'<text x="{_WIDTH - _MARGIN}" y="{floor + 18}" text-anchor="end">{axis} {last:g}</text>')
    return _picture(_HEIGHT, title, drawn)


def top1_by_stage(handovers: Sequence[Mapping[str, object]]) -> str:
    """A bar for each hand-over: the share of positions with the same top token."""
    bars = [(str(handover["to"]), handover["top1"], bool(handover["ok"])) for handover in handovers]
    known = [(name, share, ok) for name, share, ok in bars if isinstance(share, float)]
    if not known:
        return ""
    wide, step = _WIDTH - 320, 26
    drawn = []
    for number, (name, share, ok) in enumerate(known):
        y = 8 + number * step
        fill = "#1a7f37" if ok else "#cf222e"
        drawn.append(f'<text x="230" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        drawn.append(f'<rect x="240" y="{y}" width="{share * wide:.1f}" height="18" fill="{fill}"/>')
        drawn.append(f'<text x="{246 + share * wide:.1f}" y="{y + 13}">{share:.2%}</text>')
    return _picture(16 + step * len(known), "share of positions with the same top token, by stage", drawn)


def bars(rows: Sequence[tuple[str, float, str]], title: str) -> str:
    """A bar from zero for each name, with its value in words; empty for no rows."""
    if not rows:
        return ""
    step, left = 26, 230
    longest = max(value for _, value, _ in rows) or 1.0
    drawn = []
    for number, (name, value, words) in enumerate(rows):
        y, wide = 8 + number * step, max(value, 0.0) / longest * (_WIDTH - left - 100)
        label = name if len(name) <= _MOST_OF_A_NAME else f"{name[: _MOST_OF_A_NAME - 1]}…"
        drawn.append(f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        drawn.append(f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="18" fill="{_COLOURS[0]}"/>')
        drawn.append(f'<text x="{left + 6 + wide:.1f}" y="{y + 13}">{escape(words)}</text>')
    return _picture(16 + step * len(rows), title, drawn)


def points(places: Sequence[tuple[float, float, str]], axis: str, title: str) -> str:
    """A named point for each (x, y, name); `axis` is x. Neither axis begins at zero."""
    across, up = [place[0] for place in places], [place[1] for place in places]
    (first, last), (low, high) = (min(across), max(across)), (min(up), max(up))
    wide, tall, floor = _WIDTH - 2 * _MARGIN - 60, _HEIGHT - 2 * _MARGIN, _HEIGHT - _MARGIN
    drawn = [f'<path d="M{_MARGIN} {_MARGIN} V{floor} H{_WIDTH - _MARGIN}" class="axis"/>']
    for x, y, name in places:
        right = _MARGIN + 12 + (x - first) / max(last - first, 1e-9) * (wide - 12)
        down = floor - 12 - (y - low) / max(high - low, 1e-9) * (tall - 12)
        drawn.append(f'<circle cx="{right:.1f}" cy="{down:.1f}" r="4" fill="{_COLOURS[0]}"/>')
        drawn.append(f'<text x="{right + 7:.1f}" y="{down - 5:.1f}">{escape(name)}</text>')
    for value, down in ((low, floor - 12), (high, _MARGIN)):
        drawn.append(f'<text x="{_MARGIN - 6}" y="{down + 4}" text-anchor="end">{value:.3f}</text>')
    drawn.append(f'<text x="{_MARGIN}" y="{floor + 18}">{escape(axis)} {first:,.0f}</text>')
    drawn.append(f'<text x="{_WIDTH - _MARGIN}" y="{floor + 18}" text-anchor="end">{last:,.0f}</text>')
    return _picture(_HEIGHT, title, drawn)


def ids_that_differ(equal: int, different: int) -> str:
    """One bar: texts whose token ids are equal, and those whose are not."""
    total = equal + different
    if not total:
        return ""
    wide = _WIDTH - 20
    good = wide * equal / total
    drawn = [
        f'<rect x="10" y="6" width="{good:.1f}" height="18" fill="#1a7f37"/>',
        f'<rect x="{10 + good:.1f}" y="6" width="{wide - good:.1f}" height="18" fill="#cf222e"/>',
        f'<text x="10" y="40">{equal} texts with equal ids</text>',
        f'<text x="{10 + wide}" y="40" text-anchor="end">{different} with others</text>',
    ]
    return _picture(46, "texts whose token ids are equal, and those that differ", drawn)


def standalone(picture: str) -> str:
    """A picture as a file of its own, with the look that a page gives it, on white."""
    style = "text { font: 11px sans-serif; fill: #57606a; } .axis { fill: none; stroke: #8c959f; }"
    opened = picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, end, drawn = opened.partition(">")
    return f'{head}{end}<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{drawn}\n'


def _picture(height: int, title: str, drawn: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )
