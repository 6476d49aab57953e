"""What people do with a model after its ship: serve it, and what `--detach` left running."""

from __future__ import annotations

import os
import time
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from forge import report
from forge.errors import InterruptedByUserError, RecipeError, StageError
from forge.serve import detached, ready
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.serve.slots import slots_for
from forge.ship.serving import Wish, open_runtime, served_directory, settings


def serve(
    wish: Wish,
    *,
    on_ready: Callable[[Mapping[str, object]], None],
    show: bool = False,
    handed_over: str | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; `on_ready` hears of the endpoint once it answers.

    `show` opens the server's web page in a browser; `handed_over` are the settings, as JSON, of a
    server in the background, which `forge ps` shows.
    """
    # Once: the key may come out of a pipe, which gives it a single time.
    chosen = ServerSettings.from_json(handed_over) if handed_over else settings(wish)
    if wish.runtime == "embedded" and not chosen.parallel and not chosen.gpu_layers:
        # For many clients, where nobody says how many; forge knows the memory of a CPU only.
        chosen = replace(chosen, parallel=slots_for(chosen))
    if wish.runtime != "ollama":
        chosen = ready.with_threads(chosen)
    with ExitStack() as stack:
        tell = None
        if handed_over:
            tell = stack.enter_context(detached.announced(served_directory(), chosen.alias))
        endpoint = open_runtime(wish, chosen, stack)
        report.success(f"serving {endpoint.model} at {endpoint.url}/v1; Ctrl-C stops it")
        report.info(_in_words(wish, chosen, endpoint))
        if tell:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            tell(
                detached.Served(
                    chosen.alias, endpoint.url, endpoint.model, wish.runtime, os.getpid(),
                    endpoint.container, since,
                )
            )  # fmt: skip
        on_ready(_fields(endpoint, os.getpid()))
        if show:
            webbrowser.open(endpoint.url)
        try:
            while not (why := endpoint.why_gone()):
                time.sleep(1)
        except KeyboardInterrupt:
            raise InterruptedByUserError("stopped serving") from None
        raise StageError(why)


def _in_words(wish: Wish, chosen: ServerSettings, endpoint: Endpoint) -> str:
    """What is known of how it serves: requests at once, threads and device are Ollama's own affair."""
    words = [f"context {chosen.context_tokens} tokens"]
    if wish.runtime != "ollama":
        words += [f"{chosen.slots} requests at once", f"{chosen.threads} threads"]
        words += [f"on {endpoint.device}"]
    elif chosen.threads:
        words += [f"{chosen.threads} threads"]
    return ", ".join(words)


def _fields(endpoint: Endpoint, pid: int) -> dict[str, object]:
    fields = {"endpoint": endpoint.url, "model": endpoint.model, "pid": pid, "device": endpoint.device}
    return {**fields, "container": endpoint.container} if endpoint.container else fields


def show_manifest(kind: str, wish: Wish, *, model_url: str | None, replicas: int) -> None:
    """Print what starts the server elsewhere; nothing runs."""
    from forge.serve.manifests import manifest

    if wish.runtime == "ollama":
        raise RecipeError(
            "--print writes how llama.cpp's server is started, not Ollama", hint="leave --runtime out"
        )
    chosen = settings(replace(wish, runtime="container"))
    # A pod listens to its whole cluster, whatever the host is here.
    ready.check_settings(replace(chosen, host="0.0.0.0") if kind == "kubernetes" else chosen)
    report.output(manifest(kind, chosen, model_url=model_url, replicas=replicas).rstrip("\n"))


def ps() -> Mapping[str, object]:
    """`forge ps`."""
    servers = detached.running(served_directory())
    if servers:
        columns = ("name", "endpoint", "runtime", "pid", "since")
        report.table("", columns, [[getattr(served, name) for name in columns] for served in servers])
    else:
        report.info("nothing is being served in the background")
    return {"running": [asdict(served) for served in servers]}


def stop(name: str | None) -> Mapping[str, object]:
    """`forge stop`."""
    stopped: Sequence[detached.Served] = detached.stop_servers(served_directory(), name)
    for served in stopped:
        report.success(f"stopped {served.name} ({served.endpoint})")
    if not stopped:
        report.info("nothing was being served in the background")
    return {"stopped": [served.name for served in stopped]}
