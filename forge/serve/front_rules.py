"""Who may ask a server that forge started, and for what: the rules of the front door, without a socket.

They stand in one place for every runtime: key, Host and Origin, which routes of llama-server are
there, and what a request's body may hold. `front` applies them to connections, and
`front_nginx` writes those of them that nginx can keep for Compose and Kubernetes.

Not covered: users, quotas, TLS.
"""

from __future__ import annotations

import hmac
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from forge.serve.front_asks import not_done
from forge.serve.front_limits import too_much_of
from forge.serve.runtime import ServerSettings
from forge.tools.hosts import is_loopback

MOST_BODY_BYTES = 16 << 20
MOST_HEAD_BYTES = 32 << 10
# From the first byte of a request to the end of its head, and of its body.
HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
# A client that takes nothing of its answer for so long is given up.
STALLED_SECONDS = 60.0

HEALTH = frozenset({"/health", "/v1/health"})
MODELS = frozenset({"/v1/models", "/models"})
# What reads: the server's name, its context and template, its counters.
READ = MODELS | {"/props", "/metrics", "/lora-adapters"}
# What asks the model: the body's `model` chooses.
ASK = frozenset(
    {
        "/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion",
        "/infill", "/v1/responses", "/responses", "/v1/messages", "/v1/embeddings", "/embeddings",
        "/embedding",
    }
)  # fmt: skip
# Of these, those whose answer llama-server takes from what is loaded: it reads no adapters from the body.
_OF_FIRST_MODEL = frozenset({"/v1/messages", "/v1/embeddings", "/embeddings", "/embedding"})
# What computes without the model's answer.
COMPUTE = frozenset(
    {
        "/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens",
        "/v1/chat/completions/input_tokens", "/chat/completions/input_tokens",
        "/v1/responses/input_tokens", "/responses/input_tokens",
    }
)  # fmt: skip
# What changes the server for everybody, or shows what others ask: closed unless asked for.
CONTROL = {"GET": frozenset({"/slots"}), "POST": frozenset({"/props", "/lora-adapters"})}
CONTROL_SLOT = re.compile(r"/slots/\d+")
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{0,5})?")
# The web page, and what it is made of.
PAGE = re.compile(
    r"/(_app/[A-Za-z0-9_][A-Za-z0-9._/-]*|[A-Za-z0-9-]+\.(png|svg|ico|html|js|css|webmanifest))?"
)


class RefusedRequestError(Exception):
    """What a client is answered instead, in OpenAI's shape."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind


def error_body(status: int, message: str, kind: str) -> dict[str, object]:
    """OpenAI's shape of an error."""
    return {"error": {"code": status, "message": message, "type": kind, "param": None}}


