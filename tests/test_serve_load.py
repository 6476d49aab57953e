"""Load and faults on the real server: thousands of requests, servers that die, clients that misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from forge.serve.client import Client
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from tests.servers import HELLO, servers_of, write_adapter
from tests.shipping import Workshop, wait_for
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]
ROWS = 5000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module", params=["alone", "behind the adapters' proxy"])
def served(model: Path, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """A server that must be alive and well after each test."""
    settings = ServerSettings(model, "tiny", 512, threads=1, parallel=2)
    if request.param == "alone":
        with serve_embedded(settings) as endpoint:
            yield endpoint
    else:
        adapter = write_adapter(model.with_name("yes.gguf"), says="Y")
        with serve_embedded(replace(settings, adapters={"yes": adapter})) as endpoint:
            yield endpoint


@pytest.fixture(autouse=True)
def _still_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        endpoint = request.getfixturevalue("served")
        with Client(endpoint) as client:
            assert client.chat(HELLO).text == REPLY


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class _Mortal:
    """`forge serve` on one port, killed and started again."""

    def __init__(self, place: Workshop, model: Path) -> None:
        self.place, self.model, self.port = place, model, _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        flags = ("--port", str(self.port), "--parallel", "4", "--threads", "1", "--json")
        self.stack = self.place.start("serve", str(self.model), *flags)
        self.child = self.stack.__enter__()
        json.loads(next(self.child.lines()))

    def kill(self) -> None:
        """SIGKILL to the server alone, then to all."""
        (server,) = servers_of(self.child.pid)
        server.kill()
        self.child.kill()
        self.stack.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak_every_id_once_though_the_server_dies_three_times_and_the_client_once(
    model: Path, tmp_path: Path
) -> None:
    """U: 5,000 requests; the server is killed and restarted three times, forge generate killed once."""
    (tmp_path / "server").mkdir()
    place = Workshop(tmp_path, tmp_path / "home")
    server = _Mortal(Workshop(tmp_path / "server", tmp_path / "home"), model)
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"id": n, "prompt": f"row {n}"}) + "\n" for n in range(ROWS)))
    arguments = ("generate", str(prompts), str(out), "--endpoint", server.url, "--json")

    def lines() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    try:
        with place.start(*arguments) as child:
            wait_for("answers", lambda: lines() > 300, child)
            os.kill(child.pid, 9)
        with place.start(*arguments) as child:
            for share in (0.2, 0.5, 0.8):
                wait_for("answers", lambda share=share: lines() > ROWS * share, child, 600)  # type: ignore[misc]
                server.kill()
                server.start()
            fields = json.loads(list(child.lines())[-1])
            assert child.wait(60) == 0
    finally:
        server.kill()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list(range(ROWS))
    assert {(row["text"], row["finish_reason"]) for row in rows} == {(REPLY, "stop")}
    assert fields["written"] + fields["skipped"] == ROWS
    assert fields["skipped"] >= 300
    assert fields["failed"] == 0


def _malformed(number: int) -> tuple[str, bytes]:
    """A request that is wrong in one of many ways, the same for the same number."""
    draw = random.Random(number)
    good = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    text = json.dumps(good).encode()
    wrong: list[Callable[[], bytes]] = [
        lambda: text[: draw.randrange(1, len(text))],
        lambda: draw.randbytes(draw.randrange(1, 200)),
        lambda: json.dumps({**good, "messages": draw.choice([None, 7, "x", [7], {}])}).encode(),
        lambda: json.dumps({**good, "messages": [{"role": draw.choice([None, 7, []])}]}).encode(),
        lambda: json.dumps({**good, "grammar": draw.choice(["root ::= (", "x", "root ::= y"])}).encode(),
        lambda: json.dumps({**good, "tools": draw.choice([7, "x", [{}]])}).encode(),
        lambda: json.dumps({"model": draw.choice([7, None, [], {}]), "messages": 7}).encode(),
        lambda: b"[" * 50_000,
        lambda: b"",
    ]
    return "/v1/chat/completions", draw.choice(wrong)()


@pytest.mark.slow
def test_200_malformed_requests_get_errors_in_openais_shape(served: Endpoint) -> None:
    seen: set[int] = set()
    with httpx.Client(base_url=served.url, trust_env=False, timeout=60) as http:
        for number in range(200):
            path, body = _malformed(number)
            answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
            seen.add(answer.status_code)
            assert answer.status_code in (400, 404, 415, 500), (number, body[:80], answer.text[:200])
            error = answer.json()["error"]
            assert isinstance(error["message"], str)
            assert error["message"]
            assert isinstance(error["type"], str)
    assert 400 in seen


def test_oversized_prompts_are_refused_with_size_and_limit(served: Endpoint) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 10_000}]}
    answer = httpx.post(served.route("/v1/chat/completions"), json=body, trust_env=False)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (10_019, 512)


@pytest.mark.slow
def test_slow_clients_and_dropped_connections_hold_up_nobody(served: Endpoint) -> None:
    """More slow and vanished clients than there are slots; an honest one is answered all the same."""
    address = urlsplit(served.url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "stream": True}).encode()
    with contextlib.ExitStack() as crawling:
        for number in range(100):
            one = socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10)
            whole = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            one.sendall(whole if number % 2 and number < 50 else whole[: 20 + number])
            if number < 30:
                one.close()
            else:
                crawling.enter_context(one)  # some never read their answer, most never end their request
        with Client(served) as client:
            begun = time.monotonic()
            assert client.chat(HELLO).text == REPLY
            assert time.monotonic() - begun < 20


def test_many_threads_of_clients_get_what_each_asked_for(served: Endpoint) -> None:
    sizes: list[tuple[int, int]] = []

    def ask(size: int) -> None:
        with Client(served) as client:
            sizes.extend(
                (size, client.chat([{"role": "user", "content": "y" * size}]).prompt_tokens) for _ in range(5)
            )

    threads = [threading.Thread(target=ask, args=(size,)) for size in range(10, 26)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(sizes) == 80
    assert {tokens - size for size, tokens in sizes} == {19}


def test_a_command_that_generates_dies_alone(served: Endpoint, tmp_path: Path) -> None:
    """Ctrl-C of forge generate: exit 130, what was answered is kept, and the server serves on."""
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"id": n, "prompt": "a" * 99}) + "\n" for n in range(3000)))
    place = Workshop(tmp_path, tmp_path / "home")
    arguments = ("generate", str(prompts), str(out), "--endpoint", served.url, "--json")
    with place.start(*arguments) as child:
        wait_for("answers", lambda: out.exists() and out.read_bytes().count(b"\n") > 20, child)
        child.terminate()
        error = json.loads(list(child.lines())[-1])["error"]
        assert child.wait(60) == 130
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in kept}) == len(kept) > 20
    assert "rows written" in error["message"]
