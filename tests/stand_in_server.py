"""A small OpenAI-compatible server for tests: a real HTTP server whose failures are written down.

It answers with its question's last turn in capitals. `failures` are given instead of answers,
first to last, one for each chat request; a stream waits for `hold` after its first word. The rest of
its manners are those of llama-server, to which `test_serve_client` holds both.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from forge.serve.endpoint import Endpoint


@dataclass(frozen=True)
class Failure:
    """Status 0 breaks the connection off without an answer; -1 does so in the middle of one."""

    status: int
    message: str = "stand-in"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


@dataclass
class StandIn:
    """Use it as a context manager; `stop` and `start` let it die and come back on the same port."""

    failures: list[Failure] = field(default_factory=list)
    refuse: str | None = None
    broken: str | None = None
    garbled: str | None = None
    slots: int | None = None
    capacity: int = 1000
    api_key: str | None = None
    seconds: float = 0.0
    suffix: str = ""
    models: Sequence[str] = ("stand-in",)
    hold: threading.Event | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    most_at_once: int = 0
    turned_away: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.now = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.port}", "stand-in", self.api_key)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]

    def start(self) -> None:
        stand_in = self

        class Bound(_Handler):
            server_state = stand_in

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Bound)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def __enter__(self) -> StandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    server_state: StandIn

    def log_message(self, format: str, *args: object) -> None:
        """Silent: what was asked stands in `StandIn.asked`."""

    def do_GET(self) -> None:
        state = self.server_state
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        elif not self.let_in():
            return
        elif self.path == "/v1/models":
            listed = [{"id": name, "object": "model"} for name in state.models]
            self.answer(200, {"object": "list", "data": listed})
        elif self.path == "/props" and state.slots:
            self.answer(200, {"total_slots": state.slots})
        else:
            self.fail(404, "File Not Found")

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, _, login = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            state.logins.append(base64.b64decode(login).decode())
        if not self.let_in():
            return
        with state.lock:
            state.asked.append(body)
            state.now += 1
            state.most_at_once = max(state.most_at_once, state.now)
            failure = state.failures.pop(0) if state.failures else None
            if state.now > state.capacity:
                failure = Failure(429, "too many at once")
                state.turned_away += 1
        try:
            self.converse(body, failure)
        finally:
            with state.lock:
                state.now -= 1

    def converse(self, body: dict[str, Any], failure: Failure | None) -> None:
        state = self.server_state
        time.sleep(state.seconds)
        messages = body["messages"]
        if not isinstance(messages, list):
            return self.fail(400, "Expected 'messages' to be an array")
        asked = messages[-1]["content"]
        if state.refuse and state.refuse in asked:
            return self.fail(400, "too long", type="exceed_context_size_error", n_prompt_tokens=99, n_ctx=8)
        if state.broken and state.broken in asked:
            return self.fail(500, "broken")
        if state.garbled and state.garbled in asked:
            return self.send(200, b"<html>", {})
        if failure and failure.status > 0:
            return self.give_up(failure)
        words = [word + " " for word in asked.upper().split()] + [state.suffix]
        words = words[: body["max_tokens"]] if not failure or failure.status != 0 else []
        cut = len(words) < len(asked.split())
        usage = {
            "prompt_tokens": sum(len(turn["content"] or "") for turn in messages),
            "completion_tokens": len(words),
        }
        if body.get("stream"):
            return self.stream(words, "length" if cut else "stop", usage, whole=not failure)
        if failure:
            return None
        choice = {
            "index": 0,
            "finish_reason": "length" if cut else "stop",
            "message": {"role": "assistant", "content": "".join(words)},
        }
        return self.answer(200, {"choices": [choice], "model": body["model"], "usage": usage})

    def stream(self, words: Sequence[str], finish: str, usage: dict[str, int], *, whole: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        events: list[object] = [
            {"choices": [{"finish_reason": None, "delta": {"content": w}}]} for w in words
        ]
        if whole:
            events.append({"choices": [{"finish_reason": finish, "delta": {}}]})
            events.append({"choices": [], "usage": usage})
        for event in events:
            self.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
            if self.server_state.hold:
                self.server_state.hold.wait(20)
        if whole:
            self.wfile.write(b"data: [DONE]\n\n")

    def let_in(self) -> bool:
        key = self.server_state.api_key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.fail(401, "Invalid API Key")
            return False
        return True

    def give_up(self, failure: Failure) -> None:
        if failure.body is not None:
            return self.send(failure.status, failure.body, dict(failure.headers))
        return self.fail(failure.status, failure.message, dict(failure.headers))

    def fail(self, status: int, message: str, headers: dict[str, str] | None = None, **more: object) -> None:
        error = {"code": status, "message": message, **more}
        self.send(status, json.dumps({"error": error}).encode(), headers or {})

    def answer(self, status: int, payload: dict[str, Any]) -> None:
        self.send(status, json.dumps(payload, ensure_ascii=False).encode(), {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