@dataclass(frozen=True)
class Rules:
    """What one server lets in.

    `models` are the names that a request may ask for, with the number of the adapter that each means (None:
    none of them); the first is the model's own. `control` opens the routes of llama-server that change or
    inspect it. `context_tokens` are those of a request.
    """

    models: Mapping[str, int | None]
    api_key: str | None
    hosts: frozenset[str]
    origins: tuple[str, ...]
    control: bool
    context_tokens: int

    @classmethod
    def of(cls, settings: ServerSettings) -> Rules:
        """The rules of a server with these settings."""
        own = None if settings.adapter is None else 0
        numbered = enumerate(settings.adapters, start=0 if own is None else 1)
        return cls(
            models={settings.alias: own, **{name: number for number, name in numbered}},
            api_key=settings.api_key,
            hosts=frozenset(name.lower() for name in (settings.host, *settings.allow_hosts)),
            origins=tuple(url.strip().rstrip("/").lower() for url in settings.cors_origins.split(",") if url),
            control=settings.control_routes,
            context_tokens=settings.context_tokens,
        )

    def check_host(self, host: str, address: str) -> None:
        """Refuse a Host that is not this server's name: a page whose name was rebound to our address.

        `address` is the one that the client has connected to: who listens everywhere is asked by any.
        """
        parts = _HOST.fullmatch(host)
        name = parts["name"].strip("[]").rstrip(".").lower() if parts else ""
        if "*" in self.hosts or is_loopback(name) or (name and name in (*self.hosts, address)):
            return
        raise _forbidden(f"this server does not go by the name {host!r}; start it with --allow-host for that")

    def check_origin(self, origin: str | None, host: str) -> bool:
        """Refuse a web page of another site; True where its browser needs to hear that it may ask."""
        if origin is None:
            return False
        if self._allows(origin.lower()):
            return True
        try:
            same = urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            same = False
        if not same:
            raise _forbidden(f"web pages of {origin} may not ask; start the server with --cors to let them")
        return False

    def _allows(self, origin: str) -> bool:
        if "*" in self.origins or origin in self.origins:
            return True
        try:
            return "localhost" in self.origins and is_loopback(urlsplit(origin).hostname or "")
        except ValueError:
            return False

    def check_route(self, method: str, path: str) -> None:
        """Refuse what is no route of this server.

        The path is compared as it was sent: no escape and no `..` finds a route here that is another one
        for the server behind.
        """
        method = "GET" if method == "HEAD" else method
        controls = path in CONTROL.get(method, ()) or (method == "POST" and CONTROL_SLOT.fullmatch(path))
        if controls and not self.control:
            raise _forbidden(f"{method} {path} is closed; start the server with --control-routes to open it")
        posts = path in ASK or path in COMPUTE
        gets = path in HEALTH or path in READ or self.model_in(path) is not None or _is_of_page(path)
        if (method == "GET" and gets) or (method == "POST" and posts) or controls:
            return
        if posts or gets:
            raise RefusedRequestError(405, f"{method} is no method of {path}")
        raise RefusedRequestError(404, f"there is no route {path}", "not_found_error")

    def is_public(self, method: str, path: str) -> bool:
        """Whether who has no key is answered: the health check, and the page, which asks for the key."""
        return path in HEALTH or (method in ("GET", "HEAD") and _is_of_page(path))

    def check_key(self, authorization: str | None, x_api_key: str | None) -> None:
        """Refuse who has not the key; OpenAI's clients send it in one header, Anthropic's in another."""
        if self.api_key is None:
            return
        key = self.api_key.encode()
        sent = (_key_in(authorization), _key_in(x_api_key))
        if not any(hmac.compare_digest(candidate.encode("latin-1"), key) for candidate in sent):
            raise RefusedRequestError(401, "Invalid API Key", "authentication_error")

    def model_in(self, path: str) -> str | None:
        """The name in the path of a single model, as it was sent."""
        for route in MODELS:
            if path.startswith(f"{route}/"):
                return path.removeprefix(f"{route}/") or None
        return None

    def fields(self, path: str, content_type: str | None, content: bytes | bytearray) -> Any:
        """A request's body as the server behind is to have it, to be written anew: both then read the same.

        The model of the request chooses its adapter.
        """
        kind = (content_type or "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of any site may send the other kinds without asking first.
            raise RefusedRequestError(415, f"send the request as application/json, not as {kind}")
        try:
            fields = json.loads(content, parse_constant=_no_number, parse_float=_finite)
            if b"\\u" in content:
                json.dumps(fields, ensure_ascii=False).encode()  # half a character is none to the server
        except (ValueError, RecursionError) as wrong:
            raise RefusedRequestError(400, f"the request is no JSON: {wrong}") from None
        if path in (ASK | COMPUTE) and not isinstance(fields, dict):
            raise RefusedRequestError(400, "a request is a JSON object")
        if isinstance(fields, dict):
            if not self.control:
                self._check_fields(fields)
            if reason := too_much_of(path, fields, len(content), self.context_tokens):
                raise RefusedRequestError(400, reason)
            if path in ASK and (reason := not_done(fields)):
                raise RefusedRequestError(400, reason)
            if path in ASK:
                self._choose(path, fields)
        return fields

    def _check_fields(self, fields: Mapping[str, Any]) -> None:
        if "lora" in fields:
            served = ", ".join(self.models)
            raise RefusedRequestError(
                400, f"`lora` is closed: name the adapter as the model, one of {served}"
            )

    def _choose(self, path: str, fields: dict[str, Any]) -> None:
        name, first = fields.get("model"), next(iter(self.models))
        if name is None:
            name = first
        if not isinstance(name, str) or name not in self.models:
            raise self.no_model(name)
        if path in _OF_FIRST_MODEL and name != first:
            raise RefusedRequestError(
                400, f"{path} is answered by {first} only; ask {name} by /v1/chat/completions"
            )
        numbers = [number for number in self.models.values() if number is not None]
        # All of them: an adapter that is not named keeps the scale that it was loaded with.
        if len(self.models) > 1 and "lora" not in fields:
            chosen = self.models[name]
            fields["lora"] = [{"id": number, "scale": float(number == chosen)} for number in numbers]

    def no_model(self, name: object) -> RefusedRequestError:
        """The answer to who asks for a model that is not here."""
        served = ", ".join(self.models)
        return RefusedRequestError(404, f"no model {name!r}; served are {served}", "not_found_error")


def _forbidden(message: str) -> RefusedRequestError:
    return RefusedRequestError(403, message, "permission_error")


def _key_in(header: str | None) -> str:
    """The key in a header, with its scheme or without, as llama-server takes it."""
    scheme, _, key = (header or "").partition(" ")
    return key if scheme.lower() == "bearer" else header or ""


def _is_of_page(path: str) -> bool:
    return PAGE.fullmatch(path) is not None and ".." not in path


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)
