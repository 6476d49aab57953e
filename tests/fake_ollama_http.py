"""The routes of the fake Ollama: HTTP in, its state changed, HTTP out."""

from __future__ import annotations

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.fake_ollama import FakeOllama, tagged
from tests.fake_ollama_rules import RefusedError, check_create

_CHUNK = 1 << 16


class Handler(BaseHTTPRequestHandler):
    """`fake` is the server's state."""

    fake: FakeOllama

    def log_message(self, format: str, *args: object) -> None:
        """Silent: what was asked stands in `FakeOllama.asked`."""

    def do_HEAD(self) -> None:
        self.fake.asked.append(f"HEAD {self.path.partition(':')[0]}")
        there = self.path == "/" or self.fake.blob(self.path.rpartition("/")[2]).exists()
        self.send(200 if there else 404)

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def do_DELETE(self) -> None:
        self.answer(self.remove)

    def answer(self, route: Any) -> None:
        self.fake.asked.append(f"{self.command} {self.path.partition(':')[0]}")
        try:
            kind, status, message = self.fake.troubles.get(self.path.partition("/sha256")[0], ("", 0, ""))
            if self.path in self.fake.once:
                self.body()
                raise RefusedError(*self.fake.once.pop(self.path))
            if kind == "die":
                self.rfile.read1(_CHUNK)
                self.connection.close()
                return
            if kind == "slow":
                time.sleep(status)
            if kind == "error":
                self.body()
                raise RefusedError(status, message)
            route()
        except RefusedError as refused:
            self.json({"error": str(refused)}, refused.status)

    def get(self) -> None:
        fake = self.fake
        if self.path == "/api/version":
            self.json({"version": fake.version})
        elif self.path == "/api/tags":
            self.json(
                {
                    "models": [
                        {"name": name, "model": name, "digest": _digest(fake, name)} for name in fake.models
                    ]
                }
            )
        elif self.path == "/api/ps":
            names = fake.awake_names()
            self.json(
                {"models": [{"name": name, "model": name, "digest": _digest(fake, name)} for name in names]}
            )
        elif self.path == "/v1/models":
            self.json({"object": "list", "data": [{"id": name, "object": "model"} for name in fake.models]})
        elif self.path == "/":
            self.send(200, b"Ollama is running", "text/plain")
        else:
            self.send(404, b"404 page not found", "text/plain")

    def post(self) -> None:
        fake, content = self.fake, self.body()
        if self.path.startswith("/api/blobs/"):
            self.send(fake.keep(self.path.rpartition("/")[2], content))
            return
        body = json.loads(content)
        if self.path == "/api/create":
            check_create(body)
            self.stream(fake.create(body), whole=body.get("stream", True))
        elif self.path == "/api/show":
            self.json(_shown(fake, body.get("model") or body["name"]))
        elif self.path == "/api/copy":
            fake.models[tagged(body["destination"])] = fake.find(body["source"])
            self.send(200)
        elif self.path == "/api/chat":
            told = fake.chat(body)
            self.stream([told], whole=True) if body.get("stream", True) else self.json(told)
        elif self.path == "/api/generate":
            told = fake.generate(body)
            self.stream([told], whole=True) if body.get("stream", True) else self.json(told)
        elif self.path == "/v1/chat/completions":
            told = _completion(fake, body, body["messages"])
            self.events(told) if body.get("stream") else self.json(told)
        elif self.path == "/v1/completions":
            told = _completion(fake, body, [{"role": "user", "content": body["prompt"]}])
            choice = told["choices"][0]
            self.json({**told, "choices": [{**choice, "text": choice.pop("message")["content"]}]})
        else:
            self.send(404, b"404 page not found", "text/plain")

    def remove(self) -> None:
        body = json.loads(self.body())
        self.fake.find(body.get("model") or body["name"])
        del self.fake.models[tagged(body.get("model") or body["name"])]
        self.send(200)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        return content

    def stream(self, lines: Any, *, whole: bool) -> None:
        told = list(lines)
        if not whole:
            last = told[-1]
            self.json(last, 500 if "error" in last else 200)
            return
        text = "".join(json.dumps(line) + "\n" for line in told)
        self.send(200, text.encode(), "application/x-ndjson")

    def events(self, told: dict[str, Any]) -> None:
        """A streamed completion, in one piece."""
        choice = told["choices"][0]
        piece = {"index": 0, "delta": choice["message"], "finish_reason": choice["finish_reason"]}
        lines = [
            json.dumps({"choices": [piece]}),
            json.dumps({"choices": [], "usage": told["usage"]}),
            "[DONE]",
        ]
        self.send(200, "".join(f"data: {line}\n\n" for line in lines).encode(), "text/event-stream")

    def json(self, fields: Any, status: int = 200) -> None:
        self.send(status, json.dumps(fields).encode(), "application/json")

    def send(self, status: int, content: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(fake: FakeOllama, name: str) -> str:
    model = fake.models[name]
    known = (model.blob, model.template, model.system, model.parameters, model.adapter, model.licences)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _shown(fake: FakeOllama, name: str) -> dict[str, Any]:
    model = fake.find(name)
    lines = [
        f"{key:<30} {json.dumps(one, ensure_ascii=False)}"
        for key, value in model.parameters.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    return {
        "modelfile": _modelfile(fake, name),
        "template": (model.jinja if fake.has_jinja and model.uses_jinja else model.template)
        or "{{ .Prompt }}",
        "parameters": "\n".join(lines),
        "license": "\n".join(model.licences),
        "details": {"format": "gguf"},
        "capabilities": ["completion", *sorted(model.jinja_can if model.uses_jinja else ())],
        "model_info": {"general.architecture": model.architecture},
    }


def _modelfile(fake: FakeOllama, name: str) -> str:
    """What `ollama show --modelfile` prints: the blobs by their paths on the server's machine."""
    model, store = fake.find(name), fake.store or fake.folder
    commands = [("FROM", str(store / fake.blob(model.blob).name))]
    commands += [("ADAPTER", str(store / fake.blob(model.adapter).name))] if model.adapter else []
    commands += [("TEMPLATE", model.template or "{{ .Prompt }}")]
    commands += [
        (word, text) for word, text in (("SYSTEM", model.system), ("RENDERER", model.renderer)) if text
    ]
    for key, value in model.parameters.items():
        commands += [
            (f"PARAMETER {key}", str(one)) for one in (value if isinstance(value, list) else [value])
        ]
    commands += [("LICENSE", text) for text in model.licences]
    commands += [(f"MESSAGE {one['role']}", one["content"]) for one in model.messages]
    lines = [f"{word} {_quoted(text)}" for word, text in commands]
    head = [
        '# Modelfile generated by "ollama show"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {tagged(name)}",
        "",
    ]
    return "\n".join([*head, *lines, ""])


def _quoted(text: str) -> str:
    if "\n" not in text and text == text.strip(" "):
        return text
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _completion(fake: FakeOllama, body: dict[str, Any], messages: Any) -> dict[str, Any]:
    """The OpenAI-compatible routes, both with the chat template; what is not named here is ignored."""
    names = {name: name for name in ("temperature", "seed", "stop", "top_p")} | {"max_tokens": "num_predict"}
    options = {ours: body[name] for name, ours in names.items() if body.get(name) is not None}
    told = fake.chat({"model": body["model"], "messages": messages, "options": options})
    usage = {"prompt_tokens": told["prompt_eval_count"], "completion_tokens": told["eval_count"]}
    choice = {"index": 0, "message": told["message"], "finish_reason": told["done_reason"]}
    return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
