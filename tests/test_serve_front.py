"""The front door of every runtime: what a hostile page, neighbour or client sends is refused and harmless."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from forge.errors import StageError
from forge.serve import front, front_rules, front_server
from forge.serve.behind import Behind
from forge.serve.client import Client
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.front_rules import RefusedRequestError, Rules
from forge.serve.llama_server import serve_llama_server
from forge.serve.runtime import Runtime, ServerSettings
from tests import attacks
from tests.servers import HELLO, KEY, llama_server, own_servers, write_adapter
from tests.tiny_gguf import REPLY, write_tiny_gguf

DOORS = [
    pytest.param(key, lora, id=f"{'key' if key else 'open'}-{'lora' if lora else 'alone'}")
    for key, lora in itertools.product((None, KEY), (False, True))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("front")
    write_tiny_gguf(place / "tiny.gguf")
    write_adapter(place / "Y.gguf", says="Y")
    write_adapter(place / "N.gguf", says="N")
    return place


def _settings(files: Path, key: str | None, lora: bool, **more: Any) -> ServerSettings:
    """The model with an adapter of its own that says Y, as a run in adapter mode has it."""
    others = {"no": files / "N.gguf"} if lora else {}
    return ServerSettings(
        files / "tiny.gguf", "yes", 512, threads=1, parallel=2, adapter=files / "Y.gguf", adapters=others,
        api_key=key, **more,
    )  # fmt: skip


def attack(runtime: Runtime, settings: ServerSettings) -> None:
    """Every attack on one server, which answers as before when they are over."""
    with runtime(settings) as endpoint:
        attacks.page_of_another_site_changes_nothing(endpoint, "Y")
        attacks.what_controls_is_closed(endpoint, "Y")
        attacks.other_names_are_not_answered(endpoint)
        attacks.smuggled_requests_are_not_run(endpoint)
        attacks.slow_clients_hold_up_nobody(endpoint, "Y", count=260)
        for name in settings.adapters:
            attacks.answers_as(replace(endpoint, model=name), "N")


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.parametrize(("key", "lora"), DOORS)
def test_embedded_server_withstands(files: Path, key: str | None, lora: bool) -> None:
    attack(serve_embedded, _settings(files, key, lora))


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
@pytest.mark.parametrize(("key", "lora"), DOORS)
def test_program_withstands(files: Path, key: str | None, lora: bool) -> None:
    attack(serve_llama_server, _settings(files, key, lora, program=str(llama_server())))


@pytest.fixture(scope="module")
def opened(files: Path) -> Iterator[Endpoint]:
    """Without a key, known by two more names, open to pages of one site and to llama-server's own routes."""
    chosen = _settings(
        files, None, True, cors_origins="https://chat.example", allow_hosts=("chat.example",),
        control_routes=True,
    )  # fmt: skip
    with serve_embedded(chosen) as endpoint:
        yield endpoint


@pytest.mark.network
@pytest.mark.programs
def test_what_is_opened_is_open(opened: Endpoint) -> None:
    with httpx.Client(base_url=opened.url, trust_env=False) as http:
        assert http.get("/slots").json()[0]["n_ctx"] == 512
        body = {"messages": HELLO, "lora": [{"id": 0, "scale": 0.0}], "temperature": 0}
        assert (
            http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == REPLY
        )
        assert http.get("/health", headers={"Host": "chat.example:8080"}).status_code == 200
        page = {"Origin": "https://chat.example"}
        answer = http.post("/v1/chat/completions", json={"messages": HELLO}, headers=page)
        assert answer.headers["access-control-allow-origin"] == page["Origin"]
        asking = page | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        preflight = http.options("/v1/chat/completions", headers=asking)
        assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (
            204,
            "content-type",
        )
        assert (
            http.options("/v1/chat/completions", headers={"Origin": "https://x.example"}).status_code == 403
        )
        # The page that the server itself serves.
        own = {"Origin": opened.url}
        assert http.post("/tokenize", json={"content": "a"}, headers=own).status_code == 200


@pytest.mark.network
@pytest.mark.programs
def test_what_is_closed_says_how_to_open_it(files: Path) -> None:
    with serve_embedded(_settings(files, None, False)) as endpoint:
        closed = httpx.get(endpoint.route("/slots"), trust_env=False)
        lora = httpx.post(endpoint.route("/completion"), json={"prompt": "a", "lora": []}, trust_env=False)
    assert (closed.status_code, "--control-routes" in closed.text) == (403, True)
    assert (lora.status_code, "`lora` is closed" in lora.text) == (400, True)


