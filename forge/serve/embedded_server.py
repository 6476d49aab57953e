"""The child process of the embedded runtime: llama-server, inside this process, by xllamacpp.

Settings come as one JSON line on standard input. One line on standard output says that it listens; all
else that is printed goes to standard error.
"""

from __future__ import annotations

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
    parameters.model_alias = {settings["alias"]}
    # A file that only we reach: clients come through the front.
    parameters.hostnames = [settings["socket"]]
    parameters.n_parallel = settings["slots"]
    # llama-server divides the context among its slots.
    parameters.n_ctx = settings["context_tokens"] * settings["slots"]
    parameters.kv_unified = False
    parameters.cpuparams.n_threads = settings["threads"]
    parameters.cpuparams_batch.n_threads = settings["threads"]
    parameters.n_threads_http = settings["http_threads"]
    if settings["gpu_layers"] is not None:
        # -1 is all of them to us, as many as fit to llama.cpp; its "all" is -2.
        parameters.n_gpu_layers = -2 if settings["gpu_layers"] == -1 else settings["gpu_layers"]
    # Not `endpoint_props`: it lets clients change the server's settings; they can be read without.
    parameters.endpoint_metrics = parameters.endpoint_slots = True
    if settings["adapters"]:
        parameters.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in settings["adapters"]
        ]
        # Where requests choose, none is on until one asks for it.
        parameters.lora_init_without_apply = settings["switched"]
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
