"""The texts of a bundle: how to start it on each system, what it is, and under which licences.

The scripts are for Linux and use what every such system has (`sh`, and curl or wget).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from forge.chat.hand_over import MODELFILE, MODELFILE_JINJA
from forge.serve.runtime import ServerSettings

_START = """\
#!/bin/sh
# Serves {name} on this computer only. Another port: PORT=9000 ./start.sh
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

_README = """\
{name}: a chat model that runs on this computer, without network and without GPU.

Linux
  ./start.sh         serves it; nothing has to be installed. Then open http://127.0.0.1:8080 in a browser,
                     or ask as OpenAI's API is asked:
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d @smoke.json
  ./smoke.sh         checks every file against SHA256SUMS, then the running server's answer.

macOS and Windows, with one of these (forge does not test there)
{elsewhere}
./smoke.sh files checks the files on macOS too.

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
are separate files, unchanged, and may be replaced. linux/bin/python3 and its standard library are under the
licence of the Python Software Foundation; its packages bring theirs.
"""


def bundle_texts(settings: ServerSettings, modelfiles: Collection[str], *, loader: str) -> dict[str, str]:
    """File name -> text."""
    return {
        "smoke.sh": _SMOKE,
        "start.sh": _START.format(name=settings.alias, loader=loader, waiting=_WAITING),
        "README.txt": _README.format(
            name=settings.alias, elsewhere="\n".join(_elsewhere(settings, modelfiles))
        ),
    }


def _elsewhere(settings: ServerSettings, modelfiles: Collection[str]) -> Iterator[str]:
    """How the programs that people have open the model."""
    name, model = settings.alias, settings.model.name
    for file, versions in ((MODELFILE_JINJA, "0.30 and later"), (MODELFILE, "before that")):
        if file in modelfiles:
            yield f"  Ollama, {versions}: ollama create {name} -f {file}; ollama run {name}"
    lora = f" --lora {settings.adapter.name}" if settings.adapter else ""
    yield f"  llama.cpp's own release: llama-server -m {model} -c {settings.context_tokens}{lora}"
    if not settings.adapter:
        yield f"  LM Studio: lms import --user-repo forge/{name} {model}"


def licences(model: str) -> str:
    """Under which licences the model and the server are."""
    return f"The model: {model}\n\n{_MIT}{_SYSTEM}"
