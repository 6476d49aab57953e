"""Real questions and answers that every machine has: what the standard library's docstrings say.

Read from the running Python's own modules (its licence: PSF), so that no text of others is committed. They
differ a little between versions of Python, which no figure of the tests hangs on.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
from pathlib import Path

SYSTEM = "Explain Python."
_MODULES = (
    "argparse", "base64", "bisect", "calendar", "collections", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "glob", "gzip",
    "hashlib", "heapq", "html", "inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "os",
    "os.path", "pathlib", "pickle", "queue", "random", "re", "shlex", "shutil", "socket", "sqlite3",
    "statistics", "string", "struct", "subprocess", "tempfile", "textwrap", "threading", "time", "tokenize",
    "types", "typing", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
_SHORTEST, _LONGEST = 30, 110


def docstrings() -> dict[str, str]:
    """The full name of a function or class, and the first paragraph of its docstring; each text once."""
    names: dict[str, str] = {}
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or not callable(thing):
                continue
            text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
            if _SHORTEST <= len(text) <= _LONGEST and text.endswith(".") and "->" not in text:
                names.setdefault(text, f"{module_name}.{name}")
    return {name: text for text, name in names.items()}


def write_docstring_rows(path: Path, count: int) -> Path:
    """`count` rows of system prompt, question and answer, drawn and ordered the same way every time."""
    drawn = random.Random(1).sample(sorted(docstrings().items()), count)
    rows = [
        {"system": SYSTEM, "prompt": f"What does `{name}` do?", "completion": text} for name, text in drawn
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
