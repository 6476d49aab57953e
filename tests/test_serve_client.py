"""The client, held to the real llama-server and to the stand-in by the same tests."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forge.errors import ForgeError, MissingToolError, RecipeError, StageError
from forge.serve.client import Client, find
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.serve.wire import BusyError, RefusedError, Reply, Sampling, UnreachableError
from tests.stand_in_server import Failure, StandIn
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]

KEY = "sesame"
QUESTION = [{"role": "user", "content": REPLY.lower()}]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with serve_embedded(ServerSettings(model, "tiny", 512, threads=1, parallel=2, api_key=KEY)) as endpoint:
        yield endpoint


@pytest.fixture(params=["embedded", "stand-in"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    if request.param == "embedded":
        yield request.getfixturevalue("embedded")
    else:
        with StandIn(api_key=KEY) as server:
            yield server.endpoint


def _same(text: str) -> str:
    return text.strip().casefold()


def _drain(endpoint: Endpoint, sampling: Sampling | None = None) -> tuple[list[str], Reply]:
    pieces: list[str] = []
    with Client(endpoint) as client:
        answer = client.stream_chat(QUESTION, sampling)
        while True:
            try:
                pieces.append(next(answer))
            except StopIteration as end:
                return pieces, end.value


def test_answer_is_whole_and_counted(endpoint: Endpoint) -> None:
    with Client(endpoint) as client:
        reply = client.chat(QUESTION)
    assert _same(reply.text) == _same(REPLY)
    assert reply.finish_reason == "stop"
    assert reply.prompt_tokens > 10
    assert reply.completion_tokens in (6, 7)


def test_answer_that_is_cut_says_so(endpoint: Endpoint) -> None:
    with Client(endpoint) as client:
        reply = client.chat(QUESTION, Sampling(max_tokens=2))
    assert (_same(reply.text), reply.finish_reason, reply.completion_tokens) == ("in this", "length", 2)


def test_stream_gives_the_same_reply_in_pieces(endpoint: Endpoint) -> None:
    with Client(endpoint) as client:
        whole = client.chat(QUESTION)
    pieces, reply = _drain(endpoint)
    assert reply == whole
    assert "".join(pieces) == whole.text
    assert len(pieces) >= 6
    assert _drain(endpoint, Sampling(max_tokens=2))[1].finish_reason == "length"


def test_url_with_v1_is_the_same_server(endpoint: Endpoint) -> None:
    assert find(endpoint.url + "/v1", api_key=KEY).model == endpoint.model
    with Client(endpoint) as client:
        assert client.health()


def test_wrong_key_is_refused_and_names_the_flag(endpoint: Endpoint) -> None:
    for key in (None, "wrong"):
        with Client(Endpoint(endpoint.url, endpoint.model, key)) as client:
            with pytest.raises(RefusedError) as caught:
                client.chat(QUESTION)
        assert caught.value.status == 401
        assert not caught.value.about_the_request
        assert caught.value.hint == "give the server's key with --api-key-file"


def test_unknown_route_is_refused(endpoint: Endpoint) -> None:
    with Client(Endpoint(endpoint.url + "/elsewhere", endpoint.model, KEY)) as client:
        with pytest.raises(RefusedError, match="404") as caught:
            client.model_names()
    assert not caught.value.about_the_request


def test_own_routes_of_llama_server(embedded: Endpoint) -> None:
    prompt = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    with Client(embedded) as client:
        assert client.apply_template([{"role": "user", "content": "ab"}]) == prompt
        a = 4 + ord("a") - 32
        assert client.tokenize("ab<|im_end|>\n") == [a, a + 1, 2, 3]
        assert client.properties()["total_slots"] == 2


def test_pitfall_14_prompt_beyond_the_context_is_refused_with_both_sizes(embedded: Endpoint) -> None:
    """what_goes_wrong 14: never cut without a word."""
    with Client(embedded) as client:
        with pytest.raises(RefusedError) as caught:
            client.chat([{"role": "user", "content": "x" * 600}])
    assert caught.value.message == "the prompt is 619 tokens long and the server's context holds 512"
    assert caught.value.hint == "shorten it, or serve with a larger --context"
    assert caught.value.about_the_request


def test_stop_text_ends_the_answer(embedded: Endpoint) -> None:
    with Client(embedded) as client:
        reply = client.chat(QUESTION, Sampling(stop=(" bacon",)))
    assert (reply.text, reply.finish_reason) == ("In this sandwich,", "stop")


def test_pitfall_55_nothing_serves() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(Endpoint(url, "m")) as client:
            with pytest.raises(UnreachableError, match="does not answer") as caught:
                client.chat(QUESTION)
    assert isinstance(caught.value, MissingToolError)
    assert caught.value.hint == "is it serving? start it with: forge serve MODEL"


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://127.0.0.1", "http://[::"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(RecipeError, match="is not the URL of a server"):
        with Client(Endpoint(url, "m")) as client:
            client.health()


@pytest.mark.parametrize("ask", [Client.chat, lambda client, messages: list(client.stream_chat(messages))])
@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (Failure(429, "slow down", (("Retry-After", "7"),)), BusyError, "answered 429: slow down"),
        (Failure(503, "Loading model"), BusyError, "answered 503: Loading model"),
        (Failure(500, "oh"), BusyError, "answered 500: oh"),
        (Failure(502, body=b"<html>gateway</html>"), BusyError, "answered 502: no reason given"),
        (Failure(404, body=b'{"error": "model not found"}'), RefusedError, "answered 404: model not found"),
        (Failure(501, "off"), RefusedError, "answered 501: off"),
        (Failure(302, body=b""), RefusedError, "answered 302: no reason given"),
        (Failure(0), UnreachableError, "broke off its answer"),
        (Failure(-1), UnreachableError, "broke off its answer"),
    ],
)
def test_failures_become_errors_of_forge(
    failure: Failure, kind: type[ForgeError], message: str, ask: Callable[[Client, object], object]
) -> None:
    with StandIn(failures=[failure]) as server, Client(server.endpoint) as client:
        with pytest.raises(kind, match=message) as caught:
            ask(client, QUESTION)
        assert ask(client, QUESTION)
    if isinstance(caught.value, BusyError):
        assert caught.value.retry_after == (7.0 if failure.status == 429 else None)


@pytest.mark.parametrize(
    "body",
    [b"<html>hello</html>", b"[1]", b"", b"{}"],
)
def test_success_that_is_no_chat_completion(body: bytes) -> None:
    with StandIn(failures=[Failure(200, body=body)]) as server, Client(server.endpoint) as client:
        with pytest.raises(StageError, match="answered with something that is"):
            client.chat(QUESTION)


@pytest.mark.parametrize("body", [b'{"choices": []}', b'{"choices": [{"message": "x"}]}'])
def test_success_without_a_message(body: bytes) -> None:
    with StandIn(failures=[Failure(200, body=body)]) as server, Client(server.endpoint) as client:
        with pytest.raises(BusyError, match="answered without a message: "):
            client.chat(QUESTION)


def test_a_redirection_says_where_to() -> None:
    place = "https://elsewhere.example/v1"
    failure = Failure(307, headers=(("Location", place),), body=b"")
    with StandIn(failures=[failure]) as server, Client(server.endpoint) as client:
        with pytest.raises(RefusedError, match="answered 307") as caught:
            client.chat(QUESTION)
    assert caught.value.hint == f"it redirects to {place}: if that is the server, give its URL"


def test_an_answer_that_is_not_packed_as_it_says() -> None:
    failure = Failure(200, headers=(("Content-Encoding", "gzip"),), body=b"{}")
    with StandIn(failures=[failure]) as server, Client(server.endpoint) as client:
        with pytest.raises(StageError, match="not compressed as it says"):
            client.chat(QUESTION)


def test_line_separators_of_unicode_do_not_break_a_stream() -> None:
    with StandIn(suffix="a\u2028b\x85c") as server, Client(server.endpoint) as client:
        assert "".join(client.stream_chat(QUESTION)).endswith("a\u2028b\x85c")


def test_proxies_of_the_environment_are_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with StandIn() as server, Client(server.endpoint) as client:
        assert client.health()


def test_api_key_is_not_shown(tmp_path: Path) -> None:
    assert KEY not in repr(Endpoint("http://h", "m", KEY))
    assert KEY not in repr(ServerSettings(tmp_path, "m", 512, api_key=KEY))
