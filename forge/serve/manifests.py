"""The server as others start it: a Compose file, or Kubernetes' Deployment and Service.

The texts are templates in `docker/templates/`, filled in from the same settings as `forge serve` uses: the
same image and flags, nobody's user, nothing that can be written, memory by the model's own header, and
nginx in front with the rules of forge's own front door. Where the model is, is said in one place: a
directory for Compose; for Kubernetes a volume claim that holds it, or a URL from which an init container
fetches it, checked by its sha256. The model's own adapter is mounted beside it, or lies on the same claim.

Not covered: an ingress, TLS, several machines' worth of one model. The key is a Secret that exists.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from forge import process
from forge.errors import RecipeError
from forge.files import sha256_of
from forge.model.gguf_header import read_whole_gguf
from forge.serve import front_nginx
from forge.serve.container import IMAGE, MOST_PROCESSES, PORT, uses_gpu
from forge.serve.options import server_arguments
from forge.serve.runtime import ServerSettings
from forge.serve.slots import memory_bytes
from forge.tools.containers import USER, current_name
from forge.tools.hosts import in_url

# Fetches the model; pinned as the server is.
FETCHER = "curlimages/curl:8.16.0"
_KEY = "/run/secrets/api-key/api-key"
# In a pod, where the front has the port.
_BEHIND = 8081
_FETCH = 'curl --fail --location --silent --show-error --output "$1" "$2" && echo "$3  $1" | sha256sum -c'


def manifest(kind: str, settings: ServerSettings, *, model_url: str | None = None, replicas: int = 1) -> str:
    """YAML for `docker compose` or `kubectl apply`.

    Raises `RecipeError` for what it cannot say: adapters to choose from, a URL for Compose, or one for a
    model that is two files, a GPU without a CUDA image.
    """
    if settings.adapters:
        raise RecipeError("--print cannot say --lora: adapters by name need forge's own front door")
    if kind == "compose":
        if model_url:
            raise RecipeError("--model-url goes with --print kubernetes", hint="Compose mounts the file")
        return _compose(settings, replicas)
    return _kubernetes(settings, model_url, replicas)


def _compose(settings: ServerSettings, replicas: int) -> str:
    if replicas > 1:
        raise RecipeError(
            "how many servers there are is said to Compose",
            hint="docker compose up --scale server=N; or --print kubernetes",
        )
    return front_nginx.rendered(
        "compose.yaml",
        **_shared(settings, ["--host", "0.0.0.0", "--port", str(PORT)]),
        files=[
            {"here": _literal(str(path.absolute())), "inside": _literal(_inside(path))}
            for path in _files(settings)
        ],
        processes=MOST_PROCESSES,
        published=f"{in_url(settings.host)}:{settings.port or PORT}:{PORT}",
        front=front_nginx.front_conf(
            settings, upstream=f"server:{PORT} resolve max_fails=1 fail_timeout=5s", resolver="127.0.0.11"
        ),
    )


def _kubernetes(settings: ServerSettings, model_url: str | None, replicas: int) -> str:
    name = _label(settings.alias)
    in_cluster = rf'"~^{name}(\.[a-z0-9-]+(\.svc(\.[a-z0-9.-]+)?)?)?$"'
    return front_nginx.rendered(
        "kubernetes.yaml",
        **_shared(settings, ["--host", "127.0.0.1", "--port", str(_BEHIND)]),
        model_url=model_url,
        fetcher=FETCHER,
        fetch=_fetch(settings, model_url) if model_url else [],
        replicas=replicas,
        cpus=settings.threads or 1,
        probe=["curl", "--fail", "--silent", f"http://127.0.0.1:{_BEHIND}/health"],
        port=PORT,
        service_port=settings.port or PORT,
        front=front_nginx.front_conf(settings, upstream=f"127.0.0.1:{_BEHIND}", names=(in_cluster,)),
    )


def _shared(settings: ServerSettings, address: list[str]) -> dict[str, object]:
    """What both texts say of the server."""
    return {
        "name": _label(settings.alias),
        "image": _literal(current_name(settings.image)) if settings.image else IMAGE,
        "flags": [*_flags(settings), *address],
        "key": bool(settings.api_key),
        "key_path": _KEY,
        "environment": process.waiting_policy({}),
        "user": USER,
        "mebibytes": _mebibytes(memory_bytes(settings, read_whole_gguf(settings.model))),
        "gpu": uses_gpu(settings),
        "front_image": front_nginx.IMAGE,
    }


def _flags(settings: ServerSettings) -> list[str]:
    model, *adapters = map(_inside, _files(settings))
    command = server_arguments(settings, model=model, adapters=tuple(adapters))
    command += ["--api-key-file", _KEY] if settings.api_key else []
    return [_literal(argument) for argument in command]


def _files(settings: ServerSettings) -> list[Path]:
    """The model, and its own adapter where it has one."""
    return [settings.model, *settings.loaded_adapters]


def _inside(path: Path) -> str:
    return f"/models/{path.name}"


def _literal(text: str) -> str:
    """`text` as Compose and Kubernetes leave it: they replace $NAME and $(NAME), and read $$ as a dollar."""
    return text.replace("$", "$$")


def _fetch(settings: ServerSettings, url: str) -> list[str]:
    if not url.startswith("https://"):
        raise RecipeError(f"--model-url {url}: not an https URL")
    if settings.adapter:
        raise RecipeError(
            f"--model-url fetches one file, and this model is two: {settings.model.name} and "
            f"{settings.adapter.name}",
            hint="leave it out and put both on the volume claim, or ship with export.mode: merged",
        )
    file = _literal(_inside(settings.model))
    return ["sh", "-c", _FETCH, "fetch", file, _literal(url), sha256_of(settings.model)]


def _label(name: str) -> str:
    """A name as DNS and Compose have it."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:50].strip("-") or "model"


def _mebibytes(count: int) -> int:
    return math.ceil(count / (1 << 20))
