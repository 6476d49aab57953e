"""A client of Ollama's own API: what an import and its proof need, over httpx.

Not PyPI's `ollama`: it shows no progress, does not ask whether a blob is there already, and cannot pass
`_debug_render_only`; with it for the rest this file has as many lines (docs/decisions.md). The tests hold
this client and that one to the same server. Errors come as
early answers (400, 404, 500) and late, inside a stream that began with 200; both are raised here.
https://docs.ollama.com/api.

Not covered: pulling and pushing; keys of Ollama's cloud.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from forge import report
from forge.errors import DataError, MissingToolError, RecipeError, StageError
from forge.files import chunks_of, sha256_of
from forge.tools.hosts import DEFAULT_HOST, in_url, is_loopback, reachable

PORT = 11434
# Loading a large model from a slow disk takes minutes; a connection does not.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_SERVE = "start it with: ollama serve (https://ollama.com/download); --host or OLLAMA_HOST says where it is"


Result = TypeVar("Result")

# A letter, a byte, or a character by its number. https://pkg.go.dev/strconv#Quote
_GO_ESCAPE = re.compile(r"\\(?:([abfnrtv\\\"'])|x([0-9a-f]{2})|u([0-9a-f]{4})|U(00[0-9a-f]{6}))")
_GO_NAMED = dict(zip("abfnrtv\\\"'", "\a\b\f\n\r\t\v\\\"'", strict=True))


class OllamaError(StageError):
    """The server said no, or broke off."""


def server_url(host: str | None = None) -> str:
    """The server's URL: `host`, else OLLAMA_HOST, read as Ollama reads it, else this machine's.

    Raises `RecipeError` for what is no address.
    """
    address = (host or os.environ.get("OLLAMA_HOST") or "").strip().strip("\"'")
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "http", address
    usual = {"http": PORT if not separator else 80, "https": 443}.get(scheme)
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port or usual
    except ValueError:
        usual = None
    if usual is None:
        raise RecipeError(f"{address!r} is not the address of a server", hint=f"such as 127.0.0.1:{PORT}")
    name = in_url(reachable(parts.hostname or "127.0.0.1"))
    return f"{scheme}://{name}:{port}{parts.path.rstrip('/')}"


def address_of(host: str, port: int) -> str | None:
    """For `server_url`, of a host and a port as every runtime has them; 0 is no port.

    None, which leaves it to OLLAMA_HOST, where neither is another than the usual one.
    """
    if port:
        return f"{in_url(host)}:{port}"
    return None if host == DEFAULT_HOST else in_url(host)


class Ollama:
    """A connection to the server at `url`. Use it as a context manager.

    Every method raises `MissingToolError` when nothing answers and `OllamaError` for what fails.
    """

    def __init__(self, url: str, *, timeout: httpx.Timeout = _TIMEOUT) -> None:
        self.url = url
        local = is_loopback(urlsplit(url).hostname or "")
        verify = not url.startswith("http://")
        self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=not local, verify=verify)

    def __enter__(self) -> Ollama:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def version(self) -> tuple[int, ...]:
        """Such as (0, 33, 0)."""
        version = str(self._ask("GET", "/api/version", doing="asked its version").get("version", ""))
        return tuple(int(number) for number in re.findall(r"\d{1,9}", version.partition("-")[0]))

    def push(self, path: Path, label: str) -> str:
        """Make sure that it has the bytes of `path`; gives their digest. Shows progress under `label`."""
        try:
            digest = f"sha256:{sha256_of(path, f'checksum of {label}')}"
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        route = f"/api/blobs/{digest}"
        with self._failures(f"looked for {label}"):
            answer = self._http.head(route)
        if answer.status_code == 404:
            headers = {"Content-Length": str(path.stat().st_size)}
            with self._failures(f"took {label}"):
                answer = self._http.post(route, content=chunks_of(path, f"upload {label}"), headers=headers)
            _raise_for(answer.status_code, answer.content, f"took {label}")
        else:
            _raise_for(answer.status_code, b"", f"looked for {label}")
        return digest

    def create(self, name: str, fields: Mapping[str, Any]) -> None:
        """Make the model `name`; its late errors come in the stream and are raised too."""
        _past_races(lambda: self._create(name, fields))

    def _create(self, name: str, fields: Mapping[str, Any]) -> None:
        doing, last = f"made {name}", ""
        with self._failures(doing):
            with self._http.stream("POST", "/api/create", json={"model": name, **fields}) as answer:
                if not answer.is_success:
                    _raise_for(answer.status_code, answer.read(), doing)
                for line in answer.iter_lines():
                    event = _object(line.encode())
                    if "error" in event:
                        raise _error(200, str(event["error"]), doing)
                    last = str(event.get("status", last))
                    report.detail(f"ollama: {last}")
        if last != "success":
            raise OllamaError(f"Ollama broke off while it {doing}: its last word was {last!r}")

    def show(self, name: str) -> Mapping[str, Any]:
        """Its facts: `template`, `parameters` (lines of text), `license`, ...; see `stops_in`."""
        return self._ask("POST", "/api/show", {"model": name}, doing=f"showed {name}")

    def digest(self, name: str) -> str | None:
        """The digest of the manifest of `name`, or None where there is no such model."""
        asked = _past_races(lambda: self._ask("GET", "/api/tags", doing="listed its models"))
        listed = asked.get("models") or []
        with _as_expected("listed its models"):
            names = {_listed(str(model["name"])): str(model["digest"]) for model in listed}
        return names.get(_listed(name))

    def prompt(self, name: str, messages: Sequence[Mapping[str, Any]], **fields: Any) -> str:
        """The text that it would give to the model, by `_debug_render_only` (0.11.5 and later)."""
        answer = self.chat(name, messages, _debug_render_only=True, **fields)
        shown = answer.get("_debug_info")
        if not isinstance(shown, dict) or "rendered_template" not in shown:
            raise OllamaError(
                "this Ollama does not show its prompts, so nothing can be proved",
                hint="0.11.5 and later do: update it",
            )
        return str(shown["rendered_template"])

    def chat(self, name: str, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Mapping[str, Any]:
        """The answer to a conversation, with `message`, `done_reason`, `prompt_eval_count`."""
        body = {"model": name, "messages": [dict(message) for message in messages], "stream": False, **fields}
        return self._ask("POST", "/api/chat", body, doing=f"answered as {name}")

    def unload(self, name: str) -> None:
        """Take the model out of memory, and what it kept of earlier prompts.

        The server answers before it is gone, and a request that comes too early meets it still there.
        """
        digest = self.digest(name)
        self.chat(name, [], keep_alive=0)
        for _ in range(_LOOKS_UNTIL_UNLOADED):
            asked = self._ask("GET", "/api/ps", doing="listed what is loaded")
            with _as_expected("listed what is loaded"):
                # One runner for all names of a manifest, listed under one of them.
                loaded = {str(model.get("digest")) for model in asked.get("models") or []}
            if digest not in loaded:
                return
            time.sleep(_SECONDS_BETWEEN_TRIES)

    def copy(self, source: str, destination: str) -> None:
        """Give `source` a second name; one that is taken is replaced."""
        fields = {"source": source, "destination": destination}
        self._ask("POST", "/api/copy", fields, doing=f"named {destination}")

    def delete(self, name: str) -> None:
        self._ask("DELETE", "/api/delete", {"model": name}, doing=f"deleted {name}")

    def _ask(
        self, method: str, route: str, body: Mapping[str, Any] | None = None, *, doing: str
    ) -> Mapping[str, Any]:
        with self._failures(doing):
            answer = self._http.request(method, route, json=body)
        _raise_for(answer.status_code, answer.content, doing)
        return _object(answer.content) if answer.content else {}

    @contextlib.contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        """The edge where httpx's exceptions become forge's."""
        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as wrong:
            raise RecipeError(f"{self.url!r} is not the address of a server: {wrong}") from wrong
        except (httpx.ConnectError, httpx.ConnectTimeout) as away:
            raise MissingToolError(f"no Ollama server answers at {self.url}", hint=_SERVE) from away
        except httpx.TimeoutException as late:
            raise OllamaError(f"Ollama at {self.url} gave no answer in time while it {doing}") from late
        except (httpx.TransportError, httpx.DecodingError) as broken:
            raise OllamaError(
                f"Ollama at {self.url} broke off while it {doing} ({broken})",
                hint="its own log says more; a full disk and too little memory are common reasons",
            ) from broken


# What it says where another import makes or deletes a model at the same time (measured on 0.33).
_RACES = ("no such file", "model is required")
_TRIES, _SECONDS_BETWEEN_TRIES = 6, 0.2
_LOOKS_UNTIL_UNLOADED = 50


def _past_races(ask: Callable[[], Result]) -> Result:
    """`ask` again where the server stumbled over what another client was doing."""
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except OllamaError as failure:
            if not any(race in failure.message for race in _RACES):
                raise
            time.sleep(_SECONDS_BETWEEN_TRIES)
    return ask()


def _listed(name: str) -> str:
    """How a model is listed: with its tag, without what all names have, in any case."""
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return tagged.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")


@contextlib.contextmanager
def _as_expected(doing: str) -> Iterator[None]:
    """Raise `OllamaError` where an answer has another shape than what is read from it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as wrong:
        raise OllamaError(
            f"Ollama said nothing that can be read while it {doing}", hint=_NO_OLLAMA
        ) from wrong


