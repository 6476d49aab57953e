"""Where a model is served: the one value that smoke, chat, batch generation and the tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from forge.tools.hosts import is_loopback

Message = Mapping[str, str]
"""One turn: `role` (system, user, assistant or tool) and `content`."""

ROLES = ("system", "user", "assistant", "tool")


def unknown_end() -> str:
    """Nothing is known of the end of a server that is not ours."""
    return ""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: `url` is its root, with or without `/v1`.

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

    def route(self, path: str) -> str:
        """The whole URL of a route such as `/v1/chat/completions`."""
        return self.url.rstrip("/").removesuffix("/v1") + path

    @property
    def loopback(self) -> bool:
        """Whether it is on this machine, where a proxy of the environment must not interfere."""
        try:
            return is_loopback(urlsplit(self.url).hostname or "")
        except ValueError:
            return False  # no URL at all: whoever asks it says so
