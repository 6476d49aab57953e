"""A fake Ollama server: real HTTP, real blobs on disk, a real llama-server that answers.

No package registry ships Ollama, so this stands in its place. What it does was measured on a live server
0.33: `test_fake_ollama` has a test for each statement, and runs the same tests against a live one where
OLLAMA_HOST is set. `python -m tests.fake_ollama` is `ollama serve`.

Not covered: native renderers; the cloud; pulling (an attempt is recorded).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from forge.chat.format_source import read_source
from forge.errors import ForgeError
from forge.model.gguf_header import read_gguf
from forge.serve.embedded import serve_embedded
from forge.serve.runtime import ServerSettings
from tests.fake_ollama_prompts import GoRenderer, Messages, Model, by_interpreter, collate, prompt_of
from tests.fake_ollama_rules import RefusedError, check_options, check_quantize

DEFAULT_CONTEXT = 4096


@dataclass
class FakeOllama:
    """Use it as a context manager. `troubles`: route -> status and message, or `die`, `late` or
    `slow`; `once`: of its next answer only.

    `spoil` changes every prompt. `hears_truncate`: with `truncate` false it drops no turns.
    `counts_new_alone`: of a prompt it counts what the one before did not have.
    `counts_more`: so many tokens more than the prompt's text has, as a second BOS would be.
    `store`: where it says that its blobs are, as one in a container does.
    """

    version: str = "0.33.0"
    go: GoRenderer = by_interpreter
    port: int = 0
    troubles: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    once: dict[str, tuple[int, str]] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    pulled: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    spoil: Callable[[str], str] = lambda prompt: prompt
    counts_new_alone: bool = False
    hears_truncate: bool = False
    counts_more: int = 0
    store: Path | None = None

    def __post_init__(self) -> None:
        self.loaded: dict[tuple[str, str | None, int], str] = {}
        self.awake: set[str] = set()
        self.leaving: set[str] = set()
        self.lock = threading.Lock()
        self.kept = ""
        self.honours_go = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def has_jinja(self) -> bool:
        """Since 0.30 a server runs llama-server; one built from source calls itself 0.0.0."""
        return self._is_since(0, 30)

    def _is_since(self, *version: int) -> bool:
        own = tuple(map(int, self.version.partition("-")[0].split(".")))
        return own >= version or not any(own)

    def __enter__(self) -> FakeOllama:
        from tests.fake_ollama_http import Handler

        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="fake-ollama-")))
        # The kernel kills a model's server when the thread that started it ends: one thread for all.
        self.loader = self.stack.enter_context(ThreadPoolExecutor(1))
        self.running = contextlib.ExitStack()
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"fake": self}))
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.loader.submit(self.running.close).result()
        self.stack.close()

    # Blobs

    def blob(self, digest: str) -> Path:
        return self.folder / digest.replace(":", "-")

    def keep(self, digest: str, content: bytes) -> int:
        """201 when taken, 200 when it was there."""
        if self.blob(digest).exists():
            return 200
        found = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if found != digest:
            raise RefusedError(400, f'digest mismatch, expected "{digest}", got "{found}"')
        self.blob(digest).write_bytes(content)
        return 201

    # Models

    def create(self, fields: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """What the stream says; its errors are late ones."""
        try:
            yield {"status": "parsing GGUF"}
            model = self._model(fields)
            yield {"status": "creating new layer"}
            if "late" in self._trouble("/api/create"):
                raise RefusedError(200, self.troubles["/api/create"][2])
            with self.lock:
                self.models[tagged(fields["model"])] = model
            yield {"status": "writing manifest"}
            yield {"status": "success"}
        except (RefusedError, ForgeError) as error:
            yield {"error": str(error)}

    def _model(self, fields: Mapping[str, Any]) -> Model:
        if fields.get("from"):
            model = self.models.get(tagged(fields["from"]))
            if model is None:
                self.pulled.append(fields["from"])
                raise RefusedError(200, "pull model manifest: file does not exist")
            model = Model(**{**vars(model), "parameters": dict(model.parameters)})
        else:
            model = self._of_gguf(next(iter(fields["files"].values())), fields.get("quantize"))
        adapters = list(fields.get("adapters", {}).values())
        if len(adapters) > 1:
            raise RefusedError(200, "only one adapter is currently supported")
        for digest in adapters:
            model.adapter, model.adapter_architecture = digest, read_gguf(self._there(digest)).architecture
        model.template = fields.get("template") or model.template
        model.system = fields.get("system") or model.system
        model.renderer = fields.get("renderer") or model.renderer
        model.parameters |= fields.get("parameters", {})
        model.messages = list(fields.get("messages", model.messages))
        licence = fields.get("license") or []
        model.licences = [licence] if isinstance(licence, str) else list(licence)
        model.detect()
        return model

    def _there(self, digest: str) -> Path:
        if not self.blob(digest).exists():
            raise RefusedError(200, f"blob {digest} does not exist")
        return self.blob(digest)

    def _of_gguf(self, digest: str, quantize: str | None) -> Model:
        header = read_gguf(self._there(digest))
        if quantize:
            check_quantize(header, quantize)
        # llama-quantize writes it anew, so that its digest is another one.
        content = self.blob(digest).read_bytes() + bytes(32)
        kept = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blob(kept).write_bytes(content)
        if header.chat_template is None:
            return Model(kept, None, {}, False, header.architecture)
        path = self.blob(kept).with_suffix(".gguf")
        path.unlink(missing_ok=True)
        path.symlink_to(self.blob(kept))
        source = read_source(path)
        template = source.template
        return Model(kept, template.source, template.special_tokens, source.add_bos, header.architecture)

    def find(self, name: str) -> Model:
        if tagged(name) not in self.models:
            raise RefusedError(404, f"model '{name}' not found")
        return self.models[tagged(name)]

    # Answers

    def prompt(
        self,
        model: Model,
        messages: Messages,
        context: int,
        *,
        cuts: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt; the oldest turns are dropped in silence until it fits, unless it `cuts` none."""
        system = [one for one in messages if one["role"] == "system"]
        for start in range(len(messages)):
            kept = [*(one for one in system if one not in messages[start:]), *messages[start:]]
            text = prompt_of(
                model, kept, self.go, has_jinja=self.has_jinja, honours_go=self.honours_go, tools=tools
            )
            if not cuts or start == len(messages) - 1 or len(text.encode()) < context:
                break
            if len(self._llama(model, context, "/tokenize", content=text)["tokens"]) <= context:
                break
        return self.spoil(text)

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of /api/chat; the model stays in memory afterwards, unless `keep_alive` is 0."""
        told = self._answer(body)
        self.awake.add(tagged(body["model"]))
        if body.get("keep_alive") == 0:
            self.leaving.add(tagged(body["model"]))
        return told

    def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        model = self.find(body["model"])
        for asked in ("tools", "think"):
            kind = "thinking" if asked == "think" else asked
            can = model.jinja_can if self.has_jinja and model.uses_jinja else set()
            if body.get(asked) and kind not in can:
                whole = f"registry.ollama.ai/library/{tagged(body['model'])}"
                why = f"{whole} does not support tools"
                raise RefusedError(
                    400, f'"{body["model"]}" does not support thinking' if asked == "think" else why
                )
        options = {**model.parameters, **(body.get("options") or {})}
        check_options(options)
        messages = body.get("messages") or []
        done = {"model": body["model"], "created_at": "2026-01-01T00:00:00Z", "done": True}
        if not messages:
            return done | {"message": {"role": "assistant", "content": ""}, "done_reason": "load"}
        if model.adapter and model.adapter_architecture != model.architecture:
            raise RefusedError(500, "llama-server process has terminated: exit status 1")
        collate(model, messages)
        context = int(options.get("num_ctx", DEFAULT_CONTEXT))
        cuts = not self.hears_truncate or body.get("truncate", True)
        prompt = self.prompt(model, messages, context, cuts=cuts, tools=body.get("tools") or ())
        if body.get("_debug_render_only") and self._is_since(0, 11, 5):
            return done | {
                "_debug_info": {"rendered_template": prompt},
                "message": {"role": "", "content": ""},
            }
        told = self._completed(model, context, prompt, options)
        cached = len(os.path.commonprefix([self.kept, prompt])) // 8 if self.counts_new_alone else 0  # noqa: RUF071
        self.kept = prompt
        return done | {
            "message": {"role": "assistant", "content": told["content"]},
            "done_reason": "length" if told["stop_type"] == "limit" else "stop",
            "prompt_eval_count": told["tokens_evaluated"] - cached + self.counts_more,
            "eval_count": told["tokens_predicted"],
        }

    def _completed(
        self, model: Model, context: int, prompt: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the model says after `prompt`, which has to fit."""
        if len(self._llama(model, context, "/tokenize", content=prompt)["tokens"]) > context:
            raise RefusedError(400, "the prompt is longer than the context of the model")
        usual = {"top_k": 40, "top_p": 0.9, "min_p": 0.0}
        chosen = {name: options.get(name, value) for name, value in usual.items()}
        return self._llama(
            model, context, "/completion", prompt=prompt, n_predict=options.get("num_predict", -1),
            stop=options.get("stop", []), temperature=options.get("temperature", 0.8),
            seed=options.get("seed", 0), cache_prompt=False, **chosen,
        )  # fmt: skip

    def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of /api/generate; only with `raw` does the prompt go to the model as it is."""
        model = self.find(body["model"])
        options = {**model.parameters, **(body.get("options") or {})}
        check_options(options)
        context = int(options.get("num_ctx", DEFAULT_CONTEXT))
        prompt = body["prompt"]
        if not body.get("raw"):
            prompt = self.prompt(model, [{"role": "user", "content": prompt}], context)
        told = self._completed(model, context, prompt, options)
        return {
            "model": body["model"],
            "created_at": "2026-01-01T00:00:00Z",
            "done": True,
            "response": told["content"],
            "done_reason": "length" if told["stop_type"] == "limit" else "stop",
            "prompt_eval_count": told["tokens_evaluated"],
            "eval_count": told["tokens_predicted"],
        }

    def awake_names(self) -> list[str]:
        """The names that `/api/ps` lists; one that was unloaded is still there at the first look."""
        listed = sorted({self.first_name(name) for name in self.awake if name in self.models})
        if self.leaving:
            self.awake -= self.leaving
            self.leaving, self.kept = set(), ""
        return listed

    def first_name(self, name: str) -> str:
        """The name under which `/api/ps` shows a model: the first of those that one manifest has."""
        return next(one for one in sorted(self.models) if self.models[one] is self.models[name])

    def _llama(self, model: Model, context: int, route: str, **fields: Any) -> dict[str, Any]:
        """Ask the llama-server behind, started for model, adapter and context when it is first needed."""
        key = (model.blob, model.adapter, context)
        with self.lock:
            if key not in self.loaded:
                try:
                    self.loaded[key] = self.loader.submit(self._load, model, context).result()
                except ForgeError as failure:
                    raise RefusedError(500, f"llama runner process has terminated: {failure}") from failure
        found = httpx.post(self.loaded[key] + route, json=fields, timeout=120, trust_env=False).json()
        assert isinstance(found, dict)
        return found

    def _load(self, model: Model, context: int) -> str:
        path, adapter = self.blob(model.blob), self.blob(model.adapter) if model.adapter else None
        settings = ServerSettings(path, "behind", context_tokens=context, parallel=1, adapter=adapter)
        return self.running.enter_context(serve_embedded(settings)).url

    def _trouble(self, route: str) -> str:
        return self.troubles.get(route, ("", 0, ""))[0]


def tagged(name: str) -> str:
    """`latest` is the tag of a name without one; what every name has is not listed."""
    whole = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return whole.removeprefix("registry.ollama.ai/").removeprefix("library/")


def main() -> None:
    """`ollama serve`: until it is killed."""
    host = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434")
    with FakeOllama(port=int(host.rpartition(":")[2])):
        threading.Event().wait()


if __name__ == "__main__":
    main()
