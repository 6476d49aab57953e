"""The server as others start it: a Compose file, or Kubernetes' Deployment and Service.

They are data for their tools, written from the same settings as `forge serve` uses: the same image
and flags, nobody's user, nothing that can be written, and memory by the model's own header. Where
the model is, is said in one place: a directory for Compose; for Kubernetes a volume claim that
holds it, or a URL from which an init container fetches it, checked by its sha256. The model's own
adapter is mounted beside it, or lies on the same claim.

Not covered: an ingress, TLS, several machines' worth of one model. The key is a Secret that exists.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge.errors import RecipeError
from forge.model.estimate import SERVER_START_BYTES
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.serve.container import IMAGE, PORT, uses_gpu
from forge.serve.options import arguments
from forge.serve.runtime import ServerSettings
from forge.serve.slots import cache_bytes_per_token
from forge.tools.containers import USER, current_name
from forge.tools.hosts import in_url

KINDS = ("compose", "kubernetes")
# Fetches the model; pinned as the server is.
FETCHER = "curlimages/curl:8.16.0"
_KEY = "/run/secrets/api-key/api-key"


def manifest(kind: str, settings: ServerSettings, *, model_url: str | None = None, replicas: int = 1) -> str:
    """YAML for `docker compose` or `kubectl apply`.

    Raises `RecipeError` for what it cannot say: adapters to choose from, a URL for Compose, or one for a
    model that is two files, a GPU without a CUDA image.
    """
    if settings.adapters:
        raise RecipeError("--print cannot say --lora: adapters by name need forge's own proxy")
    if kind == "compose":
        if model_url:
            raise RecipeError("--model-url goes with --print kubernetes", hint="Compose mounts the file")
        return _yaml([_compose(settings, replicas)])
    return _yaml([_deployment(settings, model_url, replicas), _service(settings)])


def memory_bytes(settings: ServerSettings, header: GgufHeader) -> int:
    """What the server needs: the file, the key-value cache of all slots, and itself."""
    cache = cache_bytes_per_token(header) * settings.context_tokens * settings.slots
    return settings.file_bytes + cache + SERVER_START_BYTES


def _flags(settings: ServerSettings) -> list[str]:
    model, *adapters = map(_inside, _files(settings))
    command = arguments(settings, model=model, adapters=tuple(adapters))
    command += ["--api-key-file", _KEY] if settings.api_key else []
    return [_literal(one) for one in command]


def _files(settings: ServerSettings) -> list[Path]:
    """The model, and its own adapter where it has one."""
    return [settings.model, *settings.loaded_adapters]


def _inside(path: Path) -> str:
    return f"/models/{path.name}"


def _literal(text: str) -> str:
    """`text` as Compose and Kubernetes leave it: they replace $NAME and $(NAME), and read $$ as a dollar."""
    return text.replace("$", "$$")


def _image(settings: ServerSettings) -> str:
    return current_name(settings.image) if settings.image else IMAGE


def _compose(settings: ServerSettings, replicas: int) -> dict[str, Any]:
    mounts = [
        {
            "type": "bind",
            "source": _literal(str(path.absolute())),
            "target": _literal(_inside(path)),
            "read_only": True,
        }
        for path in _files(settings)
    ]
    if settings.api_key:
        key = "${API_KEY_FILE:?a file with the key}"
        mounts.append({"type": "bind", "source": key, "target": _KEY, "read_only": True})
    if replicas > 1:
        raise RecipeError(
            "one port of this machine cannot be that of several servers",
            hint="docker/compose.replicas.yaml puts them behind one; or --print kubernetes",
        )
    limit = memory_bytes(settings, read_gguf(settings.model))
    server: dict[str, Any] = {
        "image": _literal(_image(settings)),
        "command": _flags(settings),
        "ports": [f"{in_url(settings.host)}:{settings.port or PORT}:{PORT}"],
        "volumes": mounts,
        "user": f"{USER}:{USER}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "mem_limit": f"{_mebibytes(limit)}m",
        "restart": "unless-stopped",
        "stop_grace_period": "20s",
    }
    if uses_gpu(settings):
        device = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        server["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return {"name": _label(settings.alias), "services": {"server": server}}


def _deployment(settings: ServerSettings, model_url: str | None, replicas: int) -> dict[str, Any]:
    name = _label(settings.alias)
    volumes: list[dict[str, Any]] = [
        {"name": "models", "emptyDir": {}}
        if model_url
        else {"name": "models", "persistentVolumeClaim": {"claimName": f"{name}-model", "readOnly": True}}
    ]
    if settings.api_key:
        volumes.append({"name": "api-key", "secret": {"secretName": f"{name}-api-key"}})
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [_fetcher(settings, model_url)] if model_url else [],
        "containers": [_server(settings)],
        "volumes": volumes,
    }  # fmt: skip
    labels = {"app.kubernetes.io/name": name}
    spec = {
        "replicas": replicas,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def _server(settings: ServerSettings) -> dict[str, Any]:
    mounts = [{"name": "models", "mountPath": "/models", "readOnly": True}]
    if settings.api_key:
        mounts.append({"name": "api-key", "mountPath": str(Path(_KEY).parent), "readOnly": True})
    health = {"httpGet": {"path": "/health", "port": "http"}}
    needed = f"{_mebibytes(memory_bytes(settings, read_gguf(settings.model)))}Mi"
    gpu = {"nvidia.com/gpu": "1"} if uses_gpu(settings) else {}
    return {
        "name": "server",
        "image": _image(settings),
        "args": _flags(settings),
        "ports": [{"name": "http", "containerPort": PORT}],
        # 503 while it loads: ten minutes, then it is ready or started anew.
        "startupProbe": {**health, "periodSeconds": 5, "failureThreshold": 120},
        "readinessProbe": {**health, "periodSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 10},
        "resources": {
            "requests": {"cpu": str(settings.threads or 1), "memory": needed},
            "limits": {"memory": needed, **gpu},
        },
        "securityContext": _HARMLESS,
        "volumeMounts": mounts,
    }


_HARMLESS: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _fetcher(settings: ServerSettings, url: str) -> dict[str, Any]:
    if not url.startswith("https://"):
        raise RecipeError(f"--model-url {url}: not an https URL")
    if settings.adapter:
        raise RecipeError(
            f"--model-url fetches one file, and this model is two: {settings.model.name} and "
            f"{settings.adapter.name}",
            hint="leave it out and put both on the volume claim, or ship with export.mode: merged",
        )
    file = _inside(settings.model)
    script = 'curl --fail --location --silent --show-error --output "$1" "$2" && echo "$3  $1" | sha256sum -c'
    return {
        "name": "model",
        "image": FETCHER,
        "command": ["sh", "-c", script, "fetch", _literal(file), _literal(url), _digest(settings.model)],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": _HARMLESS,
        "volumeMounts": [{"name": "models", "mountPath": "/models"}],
    }


def _service(settings: ServerSettings) -> dict[str, Any]:
    name = _label(settings.alias)
    labels = {"app.kubernetes.io/name": name}
    ports = [{"name": "http", "port": settings.port or PORT, "targetPort": "http"}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": ports},
    }


def _label(name: str) -> str:
    """A name as DNS and Compose have it."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:50].strip("-") or "model"


def _mebibytes(count: int) -> int:
    return math.ceil(count / (1 << 20))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    yaml.representer.ignore_aliases = lambda data: True
    text = io.StringIO()
    yaml.dump_all(documents, text)
    return text.getvalue()
