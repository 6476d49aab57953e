"""The texts of a bundle: how to start it on each system, what it is, and under which licences.

The scripts use what every such system has (`sh`, and curl or wget); those for macOS and Windows need
Python 3.10 or later, and were not run where forge is tested.
"""

from __future__ import annotations

import shlex

from forge.serve.options import arguments, attributes
from forge.serve.runtime import ServerSettings

_START = """\
#!/bin/sh
# Serves {name} on this computer alone. Another port: PORT=9000 ./start.sh; more: ./start.sh --help
set -eu
here=$(cd "$(dirname "$0")" && pwd)
{waiting}
exec "$here/linux/lib/{loader}" --library-path "$here/linux/lib" "$here/linux/llama-server" \\
    {flags} --host 127.0.0.1 --port "${{PORT:-8080}}" "$@"
"""

_START_PYTHON = """\
#!/bin/sh
# Serves {name} on this computer alone. Another port: PORT=9000 ./start.sh
set -eu
here=$(cd "$(dirname "$0")" && pwd)
{waiting}
PYTHONHOME="$here/linux" exec "$here/linux/lib/{loader}" --library-path "$here/linux/lib" \\
    "$here/linux/bin/python3" -S -B -P "$here/linux/serve.py"
"""

# As `process.waiting_policy`: threads that share a core must not turn.
_WAITING = '[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"'

_SMOKE = """\
#!/bin/sh
# Checks the files, then asks the server that start.sh has started; `./smoke.sh files` only the first.
set -eu
cd "$(dirname "$0")"
if command -v sha256sum >/dev/null; then
    sha256sum -c SHA256SUMS >/dev/null
else  # macOS
    shasum -a 256 -c SHA256SUMS >/dev/null
fi
echo "files: as they were packed"
[ "${1:-}" = files ] && exit 0
url="http://127.0.0.1:${PORT:-8080}"
json="Content-Type: application/json"
if command -v curl >/dev/null; then
    get() { curl -fsS "$1"; }
    post() { curl -fsS -H "$json" -d @smoke.json "$1"; }
else
    get() { wget -qO- "$1"; }
    post() { wget -qO- --header "$json" --post-data "$(cat smoke.json)" "$1"; }
fi
tries=0
until get "$url/health" >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || { echo "nothing answers at $url: is start.sh running?" >&2; exit 1; }
    sleep 1
done
answer=$(post "$url/v1/chat/completions")
echo "$answer"
expect=$(cat smoke.expect)
case "$answer" in
*'"content":""'*) echo "the answer is empty" >&2; exit 1 ;;
*'"content":"'*"$expect"*) echo "smoke test: passed" ;;
*) echo "smoke test: the answer is not the expected one" >&2; exit 1 ;;
esac
"""

_SERVE = '''\
"""Serves {name} on this computer alone, with llama-server from the wheel beside; no network is asked."""
import os
import time
from pathlib import Path

import xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = str(Path(__file__).parent / "{model}")
{lora}settings.hostnames = ["127.0.0.1"]
settings.port = int(os.environ.get("PORT", "8080"))
{attributes}
server = xllamacpp.Server(settings)
print(f"{name} answers at {{server.listening_address}}; Ctrl-C stops it", flush=True)
while True:
    time.sleep(3600)
'''

_COMMAND = """\
#!/bin/sh
# macOS (not run where forge is tested): needs Python 3.10 or later.
set -eu
cd "$(dirname "$0")"
[ -d .venv ] || { python3 -m venv .venv && .venv/bin/pip install --no-index --find-links wheels xllamacpp; }
exec .venv/bin/python serve.py
"""

_BATCH = """\
@echo off
rem Windows (not run where forge is tested): needs Python 3.10 or later.
cd /d "%~dp0"
if not exist .venv py -3 -m venv .venv
.venv\\Scripts\\pip install --quiet --no-index --find-links wheels xllamacpp
.venv\\Scripts\\python serve.py
"""

_README = """\
{name}: a chat model that runs on this computer, without network and without GPU.

{ways}
Then open http://127.0.0.1:8080 in a browser, or ask as OpenAI's API is asked:
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d @smoke.json

On Linux and macOS smoke.sh checks every file against SHA256SUMS, then the running server's answer.
With Ollama: ollama create {name} -f Modelfile (where there is one).
LICENCES.txt says what may be done with the model and with the server.
"""

_MIT = """\
The server is llama.cpp, Copyright (c) 2023-2026 The ggml authors, under the MIT licence:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_SYSTEM = """
The libraries in linux/lib are those of the system that packed this: the GNU C library (LGPL 2.1),
GCC's run-time libraries (GPL 3 with the run-time exception) and what else the server asks for. They
are separate files, unchanged, and may be replaced.
"""


_LORA_OF_WHEEL = """\
adapter = str(Path(__file__).parent / "{adapter}")
settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
"""


def texts(settings: ServerSettings, *, loader: str, server: str, wheels: bool) -> dict[str, str]:
    """File name -> text. `loader` is empty without a server for Linux: `llama-server`, or this Python."""
    files: dict[str, str] = {"smoke.sh": _SMOKE}
    ways = ""
    if loader:
        start = _START if server == "llama-server" else _START_PYTHON
        files["start.sh"] = start.format(
            name=settings.alias, loader=loader, flags=_flags(settings), waiting=_WAITING
        )
        ways += "Linux:    ./start.sh\n"
    if wheels:
        lora = _LORA_OF_WHEEL.format(adapter=settings.adapter.name) if settings.adapter else ""
        files["serve.py"] = _SERVE.format(
            name=settings.alias, model=settings.model.name, lora=lora, attributes=_attributes(settings)
        )
        files |= {"start.command": _COMMAND, "start.bat": _BATCH.replace("\n", "\r\n")}
        ways += "macOS:    ./start.command   (Python 3.10 or later)\n"
        ways += "Windows:  start.bat         (Python 3.10 or later)\n"
    else:
        ways += "macOS, Windows: open the GGUF in Ollama (below), LM Studio, or llama.cpp's own release:\n"
        ways += f"  llama-server -m {settings.model.name} -c {settings.context_tokens}"
        ways += f" --lora {settings.adapter.name}\n" if settings.adapter else "\n"
    files["README.txt"] = _README.format(name=settings.alias, ways=ways)
    return files


def _flags(settings: ServerSettings) -> str:
    """llama-server's flags in a shell script that knows where it is."""
    adapters = ["$here/" + settings.adapter.name] if settings.adapter else []
    flags = arguments(settings, model="$here/" + settings.model.name, adapters=adapters)
    return " ".join(f'"{flag}"' if flag.startswith("$here/") else shlex.quote(flag) for flag in flags)


def _attributes(settings: ServerSettings) -> str:
    lines = []
    for name, value in attributes(settings):
        shown = f"set({value!r})" if name == "model_alias" else repr(value)
        lines.append(f"settings.{name} = {shown}")
    return "\n".join(lines)


def licences(model: str, *, loader: str) -> str:
    """Under which licences the model and the server are."""
    return f"The model: {model}\n\n{_MIT}{_SYSTEM if loader else ''}"
