"""What a native program needs to run elsewhere: the shared libraries that the loader finds for it here.

Linux only. Not covered: libraries that a program opens by name while it runs.
"""

from __future__ import annotations

import re
from pathlib import Path

from forge import process
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
