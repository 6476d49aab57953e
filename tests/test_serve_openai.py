"""What OpenAI's clients ask: their own library against a real server, and the shapes that are translated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from forge.serve import front_openai as translated
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.front_rules import RefusedRequestError
from forge.serve.runtime import ServerSettings
from tests.servers import KEY, write_adapter
from tests.tiny_gguf import REPLY, write_tiny_gguf

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "time"}}
ASKED = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    place = tmp_path_factory.mktemp("openai")
    model = write_tiny_gguf(place / "tiny.gguf")
    yes = write_adapter(place / "Y.gguf", says="Y")
    settings = ServerSettings(
        model, "tiny", 1024, threads=1, parallel=2, api_key=KEY, adapters={"yes": yes}, embeddings=True
    )
    with serve_embedded(settings) as endpoint:
        yield endpoint


@pytest.fixture
def client(served: Endpoint) -> Iterator[Any]:
    """OpenAI's own, without its types: they know one model family's arguments."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


pytestmark = [pytest.mark.network, pytest.mark.programs]


def test_models_chat_and_errors_as_the_library_reads_them(client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["tiny", "yes"]
    assert client.models.retrieve("yes").id == "yes"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4o", messages=ASKED)
    assert refused.value.type == "not_found_error"
    assert str(refused.value.request_id).startswith("req_")
    for model, answer in {"tiny": REPLY, "yes": "Y"}.items():
        reply = client.chat.completions.create(model=model, messages=ASKED, temperature=0, logprobs=True)
        assert reply.choices[0].message.content == answer
        assert reply.choices[0].logprobs.content[0].logprob <= 0
    stream = client.chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *events, last = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in events if one.choices) == REPLY
    assert last.usage.completion_tokens > 0
    with openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_a_tool_that_must_be_called_is_called(client: Any) -> None:
    """As LangChain's function calling and Instructor's tool mode ask."""
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        asked = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "tool_choice": choice, "temperature": 0}
        reply = client.chat.completions.create(**asked)
        [call] = reply.choices[0].message.tool_calls
        assert (reply.choices[0].finish_reason, call.function.name) == ("tool_calls", "weather")
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        pieces = list(client.chat.completions.create(**asked, stream=True))
        [piece] = [one.choices[0].delta.tool_calls for one in pieces if one.choices[0].delta.tool_calls]
        assert json.loads(piece[0].function.arguments)["city"] in ("Paris", "Rome")
        assert pieces[-1].choices[0].finish_reason == "tool_calls"
    with pytest.raises(openai.BadRequestError, match="no tool 'time'"):
        client.chat.completions.create(
            model="tiny", messages=ASKED, tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "time"}},
        )  # fmt: skip


def test_log_probabilities_of_the_prompt_are_the_models_own(client: Any, served: Endpoint) -> None:
    """As lm-eval asks: what the model has said is as likely when it is the prompt."""
    key = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=key, trust_env=False) as http:
        ids = http.post(
            "/tokenize", json={"content": "<|im_start|>assistant\n", "parse_special": True}
        ).json()
        body = {"prompt": ids["tokens"], "n_predict": 3, "n_probs": 1, "temperature": 0, "ignore_eos": True}
        said = http.post("/completion", json=body).json()["completion_probabilities"]
    prompt = [*ids["tokens"], *(one["id"] for one in said)]
    asked: dict[str, Any] = {
        "prompt": [prompt],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    }
    [choice] = client.completions.create(model="tiny", **asked).choices
    told = choice.logprobs
    assert told.token_logprobs[0] is None
    # The last is the one token that follows.
    assert told.token_logprobs[-4:-1] == pytest.approx([one["logprob"] for one in said], abs=0.01)
    assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == len(prompt) + 1
    assert choice.text == "".join(told.tokens)
    [adapted] = client.completions.create(model="yes", **asked).choices
    assert adapted.logprobs.token_logprobs != told.token_logprobs


def test_completions_echo_and_count_as_openais_do(client: Any) -> None:
    plain = client.completions.create(model="tiny", prompt="abc", logprobs=2, max_tokens=2, temperature=0)
    assert len(plain.choices[0].logprobs.tokens) == 2
    several = client.completions.create(
        model="tiny", prompt=[[69, 70], [69]], echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    assert [one.text for one in several.choices] == ["ab", "a"]
    assert [len(one.logprobs.tokens) for one in several.choices] == [2, 1]
    echoed = client.completions.create(model="tiny", prompt="abc", echo=True, max_tokens=1)
    assert echoed.choices[0].text[:3] == "abc"
    with pytest.raises(openai.BadRequestError, match="echo does not stream"):
        client.completions.create(model="tiny", prompt="abc", echo=True, stream=True)


def test_embeddings_responses_and_messages(client: Any, served: Endpoint) -> None:
    found = client.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
    assert len(found.data) == 2 and len(found.data[0].embedding) > 8
    assert client.responses.create(model="tiny", input="Hello", temperature=0).output_text == REPLY
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "a", "strict": True, "schema": schema}
    held = client.responses.create(model="tiny", input="Hello", text={"format": form}, max_output_tokens=128)
    assert json.loads(held.output_text) == {"a": 7}
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    with pytest.raises(openai.BadRequestError, match="the template knows no tools"):
        client.responses.create(model="tiny", input="Hello", tools=[tool], tool_choice="required")
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 32, "temperature": 0}
    message = httpx.post(
        served.route("/v1/messages"), json=body, headers={"X-Api-Key": KEY}, trust_env=False
    ).json()
    assert message["content"][0]["text"] == REPLY


def test_without_embeddings_it_says_so(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    with serve_embedded(ServerSettings(model, "m", 512, threads=1)) as endpoint:
        answer = httpx.post(endpoint.route("/v1/embeddings"), json={"input": "x"}, trust_env=False)
    assert (answer.status_code, "--embeddings" in answer.text) == (501, True)


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [7], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {}},
        {"tools": [TOOL], "tool_choice": "required", "messages": 7},
        {"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
    ],
)
def test_tools_that_are_none_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RefusedRequestError):
        translated.with_forced_tool({"messages": ASKED, **more})


def test_tools_are_told_in_the_system_message_and_held_by_a_schema() -> None:
    system = {"role": "system", "content": "Be brief."}
    asked = {"messages": [system, *ASKED], "tools": [TOOL, OTHER], "tool_choice": "required", "stream": True}
    fields = translated.with_forced_tool(asked)
    assert "tools" not in fields and "stream" not in fields
    told = fields["messages"][0]["content"]
    assert told.startswith("Be brief.") and '"weather"' in told and '"time"' in told
    calls = fields["response_format"]["json_schema"]["schema"]["anyOf"]
    assert [one["properties"]["name"]["const"] for one in calls] == ["weather", "time"]
    assert system == {"role": "system", "content": "Be brief."}, "the request itself is as it was"


def test_a_call_that_was_cut_is_no_call() -> None:
    cut = {"choices": [{"message": {"content": '{"name": "wea'}, "finish_reason": "length"}]}
    assert translated.as_tool_calls(cut)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [1, "a"], {}])
def test_echo_of_no_prompt_is_refused(prompt: object) -> None:
    async def ask(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        raise AssertionError("it asked")

    with pytest.raises(RefusedRequestError):
        asyncio.run(translated.completion({"prompt": prompt, "echo": True}, ask))
