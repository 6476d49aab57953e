"""Where a model is served: the one value that smoke, chat, batch generation and the tests share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit, urlunsplit

from forge.tools.hosts import is_loopback

Message = Mapping[str, str]
"""One turn: `role` (system, user, assistant or tool) and `content`."""

Turn = Mapping[str, object]
"""A `Message` as other programs write them: its content may be a list of parts, and it may have more keys."""

ROLES = ("system", "user", "assistant", "tool")

# What people paste: the routes of OpenAI's API, and the version that they stand under.
_ROUTE = re.compile(r"/(chat/completions|completions|embeddings|responses|models)$")
_VERSION = re.compile(r"/v\d+\w*$")
_PASSWORD = re.compile(r"(^|//)[^/]*@")


def unknown_end() -> str:
    """Nothing is known of the end of a server that is not ours."""
    return ""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    `url` is given in any form (its root, with `/v1`, the whole path of a route, with `user:password@`) and
    kept as the server's root, without the password, which goes to `login` and is never shown.

    `why_gone` says why the server of a runtime has ended, with its last lines where forge started it; it
    gives the empty text, at once, while the server runs or where forge cannot know. `device` is what the
    model runs on and `container` the id of the server's, where forge started it. `proved` is False where the
    server was away, so that nobody could see whether it lists `model`.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    why_gone: Callable[[], str] = field(default=unknown_end, repr=False, compare=False)
    device: str = field(default="unknown", compare=False)
    container: str | None = field(default=None, compare=False)
    proved: bool = field(default=True, compare=False)
    login: tuple[str, str] | None = field(default=None, repr=False)
    version: str = field(default="/v1", repr=False)
    query: str = field(default="", repr=False)
    is_ollama: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            user, password = parts.username, parts.password
        except ValueError:
            user, password, parts = None, None, urlsplit("")
        if "://" not in self.url or not parts.netloc:
            self._set(url=_PASSWORD.sub(r"\1", self.url))  # no URL at all: whoever asks it says so
            return
        if user is not None:
            self._set(login=(unquote(user), unquote(password or "")))
        path = _ROUTE.sub("", whole := parts.path.rstrip("/"))
        if version := _VERSION.search(path):
            self._set(version=version[0])
            path = path[: version.start()].rstrip("/")
        elif path != whole:
            self._set(version="")  # a whole route names its own place: nothing stands before it
        root = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))
        self._set(url=root)
        if parts.query:
            self._set(query=f"?{parts.query}")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def route(self, path: str) -> str:
        """The whole URL of a route such as `/v1/chat/completions`."""
        if path.startswith("/v1/"):
            path = self.version + path.removeprefix("/v1")
        return self.url + path + self.query

    @property
    def loopback(self) -> bool:
        """Whether it is on this machine, where a proxy of the environment must not interfere."""
        try:
            return is_loopback(urlsplit(self.url).hostname or "")
        except ValueError:
            return False
