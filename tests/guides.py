"""The guides of docs/guides as scripts: their blocks in order, to be run as they stand.

A titled block of json, yaml or python is a file that the reader writes. A block of sh or console is run;
the lines of a console block that are no command must come out of it, in this order. A title says what is
another: `exit 5`, or `not run: REASON`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.process import Child

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
_FENCE = re.compile(r"```(\w*)(?: title=\"([^\"]*)\")?")
_MARK = "-- block of line "


class WrongGuideError(AssertionError):
    """A guide that does not do what it says; the message has its line."""


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    line: int
    text: str

    @property
    def reason(self) -> str:
        """Why it is not run; empty for one that is."""
        return self.title.removeprefix("not run: ") if self.title.startswith("not run: ") else ""

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "console") and not self.reason

    @property
    def code(self) -> int:
        """The exit code that its last command has."""
        return int(self.title.removeprefix("exit ")) if self.title.startswith("exit ") else 0

    @property
    def commands(self) -> str:
        if self.language == "sh":
            return self.text
        return "".join(
            line.removeprefix("$ ") for line in self.text.splitlines(True) if line.startswith("$ ")
        )

    @property
    def shown(self) -> list[str]:
        """What a console block says that comes out."""
        lines = self.text.splitlines() if self.language == "console" else []
        return [_plain(line) for line in lines if line.strip() and not line.startswith("$ ")]


def _plain(text: str) -> str:
    return " ".join(text.split())


def blocks(path: Path) -> list[Block]:
    """Every fenced block; raises `WrongGuideError` for one of which it is not said what it is."""
    made = list(_blocks(path))
    for block in made:
        is_file = block.language in ("json", "yaml", "python") and "." in block.title
        known = not block.title or block.reason or re.fullmatch(r"exit \d+", block.title)
        if not is_file and not (block.language in ("sh", "console") and known):
            raise WrongGuideError(
                f"{path.name}:{block.line}: a block that is neither commands nor a file with its name"
            )
    return made


def _blocks(path: Path) -> Iterator[Block]:
    fence: re.Match[str] | None = None
    begun, lines = 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(True), 1):
        if fence is None and line.startswith("```"):
            fence, begun, lines = _FENCE.fullmatch(line.strip()), number, []
            if fence is None:
                raise WrongGuideError(f"{path.name}:{number}: {line.strip()}")
        elif fence and line.strip() == "```":
            yield Block(fence[1], fence[2] or "", begun, "".join(lines))
            fence = None
        else:
            lines.append(line)
    if fence:
        raise WrongGuideError(f"{path.name}:{begun}: a block that does not end")


def script(made: list[Block]) -> str:
    """All of it for one bash, so that its variables stay."""
    parts = ["set -eu -o pipefail\n"]
    for block in made:
        if block.is_run:
            # On a line of its own: what came before may not have ended its line.
            parts.append(f"printf '\\n%s\\n' {shlex.quote(f'{_MARK}{block.line}')}\n")
            parts.append(
                f"set +e\n{block.commands}code=$?\nset -e\ntest $code -eq {block.code}\n"
                if block.code
                else block.commands
            )
        elif not block.reason:
            parts.append(f"cat >{shlex.quote(block.title)} <<'END OF FILE'\n{block.text}END OF FILE\n")
    return "".join(parts)


def run_guide(path: Path, directory: Path, environment: Mapping[str, str], *, port: int) -> str:
    """Run a guide in `directory`, its port 8080 replaced by a free one; returns all that came out.

    Raises `WrongGuideError` with the block that failed, or did not say what the guide shows.
    """
    made = blocks(path)
    where = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", **environment}
    (directory / "guide.sh").write_text(script(made).replace("8080", str(port)), encoding="utf-8")
    with Child(["bash", "guide.sh"], directory=directory, environment=where) as child:
        said = list(child.lines())
        code = child.wait()
    outputs: dict[int, list[str]] = {}
    for line in said:
        if line.startswith(_MARK):
            outputs[int(line.removeprefix(_MARK))] = []
        elif outputs:
            outputs[max(outputs)].append(line.rstrip())
    whole = "\n".join(line.rstrip() for line in said)
    if code:
        raise WrongGuideError(f"{path.name}:{max(outputs, default=0)}: ended with {code}:\n{whole}")
    for block in made:
        _compare(path, block, outputs.get(block.line, []))
    return whole


def _compare(path: Path, block: Block, output: list[str]) -> None:
    rest = [_plain(line) for line in output]
    for line in block.shown if block.is_run else ():
        place = next((number for number, said in enumerate(rest) if line in said), None)
        if place is None:
            raise WrongGuideError(
                f"{path.name}:{block.line}: {line!r} did not come out of it:\n" + "\n".join(output)
            )
        rest = rest[place + 1 :]
