"""The front door's rules as nginx keeps them, for Compose and Kubernetes: written from the same settings.

The text is `docker/templates/front.conf.jinja`. Not kept by nginx: adapters by name, a request's `model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from forge.errors import RecipeError
from forge.serve import front_rules as rules
from forge.serve.runtime import ServerSettings
from forge.tools.containers import docker_files

IMAGE = "nginxinc/nginx-unprivileged:1.29.3-alpine"
# A request is held in memory until all of it is there.
_BODY_MEGABYTES = 16
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_LOCALHOST = r"~(?i)^https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?$"
# nginx's own failures: status -> the one that is shown, message, kind.
_FAILURES: Mapping[int, tuple[int, str, str]] = {
    400: (400, "this is no request", "invalid_request_error"),
    403: (403, "this is closed, or the name or the page is not one of this server", "permission_error"),
    404: (404, "there is no such route, or no such model", "not_found_error"),
    408: (408, "the request took too long to arrive", "invalid_request_error"),
    413: (413, f"at most {_BODY_MEGABYTES} MiB", "invalid_request_error"),
    414: (414, "the path is too long", "invalid_request_error"),
    415: (415, "send the request as application/json", "invalid_request_error"),
    494: (431, "the headers are too large", "invalid_request_error"),
    502: (502, "no server behind answers", "server_error"),
    503: (503, "too many at once, or every server behind still loads", "server_error"),
    504: (504, "the server behind took too long", "server_error"),
}


def rendered(template: str, **values: Any) -> str:
    """One of `docker/templates/`, filled in."""
    environment = Environment(
        loader=FileSystemLoader(docker_files() / "templates"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["parent"] = lambda path: str(Path(path).parent)
    return environment.get_template(f"{template}.jinja").render(**values)


def front_conf(
    settings: ServerSettings,
    *,
    upstream: str,
    resolver: str = "",
    names: tuple[str, ...] = (),
    listen: str = "8080",
    scratch: str = "/tmp",
    written_by: str = "written by forge serve --print",
) -> str:
    """nginx's whole configuration; `names` are more names of the server, as `server_name` takes them.

    Raises `RecipeError` for a name of a host that cannot be one.
    """
    return rendered(
        "front.conf",
        written_by=written_by,
        scratch=scratch,
        listen=listen,
        upstream=upstream,
        resolver=resolver,
        names=[*map(_server_name, settings.allow_hosts), *_own_name(settings), *names],
        origins=[_origin(origin) for origin in settings.cors_origins.split(",") if origin.strip()],
        control=settings.control_routes,
        model=settings.alias if _PLAIN.fullmatch(settings.alias) else "",
        failures=_FAILURES,
        health="|".join(sorted(rules.HEALTH)),
        read="|".join(sorted(rules.READ)),
        ask="|".join(sorted(rules.ASK | rules.COMPUTE)),
        controls="|".join(
            sorted({*rules.CONTROL["GET"], *rules.CONTROL["POST"], rules.CONTROL_SLOT.pattern})
        ),
        page=rules.PAGE.pattern,
        head_seconds=round(rules.HEAD_SECONDS),
        stalled_seconds=round(rules.STALLED_SECONDS),
        body_megabytes=_BODY_MEGABYTES,
    )


def _own_name(settings: ServerSettings) -> list[str]:
    """`--host`, where it is a name: addresses are let in anyway."""
    return [settings.host] if re.search("[A-Za-z]", settings.host) and ":" not in settings.host else []


def _server_name(name: str) -> str:
    if name == "*":
        return '"~."'
    if not _HOST.fullmatch(name):
        raise RecipeError(f"--allow-host {name}: not the name of a host")
    return name.lower()


def _origin(origin: str) -> str:
    origin = origin.strip().rstrip("/")
    if origin == "*":
        return "~."
    if origin == "localhost":
        return _LOCALHOST
    if not re.fullmatch(r"https?://[A-Za-z0-9.:_\[\]-]+", origin):
        raise RecipeError(
            f"--cors {origin}: not the origin of a web page", hint="such as https://chat.example"
        )
    return f"~(?i)^{re.escape(origin)}$"
