"""The child process of the embedded runtime: llama-server, inside this process, by xllamacpp.

Settings come as one JSON line on standard input. One line on standard output says that it listens; all
else that is printed goes to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from forge import process


def start(settings: Mapping[str, Any]) -> Any:
    """Load the model and listen; the server runs in threads of its own for as long as it is referred to.

    Raises RuntimeError when it could not; why, llama.cpp has then printed.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings["model"]
    for name, value in settings["attributes"]:
        *path, last = name.split(".")
        # Not `endpoint_props`: it lets clients change the server's settings; they can be read without.
        owner = functools.reduce(getattr, path, parameters)
        setattr(owner, last, set(value) if last == "model_alias" else value)
    loras = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in settings["adapters"]]
    if loras:
        parameters.lora_adapters = loras
    return xllamacpp.Server(parameters)


def main() -> None:
    """Serve until the parent ends us, or ends."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    process.exit_with_parent(sys.stdin)
    try:
        server = start(settings)
    except RuntimeError as error:
        sys.exit(str(error))
    protocol.write(f"{server.listening_address}\n")
    protocol.flush()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
