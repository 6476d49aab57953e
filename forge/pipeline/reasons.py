"""Why a stage has to be made: what of its request differs from the last time, in words.

Not covered: which line of the recipe it was; the dotted field says that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from forge.store.artifacts import Request

_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")
_LONGEST = 48

FIRST_TIME = "first time"


def changes(request: Request, previous: Request | None) -> list[str]:
    """What differs from the `previous` request, one reason each; "first time" without one.

    Inputs are compared as far as `request` knows them.
    """
    if previous is None:
        return [FIRST_TIME]
    reasons = []
    if request["version"] != previous.get("version"):
        reasons.append(f"stage version {short(previous.get('version'))} → {short(request['version'])}")
    before, now = _part(previous, "params"), _part(request, "params")
    reasons += [f"`{name}`: {words}" for name, words in differences(before, now)]
    before, now = _part(previous, "tools"), _part(request, "tools")
    reasons += [f"{name}: {words}" for name, words in differences(before, now)]
    before = _part(previous, "inputs")
    for name, digest in _part(request, "inputs").items():
        if name not in before:
            reasons.append(f"now made from {name}")
        elif before[name] != digest:
            reasons.append(f"input from {name} changed")
    return reasons


def other_versions(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """With which other versions a result was made that is used all the same."""
    differing = [
        f"{name} {recorded.get(name, 'unknown')} (now {version})"
        for name, version in sorted(now.items())
        if recorded.get(name) != version
    ]
    return [f"made with {', '.join(differing)}"] if differing else []


def _part(request: Request, name: str) -> Mapping[str, Any]:
    part = request.get(name)
    return part if isinstance(part, Mapping) else {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What differs between two mappings of JSON values: each name, and its two values in words."""
    names = [*now, *(name for name in before if name not in now)]
    return [(name, _words(before, now, name)) for name in names if _text(before, name) != _text(now, name)]


def _text(values: Mapping[str, Any], name: str) -> str | None:
    # As JSON: what was read back has lists for tuples; and 1, 1.0 and true are different requests.
    return json.dumps(values[name], sort_keys=True) if name in values else None


def _words(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    pair = [before.get(name), now.get(name)]
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in pair):
        return "its content changed"
    first, second = (short(values[name]) if name in values else "not set" for values in (before, now))
    return f"{first} → {second}" if first != second else "changed"


def short(value: object) -> str:
    """A value in few characters: 0.0002 is 2e-4, a digest its first eight digits."""
    if isinstance(value, float):
        plain, scientific = repr(value), _scientific(value)
        return scientific if len(scientific) < len(plain) else plain
    if isinstance(value, str):
        if _DIGEST.fullmatch(value):
            return value.removeprefix("sha256:")[:8]
        text = value if value and value == value.strip() and "\n" not in value else json.dumps(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _scientific(value: float) -> str:
    """The same number as mantissa and exponent: 1.5e-5."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    if not isinstance(exponent, int):
        return repr(value)
    mantissa = "".join(map(str, digits))
    point = f"{mantissa[0]}.{mantissa[1:]}" if len(mantissa) > 1 else mantissa
    return f"{'-' if sign else ''}{point}e{exponent + len(mantissa) - 1}"