_NO_OLLAMA = "the address must be that of an Ollama server"


def stops_in(shown: Mapping[str, Any]) -> set[str]:
    """The stop texts in the answer of `Ollama.show`; a line is `stop    "<|im_end|>"`, quoted as in Go."""
    listed = re.findall(r"^stop\s+(.*)$", str(shown.get("parameters") or ""), re.MULTILINE)
    return {_unquoted(text) if text.startswith('"') else text for text in listed}


def _unquoted(text: str) -> str:
    """What Go's strconv.Quote wrote; raises `OllamaError` for anything else."""
    if not re.fullmatch(rf'"([^"\\]|{_GO_ESCAPE.pattern})*"', text, re.DOTALL):
        raise OllamaError(f"Ollama shows a stop that is not quoted as Go does: {text}")

    def written(match: re.Match[str]) -> bytes:
        named, byte, *numbers = match.group(1, 2, 3, 4)
        if named:
            return _GO_NAMED[named].encode()
        return bytes([int(byte, 16)]) if byte else chr(int(numbers[0] or numbers[1], 16)).encode()

    pieces, at = [], 1
    for escape in _GO_ESCAPE.finditer(text):
        pieces += [text[at : escape.start()].encode(), written(escape)]
        at = escape.end()
    # Only bytes that are no text are written as \x80 and above.
    return b"".join([*pieces, text[at:-1].encode()]).decode("utf-8", "replace")


def _object(content: bytes) -> Mapping[str, Any]:
    try:
        payload = json.loads(content)
    except (ValueError, RecursionError):
        payload = None
    if not isinstance(payload, dict):
        raise OllamaError(
            f"the server answered with something that is not JSON: {content[:80]!r}",
            hint=_NO_OLLAMA,
        )
    return payload


def _raise_for(status: int, content: bytes, doing: str) -> None:
    if 200 <= status < 300:
        return
    try:
        reason = str(_object(content)["error"])
    except (OllamaError, KeyError):
        reason = content[:200].decode("utf-8", "replace") or "no reason given"
    raise _error(status, reason, doing)


def _error(status: int, reason: str, doing: str) -> OllamaError:
    place = f" ({status})" if status != 200 else ""
    hint = ""
    if "no space left" in reason:
        hint = "its disk is full: make room, or set OLLAMA_MODELS to another place and restart it"
    return OllamaError(f"Ollama failed while it {doing}{place}: {reason}", hint=hint)
