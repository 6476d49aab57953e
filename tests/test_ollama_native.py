"""What Ollama's OpenAI-compatible routes drop and its own do not, for `forge generate` and `forge chat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from forge.cli.main import run_command
from forge.errors import ForgeError
from forge.serve.client import Client, find
from forge.serve.endpoint import Endpoint
from forge.serve.wire import RefusedError, Sampling
from forge.tools.ollama import Ollama
from tests.fake_ollama import FakeOllama
from tests.ollama_servers import make
from tests.tiny_gguf import REPLY

pytestmark = [pytest.mark.network, pytest.mark.programs]
LONG = [
    {"role": "user", "content": "first " * 12},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "word " * 12},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "And now?"},
]


@pytest.fixture(scope="module")
def server(pinned_gguf: Path) -> Any:
    with FakeOllama() as fake, Ollama(fake.url) as client:
        make(client, "yoda", pinned_gguf, parameters={"num_ctx": 128, "stop": ["<|im_end|>"]})
        make(client, "large", pinned_gguf, parameters={"num_ctx": 512, "stop": ["<|im_end|>"]})
        yield fake


def answers(url: str, rows: list[dict[str, Any]], tmp_path: Path, *options: str) -> dict[Any, dict[str, Any]]:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.unlink(missing_ok=True)
    run_command(["generate", str(prompts), str(out), "--endpoint", url, *options])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    return {row.get("custom_id", row.get("id")): row for row in written}


def ask_v1(url: str, route: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "large", "max_tokens": 24, **body}
    found: dict[str, Any] = httpx.post(f"{url}/v1/{route}", json=asked, trust_env=False, timeout=60).json()
    return found


def test_a_raw_prompt_goes_to_the_model_as_it_is(server: FakeOllama, tmp_path: Path) -> None:
    """U, R3: `/v1/completions` puts the chat template around it; three characters are three tokens."""
    v1 = ask_v1(server.url, "completions", prompt="abc", temperature=0)
    assert v1["usage"]["prompt_tokens"] > 20
    for url in (server.url, f"{server.url}/v1", f"{server.url}/v1/chat/completions"):
        rows = [{"id": 1, "prompt": "abc"}]
        row = answers(url, rows, tmp_path, "--raw", "--model", "large", "--max-tokens", "4")[1]
        assert row["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}


def test_top_k_and_min_p_are_heard(server: FakeOllama, tmp_path: Path) -> None:
    """`/v1` ignores both without a word: at this temperature the answer is then noise."""
    user = [{"role": "user", "content": "Hello?"}]
    v1 = ask_v1(server.url, "chat/completions", messages=user, temperature=1e6, top_p=1, top_k=1)
    assert v1["choices"][0]["message"]["content"] != REPLY
    hot = ("--model", "large", "--temperature", "1000000", "--top-p", "1", "--max-tokens", "24")
    rows = [{"id": 1, "prompt": "Hello?"}, {"id": 2, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]}]}]  # fmt: skip
    for option in (("--top-k", "1"), ("--min-p", "1")):
        found = answers(server.url, rows, tmp_path, *hot, *option)
        assert [found[1]["text"], found[2]["text"]] == [REPLY, REPLY]
        assert found[1]["usage"] == found[2]["usage"] and found[1]["finish_reason"] == "stop"
    assert answers(server.url, rows, tmp_path, *hot)[1]["text"] != REPLY


@pytest.mark.parametrize("hears_truncate", [False, True])
def test_turns_that_would_be_dropped_are_an_error(
    server: FakeOllama, tmp_path: Path, hears_truncate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent wrong 14: a conversation longer than num_ctx, as rows of both kinds; others go on."""
    monkeypatch.setattr(server, "hears_truncate", hears_truncate)
    body = {"model": "yoda", "messages": LONG}
    rows = [
        {"id": 1, "messages": LONG},
        {"id": 2, "messages": LONG[-1:]},
        {"id": 3, "messages": LONG[2:]},
        {"id": 4, "messages": LONG[-2:]},
    ]
    found = answers(server.url, rows, tmp_path, "--model", "yoda", "--max-tokens", "8")
    assert "context" in found[1]["error"]
    assert [len(found[number]["text"]) > 0 for number in (2, 3, 4)] == [True] * 3
    batch = [{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}]
    if not hears_truncate:
        failed = answers(server.url, batch, tmp_path, "--model", "yoda")["a"]["response"]
        assert failed["status_code"] == 400 and "leaves out message 1" in str(failed["body"])
        assert "leaves out message 1" in found[1]["error"]


def test_what_v1_would_drop_is_refused(server: FakeOllama, tmp_path: Path) -> None:
    """A row that only the OpenAI-compatible routes can take."""
    user = [{"role": "user", "content": "Hello?"}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    batch = {"method": "POST", "url": "/v1/chat/completions", "body": {"messages": user, "min_p": 0.5}}
    raw = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "abc"}}
    rows: list[dict[str, Any]] = [
        {"id": 1, "messages": image},
        {"custom_id": "a", **batch},
        {"custom_id": "b", **raw},
    ]
    found = answers(server.url, rows, tmp_path, "--model", "large", "--top-k", "3")
    assert "ignore top_k" in found[1]["error"]
    assert "ignore min_p" in str(found["a"]["error"])
    assert "puts the chat template around" in str(found["b"]["error"])


def test_a_chat_that_outgrows_its_context_says_so(server: FakeOllama) -> None:
    """Silent wrong 14, in `forge chat`."""
    endpoint = find(server.url, model="yoda")
    assert endpoint.is_ollama
    with Client(endpoint) as client:
        assert "".join(client.stream_chat(LONG[-1:], Sampling(max_tokens=24))) == REPLY
        with pytest.raises(RefusedError, match="leaves out message 1"):
            list(client.stream_chat(LONG))
        with pytest.raises(RefusedError, match="leaves out message 1"):
            client.chat(LONG)


def test_a_server_that_only_imitates_it_is_not_taken_for_one(tmp_path: Path) -> None:
    """KoboldCpp and others answer /api/version too."""
    with FakeOllama() as fake:
        fake.troubles["/"] = ("error", 404, "no page")
        with Client(Endpoint(fake.url, "x")) as client:
            assert not client.is_ollama()
        fake.troubles = {"/api/version": ("error", 404, "no page")}
        with Client(Endpoint(fake.url, "x")) as client:
            assert not client.is_ollama()
        with pytest.raises(ForgeError, match="serves no model"):
            find(fake.url)
