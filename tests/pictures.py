"""Pictures of what `forge plan` says of rows, from what it prints: `python -m tests.pictures` writes them.

Only the pre-flight of the data, which is the same on every machine. Five kinds of rows: the quickstart's,
Alpaca's, ShareGPT's, calls of a tool, and thinking; the last two with Qwen3's chat template, as trl has it.
"""

from __future__ import annotations

import html
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from forge import report
from forge.ship.drive import plan
from tests.conftest import copy_of_tiny

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "plan"
_WIDTH = 100

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CITIES = {"Oslo": "4 °C, snow", "Lima": "19 °C, fog", "Cairo": "31 °C, clear", "Perth": "24 °C, wind"}
_SUMS = {"17 + 25": 42, "9 * 8": 72, "100 - 37": 63, "12 * 12": 144}
_ALPACA = (
    ("Give the opposite of the word.", "hot", "cold"),
    ("Translate to German.", "The house is big.", "Das Haus ist groß."),
    ("Name three primary colours.", "", "Red, yellow and blue."),
    ("Sort the numbers.", "5, 2, 9", "2, 5, 9"),
)
_CHATS = (
    ("Hi!", "Hello. How can I help?", "What is a LoRA?", "A small change to a model, trained by itself."),
    ("Who are you?", "A support assistant.", "Are you open on Sunday?", "Yes, from ten to four."),
    ("Thanks.", "You are welcome.", "Bye.", "Goodbye."),
)


def _call(city: str, weather: str) -> Mapping[str, Any]:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return {
        "tools": [_WEATHER],
        "messages": [
            {"role": "user", "content": f"How is the weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": weather},
            {"role": "assistant", "content": f"In {city}: {weather}."},
        ],
    }


def _thought(question: str, answer: int) -> Mapping[str, Any]:
    thinking = f"I calculate {question}: that is {answer}."
    return {
        "messages": [
            {"role": "user", "content": f"What is {question}?"},
            {"role": "assistant", "reasoning_content": thinking, "content": f"{answer}"},
        ]
    }


def _shared(id: int, turns: Sequence[str]) -> Mapping[str, Any]:
    speakers = ("human", "gpt") * len(turns)
    conversation = [{"from": who, "value": words} for who, words in zip(speakers, turns, strict=False)]
    return {"id": f"chat_{id}", "conversations": conversation}


ROWS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "quickstart": (),
    "alpaca": [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in _ALPACA],
    "sharegpt": [_shared(number, turns) for number, turns in enumerate(_CHATS)],
    "tools": [_call(*pair) for pair in _CITIES.items()],
    "thinking": [_thought(*pair) for pair in _SUMS.items()],
}


class _Terminal(Console):
    """As wide as it is: what is longer goes on in the next line."""

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        super().print(*objects, **options)


class _Screen(report.RichSink):
    """What a terminal shows, up to the first table: the stages and the machine come behind it."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.console = _Terminal(
            file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor", width=_WIDTH,
            height=100, highlight=False, emoji=False, legacy_windows=False,
        )  # fmt: skip
        self._is_over = False

    def text(self, kind: str, text: str) -> None:
        if not self._is_over:
            super().text(kind, text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[report.Cell]]) -> None:
        self._is_over = True


@contextmanager
def _place() -> Iterator[Path]:
    """A directory to plan in, with a store of its own."""
    before = os.environ.get("FORGE_HOME")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FORGE_HOME"] = str(Path(scratch) / "store")
        try:
            yield Path(scratch)
        finally:
            if before is None:
                del os.environ["FORGE_HOME"]
            else:
                os.environ["FORGE_HOME"] = before


def _recipe(kind: str, directory: Path) -> Path:
    recipe = directory / f"{kind}.yaml"
    if kind == "quickstart":
        text = (ROOT / "templates" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    else:
        rows = directory / f"{kind}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]), encoding="utf-8")
        base = copy_of_tiny(directory / "base")
        if kind in ("tools", "thinking"):
            template = files("trl") / "chat_templates" / "qwen3.jinja"
            (base / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"))
        text = f"name: {kind}\nbase: base\ndata: {{source: {rows.name}, eval: 1}}\ntrain: {{batch_size: 2}}\n"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def picture(kind: str) -> str:
    """What `forge plan` shows of these rows, as SVG."""
    screen = _Screen()
    with _place() as directory:
        recipe = _recipe(kind, directory)
        report.configure(sink=screen)
        try:
            screen.text("detail", f"$ forge plan {recipe.name}")
            plan(recipe)
        finally:
            report.configure()
    return _small(screen.console.export_svg(title="", unique_id=kind, code_format=_FORMAT))


# rich's own, without a window around it and without a font from elsewhere.
_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect fill="#0d1117" width="{width}" height="{height}" rx="8"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def _small(svg: str) -> str:
    return re.sub(r"\n{2,}", "\n", svg)


def words(svg: str) -> list[str]:
    """The lines of text in a picture."""
    rows: dict[str, str] = {}
    for place, text in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        rows[place] = rows.get(place, "") + html.unescape(text)
    return [row.replace("\xa0", " ").rstrip() for row in rows.values()]


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for kind in ROWS:
        (PICTURES / f"{kind}.svg").write_text(picture(kind), encoding="utf-8")
