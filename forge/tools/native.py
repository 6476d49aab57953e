"""What a native program needs to run elsewhere: the shared libraries that the loader finds for it here.

Linux only. Of the libraries that a program opens by name while it runs: ggml's backends, no others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from forge import process, report
from forge.errors import DataError

# `libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)`, or the loader: `/lib64/ld-linux... (0x...)`.
_LINE = re.compile(r"^\s*(?:(\S+) => )?(/\S+|not found)(?: \(0x[0-9a-f]+\))?$")


def libraries(program: Path) -> dict[str, Path]:
    """The name under which each library is asked for, and its file; the loader among them.

    A static program has none. Raises `DataError` for one of another machine or with a library missing.
    """
    listed = process.run(["ldd", str(program)])
    if "not a dynamic executable" in listed.output or "statically linked" in listed.output:
        return {}
    if listed.status != 0:
        raise DataError(f"{program} is no program of this machine: {listed.output.strip()}")
    libraries: dict[str, Path] = {}
    for line in listed.output.splitlines():
        if match := _LINE.match(line):
            if match[2] == "not found":
                raise DataError(f"{program} needs {match[1]}, which is not here")
            libraries[match[1] or Path(match[2]).name] = Path(match[2])
    return libraries


def backends(program: Path, needs: Mapping[str, Path]) -> dict[str, Path]:
    """ggml's backends that `program` opens by name, with the libraries that they need besides `needs`.

    They lie beside the program, or beside ggml's own libraries: one for each kind of processor, and of
    device. One that cannot be opened here, whose driver is missing say, is left out with a warning.
    """
    brought: dict[str, Path] = {}
    places = {program.parent, *(path.parent for name, path in needs.items() if name.startswith("libggml"))}
    # Distributions keep them in a directory of ggml's own.
    patterns = ("libggml-*.so", "ggml/*/libggml-*.so")
    for path in sorted(path for place in places for pattern in patterns for path in place.glob(pattern)):
        if any(name.startswith(path.name) for name in needs):
            continue  # the link that a linker follows to one that is linked to
        try:
            brought |= {**libraries(path), path.name: path}
        except DataError as missing:
            report.warning(f"left out of what {program.name} brings along: {missing.message}")
    return {name: path for name, path in brought.items() if name not in needs}
