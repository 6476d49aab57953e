"""The server that the wheel carries, as a program of its own: this Python, llama-server's library, the front.

The interpreter, its standard library, the packages that serving loads, and every shared library of them.
Nothing of it has to be installed, and the front door stands before it as before every server of forge.

Not covered: another processor or libc than this machine's kind; interpreters of macOS and Windows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from forge import process
from forge.errors import DataError
from forge.serve.runtime import ServerSettings
from forge.tools import xllamacpp
from forge.tools.native import libraries

# What of the standard library a server has no use for, and is large.
_LEFT_OUT = frozenset(
    {
        "test",
        "idlelib",
        "tkinter",
        "turtledemo",
        "lib2to3",
        "ensurepip",
        "pydoc_data",
        "site-packages",
        "lib-dynload",
    }
)
HOME = "linux"

# Loads all that serving loads, and says which files those are.
_LOADED = """
import json, sys
import encodings.idna, traceback, xllamacpp, starlette.responses
from pathlib import Path
from http.client import HTTPConnection
from forge.serve import embedded_server, front_server, options
from forge.serve.behind import Behind
from forge.serve.runtime import ServerSettings
settings = ServerSettings(Path("m"), "m", 512)
with front_server.bound(settings) as listener:
    with front_server.opened(listener, settings, Behind("http://127.0.0.1:9")) as port:
        asking = HTTPConnection("127.0.0.1", port)
        asking.request("GET", "/health")
        asking.getresponse().read()
files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
print(json.dumps({name: file for name, file in files.items() if file}))
"""

_SERVE = '''\
"""Serves {name} on this computer only; PORT=9000 is another port. No network is asked."""

import os
import secrets
import sys
import time
from pathlib import Path

from forge.serve import front_server
from forge.serve.embedded_server import start
from forge.serve.behind import Behind
from forge.serve.options import attributes, scales
from forge.serve.runtime import ServerSettings

here = Path(__file__).parent.parent
settings = ServerSettings(
    here / {model!r}, {name!r}, {context}, port=int(os.environ.get("PORT", "8080")), parallel=1,
    adapter={adapter},
)
key = secrets.token_urlsafe(32)
with front_server.bound(settings) as listener:
    # Only for the front, which has the key.
    behind = [("hostnames", ["127.0.0.1"]), ("port", 0), ("api_keys", [key])]
    server = start(
        {{
            "model": str(settings.model),
            "adapters": [
                (str(path), scale)
                for path, scale in zip(settings.loaded_adapters, scales(settings), strict=True)
            ],
            "attributes": [*attributes(settings), *behind],
        }}
    )
    with front_server.opened(listener, settings, Behind(server.listening_address, key=key)) as port:
        print(f"{name} answers at http://127.0.0.1:{{port}}; Ctrl-C stops it", file=sys.stderr, flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
'''


def files(settings: ServerSettings) -> tuple[dict[str, Path | str], str]:
    """Path in the bundle -> file or text, and the loader's name.

    Raises `MissingToolError` where the server cannot run here, `DataError` where Python is no Linux program.
    """
    xllamacpp.check_processor()
    finished = process.run([sys.executable, "-c", _LOADED])
    if finished.status:
        raise DataError(f"the server of the wheel does not load: {finished.output.strip()[-500:]}")
    loaded: Mapping[str, str] = json.loads(finished.output.splitlines()[-1])
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    python = Path(os.path.realpath(sys.executable))
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    inside = f"{HOME}/lib/{version}"
    files: dict[str, Path | str] = {f"{HOME}/bin/python3": python}
    files |= {f"{inside}/{path.relative_to(standard)}": path for path in _standard(standard)}
    needs = libraries(python)
    roots = {name.partition(".")[0]: Path(file) for name, file in loaded.items() if "." not in name}
    for name, file in roots.items():
        if not _is_in(file, standard) and file.name == "__init__.py":
            package = file.parent
            files |= {f"{inside}/{name}/{path.relative_to(package)}": path for path in package.rglob("*.py")}
        elif not _is_in(file, standard) and file.suffix == ".py":
            files[f"{inside}/{file.name}"] = file
    for name, file in ((name, Path(file)) for name, file in loaded.items()):
        if file.suffix == ".so":
            needs |= libraries(file)
            place = (
                "lib-dynload/"
                if "lib-dynload" in file.parts
                else "".join(f"{part}/" for part in name.split(".")[:-1])
            )
            files[f"{inside}/{place}{file.name}"] = file
    files |= _licences(inside, roots)
    loaders = [name for name in needs if name.startswith("ld-linux")]
    if len(loaders) != 1:
        raise DataError(f"{python} is no Linux program with shared libraries")
    files |= {f"{HOME}/lib/{name}": path.resolve() for name, path in needs.items()}
    adapter = f"here / {settings.adapter.name!r}" if settings.adapter else "None"
    files[f"{HOME}/serve.py"] = _SERVE.format(
        name=settings.alias, model=settings.model.name, context=settings.context_tokens, adapter=adapter
    )
    return files, loaders[0]


def _standard(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        first = path.relative_to(root).parts[0]
        if first not in _LEFT_OUT and not first.startswith("config-"):
            yield path


def _licences(inside: str, names: Mapping[str, Path]) -> dict[str, Path | str]:
    """The licences of the packages that travel, where their wheels have them."""
    licences: dict[str, Path | str] = {}
    distributions = importlib.metadata.packages_distributions()
    for distribution in sorted({package for name in names for package in distributions.get(name, ())}):
        for file in importlib.metadata.files(distribution) or ():
            if "licen" in file.name.lower() or file.name == "METADATA":
                path = Path(str(file.locate()))
                if ".dist-info" in str(file) and path.is_file():
                    licences[f"{inside}/{file}"] = path
    return licences


def _is_in(file: Path, standard: Path) -> bool:
    return file.resolve().is_relative_to(standard) and "site-packages" not in file.parts