@pytest.mark.network
@pytest.mark.programs
def test_models_are_found_by_name(opened: Endpoint) -> None:
    with httpx.Client(base_url=opened.url, trust_env=False) as http:
        assert http.get("/v1/models/no").json()["id"] == "no"
        assert http.get("/v1/models/maybe").status_code == 404
        error = http.post("/v1/chat/completions", json={"model": "maybe", "messages": HELLO}).json()["error"]
        assert (error["code"], error["type"]) == (404, "not_found_error")
        assert error["message"] == "no model 'maybe'; served are yes, no"
        answer = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.network
@pytest.mark.programs
def test_slow_bodies_and_heads_are_given_up(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_rules, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(front_rules, "BODY_SECONDS", 0.6)
    with serve_embedded(_settings(files, None, False)) as endpoint:
        begin = attacks.head(endpoint, "POST", "/v1/chat/completions", "Content-Length: 9")
        assert attacks.raw(endpoint, begin) == b""
        late = attacks.raw(endpoint, begin + b"\r\n{")
        assert attacks.statuses(late) == [408] and b"longer than" in late
        with attacks.connect(endpoint) as one:
            # A byte now and then does not help.
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - begun < 5:
                    one.sendall(b"G" if begun else b"")
                    time.sleep(0.05)
                    one.settimeout(0.01)
                    with contextlib.suppress(TimeoutError):
                        if one.recv(1) == b"":
                            break
            assert time.monotonic() - begun < 3


@pytest.mark.network
@pytest.mark.programs
def test_the_oldest_that_has_not_asked_makes_room(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.serve.front_server.most_connections", lambda: 20)
    with serve_embedded(_settings(files, None, False)) as endpoint, contextlib.ExitStack() as slow:
        waiting = [slow.enter_context(attacks.connect(endpoint)) for _ in range(60)]
        attacks.answers_as(endpoint, "Y")
        waiting[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert waiting[0].recv(1) == b""


@pytest.mark.network
@pytest.mark.programs
def test_large_heads_and_bodies_are_refused(files: Path) -> None:
    with serve_embedded(_settings(files, None, False)) as endpoint:
        large = attacks.head(endpoint, "GET", "/health", *(f"X-{n}: {'y' * 1000}" for n in range(100)))
        assert attacks.statuses(attacks.raw(endpoint, large + b"\r\n")) == [431]
        declared = attacks.head(endpoint, "POST", "/tokenize", f"Content-Length: {1 << 40}")
        assert attacks.statuses(attacks.raw(endpoint, declared + b"\r\n")) == [413]
        deep = b"[" * 100_000
        request = attacks.head(
            endpoint, "POST", "/tokenize", f"Content-Length: {len(deep)}", "Connection: close"
        )
        assert attacks.statuses(attacks.raw(endpoint, request + b"\r\n" + deep)) == [400]


@pytest.mark.network
@pytest.mark.programs
def test_nothing_but_the_front_listens(files: Path) -> None:
    """llama-server itself has no port, and its socket is in a directory of ours alone."""
    with serve_embedded(_settings(files, KEY, False)) as endpoint:
        children = own_servers()
        assert [one for child in children for one in child.net_connections("tcp")] == []
        unix = [str(one.laddr) for child in children for one in child.net_connections("unix")]
        sockets = {Path(place) for place in unix if place.endswith("server.sock")}
        assert sockets and all(one.parent.stat().st_mode & 0o077 == 0 for one in sockets)
    assert endpoint.url.startswith("http://127.0.0.1:")


@pytest.mark.network
@pytest.mark.programs
def test_a_directory_of_a_forge_that_was_killed_is_taken_away(files: Path, tmp_path: Path) -> None:
    import tempfile

    left = Path(tempfile.gettempdir()) / f"forge-serve-{2**22 + 1}-left"
    left.mkdir(exist_ok=True)
    with serve_embedded(_settings(files, None, False)):
        assert not left.exists()


def _rules(**more: Any) -> Rules:
    return Rules.of(ServerSettings(Path("m"), "m", 512, **more))


@pytest.mark.parametrize(
    ("more", "host", "address", "let_in"),
    [
        ({}, "localhost:8080", "127.0.0.1", True),
        ({}, "LocalHost.", "127.0.0.1", True),
        ({}, "127.0.0.1", "127.0.0.1", True),
        ({}, "[::1]:80", "::1", True),
        ({}, "evil.example", "127.0.0.1", False),
        ({}, "", "127.0.0.1", False),
        ({}, "[", "127.0.0.1", False),
        ({}, "localhost@evil.example", "127.0.0.1", False),
        ({}, "localhost/evil.example", "127.0.0.1", False),
        ({}, "localhost?evil.example", "127.0.0.1", False),
        ({}, "loc\talhost", "127.0.0.1", False),
        ({}, "localhost:port", "127.0.0.1", False),
        ({"host": "0.0.0.0"}, "192.168.1.5:8080", "192.168.1.5", True),
        ({"host": "0.0.0.0"}, "192.168.1.6:8080", "192.168.1.5", False),
        ({"host": "box.lan"}, "box.lan:8080", "192.168.1.5", True),
        ({"allow_hosts": ("Chat.example",)}, "chat.example", "10.0.0.1", True),
        ({"allow_hosts": ("*",)}, "anything", "10.0.0.1", True),
    ],
)
def test_names_of_the_server(more: dict[str, Any], host: str, address: str, let_in: bool) -> None:
    if let_in:
        _rules(**more).check_host(host, address)
        return
    with pytest.raises(RefusedRequestError, match="--allow-host"):
        _rules(**more).check_host(host, address)


@pytest.mark.parametrize(
    ("cors", "origin", "let_in"),
    [
        ("", "http://localhost:3000", False),
        ("", "http://127.0.0.1:8080", True),  # the server's own page
        ("", "null", False),
        ("localhost", "http://localhost:3000", True),
        ("localhost", "http://localhost.evil.example", False),
        ("https://a.example, https://b.example", "https://b.example", True),
        ("https://a.example", "https://a.example.evil.example", False),
        ("https://a.example", "http://a.example", False),
        ("*", "null", True),
    ],
)
def test_pages_that_may_ask(cors: str, origin: str, let_in: bool) -> None:
    rules = _rules(cors_origins=cors)
    if let_in:
        rules.check_origin(origin, "127.0.0.1:8080")
        return
    with pytest.raises(RefusedRequestError, match="--cors"):
        rules.check_origin(origin, "127.0.0.1:8080")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completion%73", "/v1/chat/../slots", "//slots", "/slots/", "/v1/stream", "/tools",
        "/cors-proxy", "/_app/../slots", "/_app/../../etc/passwd", "http://127.0.0.1/slots", "*", "",
        "/v1/models/",
        "/v1/chat/completions/control",
    ],
)  # fmt: skip
def test_paths_that_are_no_routes(path: str) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(RefusedRequestError) as refused:
            _rules().check_route(method, path)
        assert refused.value.status in (403, 404, 405)


def test_a_body_is_written_anew() -> None:
    """What the two parsers could read differently is gone: keys given twice, other encodings."""
    rules = _rules()
    twice = b'{"model": "x", "model": "m", "temperature": 0.1}'
    assert rules.fields("/completion", None, twice) == {"model": "m", "temperature": 0.1}
    assert rules.fields("/completion", "application/json", '{"prompt": "ü"}'.encode("utf-16")) == {
        "prompt": "ü"
    }
    halves = (b'{"prompt": "\\ud83d"}', b'{"prompt": "\\ud83d\\ude00"}')
    assert rules.fields("/completion", None, halves[1])["prompt"] == "\N{GRINNING FACE}"
    for wrong in (b'{"x": NaN}', b'{"x": 1,}', b'{"lora": []}', b"", b"null", b"[]", b'"a"', halves[0]):
        with pytest.raises(RefusedRequestError):
            rules.fields("/completion", "application/json", wrong)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "let_in"),
    [
        (f"Bearer {KEY}", None, True),
        (f"bearer {KEY}", None, True),
        (None, KEY, True),
        (None, f"Bearer {KEY}", True),
        ("Bearer other", KEY, True),  # clients of Anthropic's API may send both
        (KEY, None, True),
        (f"Basic {KEY}", None, False),
        (f"Bearer {KEY}x", None, False),
        ("Bearer \xe9", None, False),
        ("", "", False),
        (None, None, False),
    ],
)
def test_where_the_key_is_read(authorization: str | None, x_api_key: str | None, let_in: bool) -> None:
    rules = _rules(api_key=KEY)
    if let_in:
        rules.check_key(authorization, x_api_key)
        return
    with pytest.raises(RefusedRequestError, match="Invalid API Key"):
        rules.check_key(authorization, x_api_key)


_TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/models?x=#y", None, 200),
        ("/v1/models/yes?#", None, 200),
        ("/health?#", None, 200),
        ("/v1/models/%ff", None, 404),
        ("/v1/chat/completions", {**_TOOLS, "messages": "abc"}, 400),
        ("/v1/chat/completions", {**_TOOLS, "messages": ["abc"]}, 400),
        ("/v1/chat/completions", {**_TOOLS, "messages": HELLO, "stream": True, "stream_options": "x"}, 200),
        ("/v1/completions", {"prompt": "ab", "echo": True, "n": 2}, 400),
        ("/v1/completions", {"prompt": "ab", "logprobs": -1}, 400),
        ("/v1/completions", {"prompt": "ab", "logprobs": 1 << 40}, 400),
        ("/v1/completions", {"prompt": [[1], ["a"]], "echo": True}, 400),
    ],
)
def test_requests_of_a_wrong_shape_have_an_answer(
    opened: Endpoint, path: str, body: dict[str, Any] | None, status: int
) -> None:
    """Raw, for a client would not send a `#`."""
    content = b"" if body is None else json.dumps(body | {"max_tokens": 4}).encode()
    length = f"Content-Length: {len(content)}"
    request = attacks.head(opened, "GET" if body is None else "POST", path, "Connection: close", length)
    answer = attacks.raw(opened, request + b"\r\n" + content)
    assert attacks.statuses(answer) == [status], answer[:300]


@pytest.mark.network
@pytest.mark.programs
def test_no_depth_of_a_request_breaks_the_front(opened: Endpoint) -> None:
    """Where reading it still succeeds, writing it anew or putting it into a schema need not."""
    for depth in (*range(850, 1000, 10), 3000):
        nested = "[" * depth + "]" * depth
        for more in ({}, _TOOLS):
            body = json.dumps({"messages": HELLO, "max_tokens": 1, **more})[:-1] + f', "x": {nested}}}'
            head = attacks.head(
                opened, "POST", "/v1/chat/completions", f"Content-Length: {len(body)}", "Connection: close"
            )
            status = attacks.statuses(attacks.raw(opened, head + b"\r\n" + body.encode()))
            assert status in ([200], [400]), (depth, status)


@pytest.mark.network
@pytest.mark.programs
def test_who_goes_away_stops_the_work(files: Path, tmp_path: Path) -> None:
    """Also before the first word of the answer, which a waiting client gets all at once."""
    endless = write_tiny_gguf(tmp_path / "endless.gguf", endless=True)
    settings = ServerSettings(endless, "m", 4096, threads=1, parallel=1, control_routes=True)
    with serve_embedded(settings) as endpoint, Client(endpoint) as client:
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                body = {"messages": HELLO, "stream": stream, "max_tokens": -1}
                with httpx.stream(
                    "POST", endpoint.route("/v1/chat/completions"), json=body, timeout=0.2
                ) as answer:
                    if not stream:
                        answer.read()
                    raise httpx.ReadTimeout("enough")
            deadline = time.monotonic() + 10
            while any(one["is_processing"] for one in _slots(endpoint)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert client.health()


def _slots(endpoint: Endpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(endpoint.route("/slots"), trust_env=False).json()
    return found


@pytest.mark.network
def test_a_taken_port_is_said_before_anything_is_loaded(files: Path) -> None:
    from forge.errors import StageError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=f"127.0.0.1:{port} cannot be listened on"):
            with serve_embedded(replace(_settings(files, None, False), port=port)):
                raise AssertionError("it served")
    unknown = replace(_settings(files, KEY, False), host="no host")
    with pytest.raises(StageError, match="no host:0 cannot be listened on: there is no such host"):
        with serve_embedded(unknown):
            raise AssertionError("it served")


@contextlib.contextmanager
def _front_before(
    settings: ServerSettings, post: Callable[[BaseHTTPRequestHandler], None]
) -> Iterator[Endpoint]:
    """The front before a server that answers every POST by `post`."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                post(self)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Answering))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        listener = stack.enter_context(front_server.bound(settings))
        behind = Behind(f"http://127.0.0.1:{server.server_port}")
        port = stack.enter_context(front_server.opened(listener, settings, behind))
        yield Endpoint(f"http://127.0.0.1:{port}", "yes")


@pytest.mark.network
def test_who_takes_nothing_of_his_answer_is_given_up(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's thread is not held by a client that never reads."""
    monkeypatch.setattr(front_rules, "STALLED_SECONDS", 0.5)
    ended = threading.Event()

    def endless(answer: BaseHTTPRequestHandler) -> None:
        try:
            while not ended.is_set():
                answer.wfile.write(b"x" * 65536)
        finally:
            ended.set()

    with _front_before(_settings(files, None, False), endless) as endpoint:
        with attacks.connect(endpoint) as asking:
            asking.sendall(attacks.head(endpoint, "POST", "/tokenize", "Content-Length: 2") + b"\r\n{}")
            try:
                assert ended.wait(15), "its answer is still being written"
            finally:
                ended.set()


@pytest.mark.network
def test_large_bodies_share_a_limit_until_they_are_answered(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while their answer takes its time: a value of brackets takes twenty times its bytes."""
    monkeypatch.setattr(front, "_MOST_BYTES_AT_ONCE", 3 << 20)
    asked, answer = threading.Event(), threading.Event()

    def late(answering: BaseHTTPRequestHandler) -> None:
        asked.set()
        answer.wait(30)
        answering.wfile.write(b"{}")

    with _front_before(_settings(files, None, False), late) as endpoint:
        body = json.dumps({"content": "x" * (2 << 20)}).encode()
        length = f"Content-Length: {len(body)}"
        request = attacks.head(endpoint, "POST", "/tokenize", length, "Connection: close") + b"\r\n" + body
        with attacks.connect(endpoint) as first:
            first.sendall(request)
            assert asked.wait(10)
            assert attacks.statuses(attacks.raw(endpoint, request)) == [503]
            answer.set()
            assert attacks.statuses(first.recv(65536)) == [200]
            while first.recv(65536):
                pass
        assert attacks.statuses(attacks.raw(endpoint, request)) == [200]


@pytest.mark.parametrize(
    ("more", "is_refused"),
    [
        ({"top_logprobs": 5, "max_tokens": 900}, False),
        ({"n_probs": 1 << 20, "n_predict": 1}, False),
        ({"n_probs": 1 << 20}, True),
        ({"n_probs": 1 << 20, "n_predict": 1, "max_tokens": 1, "max_completion_tokens": None}, False),
        ({"n_probs": 1 << 20, "n_predict": -1, "max_tokens": 1}, True),
        ({"n_probs": 1 << 20, "n_predict": 1, "max_tokens": -1}, True),
        ({"n_probs": 1 << 20, "max_tokens": 1, "max_output_tokens": 900}, True),
        ({"n_probs": 1 << 20, "max_tokens": 1, "n_predict": "900"}, True),
        ({"n_probs": 150000.0, "max_tokens": 900}, True),
        ({"n_probs": 150000.0, "max_tokens": 1.0}, False),
        ({"n_probs": 150000 - (1 << 32), "max_tokens": 900}, True),
        ({"n_probs": 1 << 20, "max_tokens": 1, "n": 64}, True),
        ({"n_probs": 1 << 20, "max_tokens": 1, "n_cmpl": 64}, True),
        ({"n_probs": 1 << 20, "max_tokens": 1, "n": 1}, False),
        ({"n_probs": 1 << 20, "max_tokens": 1, "prompt": ["a"] * 64}, True),
        ({"n_probs": 1 << 20, "max_tokens": 1, "prompt": [1, "a", 2]}, False),
        ({"n_probs": 100, "max_tokens": 9, "n": 64}, False),
        ({"n_probs": 100, "max_tokens": 900, "n": 64}, True),
        ({"logprobs": True, "max_tokens": 1.0, "n": 30000}, True),
        ({"n_probs": 10, "max_tokens": 100, "prompt": ["a"] * 400}, False),
        ({"n_probs": 10, "prompt": ["a"] * 400}, True),
        ({"n_probs": 10, "max_tokens": "100", "prompt": ["a"] * 400}, True),
        ({"n_probs": 10, "max_tokens": 1, "n_predict": -1, "prompt": ["a"] * 400}, True),
        ({"top_logprobs": 1 << 20, "logprobs": True, "max_tokens": 2}, True),
        ({"top_logprobs": "1", "logprobs": True, "n": 100}, True),
        ({"top_logprobs": True, "logprobs": True, "n": 1000}, True),
    ],
)
def test_a_whole_vocabulary_at_every_token_is_refused(more: dict[str, Any], is_refused: bool) -> None:
    """Of 150,000 tokens and 2,000 of the answer it is some 30 GB, which the server holds."""
    body = json.dumps({"prompt": "a", **more}).encode()
    if not is_refused:
        assert json.loads(body).items() <= _rules().fields("/completion", None, body).items()
        return
    with pytest.raises(RefusedRequestError, match=r"at most (100|500000) log-probabilities") as refused:
        _rules().fields("/completion", None, body)
    assert refused.value.status == 400


@pytest.mark.parametrize("context", [512, 32768, 131072])
@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 1, "n": 8},
        {"logprobs": True, "top_logprobs": 0},
    ],
)
def test_the_usual_log_probabilities_are_never_too_many(context: int, more: dict[str, Any]) -> None:
    body = json.dumps({"messages": [], **more}).encode()
    rules = Rules.of(ServerSettings(Path("m"), "m", context))
    assert more.items() <= rules.fields("/v1/chat/completions", None, body).items()
    with pytest.raises(RefusedRequestError, match="log-probabilities in an answer"):
        rules.fields("/v1/chat/completions", None, json.dumps({"logprobs": True, "n": 4000}).encode())


def _object(optional: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(optional)}}


@pytest.mark.parametrize("number", [-2, 8])
def test_a_host_without_an_address_is_said(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """-2 on Linux; 8 on macOS, which is `exec format error` among the other errors."""

    def create_server(*arguments: object, **options: object) -> None:
        raise socket.gaierror(number, "nodename nor servname provided, or not known")

    monkeypatch.setattr(socket, "create_server", create_server)
    with pytest.raises(StageError, match=r"nowhere:0 cannot be listened on: there is no such host$"):
        with front_server.bound(ServerSettings(Path("m"), "m", 512, host="nowhere")):
            raise AssertionError("it listened")


_CHAIN = {f"a{number}": {"$ref": f"#/$defs/a{number + 1}"} for number in range(1200)}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"repeat_last_n": (1 << 31) - 1, "repeat_penalty": 1.1}, "repeat_last_n: at most"),
        ({"dry_penalty_last_n": 1e9, "dry_multiplier": 0.5}, "dry_penalty_last_n: at most"),
        ({"grammar": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000}, "a grammar of at most"),
        ({"grammar": "".join(f"r{number} ::= r{number + 1}\n" for number in range(5000))}, "a grammar of at"),
        ({"grammar_triggers": [{"type": 2, "value": "(((.*)*)*)*!!q"}]}, "llama-server's own"),
        ({"json_schema": {"$defs": _CHAIN, "$ref": "#/$defs/a0"}}, "references in schemas"),
        ({"grammar": "root ::= " + '"a" | ' * 5000 + '"b"'}, "a grammar of at most"),
        ({"json_schema": {"enum": [*range(5000)]}}, "at most 4096 alternatives"),
        ({"tools": [{"function": {"parameters": {"oneOf": [{"enum": [1, 2]}] * 2000}}}]}, "alternatives"),
        ({"json_schema": {"enum": [*range(4000)]}}, ""),
        ({"json_schema": _object(257)}, "at most 256 properties"),
        ({"tools": [{"function": {"parameters": _object(200)}}] * 30}, "at most 256 properties"),
        (
            {"response_format": {"schema": {"allOf": [_object(100), _object(100)] * 2}}},
            "at most 256 properties",
        ),
        ({"json_schema": {"allOf": [{"$ref": "#/a"}] * 9, "a": _object(50)}}, "at most 256 properties"),
        ({"json_schema": _object(256), "tools": [{"function": {"parameters": _object(20)}}] * 100}, ""),
        ({"json_schema": {**_object(2000), "required": [f"p{number}" for number in range(1900)]}}, ""),
        ({"prompt": ["a"] * 2049}, "at most 2048 prompts"),
        ({"prompt": ["a"] * 2000, "stop": ["b" * 65536]}, "too much beside the prompts"),
        ({"prompt": ["a" * 1000] * 2000, "stop": ["b"]}, ""),
        ({"prompt": [1] * 3000, "repeat_last_n": 131072, "grammar": 'root ::= ("a" | "b")*'}, ""),
    ],
)
def test_what_would_end_or_stop_the_server_is_refused(more: dict[str, Any], reason: str) -> None:
    body = json.dumps({"prompt": "a", **more}).encode()
    if not reason:
        assert _rules().fields("/completion", None, body)
        return
    for path in ("/completion", "/apply-template"):
        with pytest.raises(RefusedRequestError, match=reason):
            _rules().fields(path, None, body)


_IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"functions": [{"name": "f"}]}, "use tools"),
        ({"modalities": ["text", "audio"]}, "answers in text"),
        ({"modalities": ["text"], "functions": None, "background": False, "suffix": ""}, ""),
        ({"web_search_options": {"search_context_size": "low"}}, "searches nothing"),
        ({"previous_response_id": "resp_1"}, "send all of the turns"),
        ({"background": True}, "answers at once"),
        ({"suffix": "b"}, "/infill"),
        ({"best_of": 3}, "ask for n"),
        ({"best_of": 3, "n": 3}, ""),
        ({"tool_choice": "required"}, "no tools to choose from"),
        ({"tool_choice": {"type": "any"}}, "no tools to choose from"),
        ({"tool_choice": {"type": "auto"}}, ""),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, _IMAGE]}]},
            "not image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "not input_file",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [_IMAGE]}]}]},
            "image",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "not document"),
        ({"messages": [{"role": "user", "content": _IMAGE}]}, "not image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "profile", "text": "a"}]}]}, ""),
        ({"input": ["image", 1], "messages": "file", "store": True, "metadata": {"a": "b"}}, ""),
    ],
)
def test_what_would_be_left_out_in_silence_is_refused(more: dict[str, Any], reason: str) -> None:
    body = json.dumps(more).encode()
    if not reason:
        assert _rules().fields("/v1/chat/completions", None, body)
        return
    with pytest.raises(RefusedRequestError, match=reason) as refused:
        _rules().fields("/v1/chat/completions", None, body)
    assert refused.value.status == 400


@pytest.mark.network
@pytest.mark.programs
def test_the_longest_of_several_lengths_may_be_the_one_that_counts(opened: Endpoint) -> None:
    """The real server takes `n_predict` first; a whole vocabulary comes of a single token only."""
    few: list[tuple[dict[str, Any], int]] = [
        ({"max_tokens": 1, "n_predict": 3}, 3),
        ({"max_tokens": 3, "n_predict": 1}, 1),
        ({"max_tokens": 1, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 1, "n_predict": None}, 1),
        ({"max_tokens": 1, "n_predict": 3.0}, 3),
    ]
    asked = {"prompt": "a", "ignore_eos": True, "temperature": 0}
    with httpx.Client(base_url=opened.url, trust_env=False) as http:
        for lengths, count in few:
            answer = http.post("/completion", json={**asked, **lengths, "n_probs": 2.0}).json()
            assert len(answer["completion_probabilities"]) == count, lengths
            whole = http.post("/completion", json={**asked, **lengths, "n_probs": 150000.0})
            assert whole.status_code == (200 if set(lengths.values()) <= {1, None} else 400), lengths
        several = http.post("/completion", json={**asked, "max_tokens": 1, "n": 2, "n_probs": 2}).json()
        assert len(several) == 2
        several = http.post("/completion", json={**asked, "max_tokens": 1, "n": 2, "n_probs": 150000})
        assert several.status_code == 400


def test_a_number_without_end_is_named() -> None:
    for number in ("1e999", "-1e999", "Infinity", "NaN"):
        with pytest.raises(RefusedRequestError, match=f"{number} is no number"):
            _rules().fields("/completion", None, b'{"temperature": %s}' % number.encode())
