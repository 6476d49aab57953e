"""Smoke queries and the terminal conversation, against live servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forge.errors import RecipeError
from forge.serve.chat import HELP, converse
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.queries import Answer, Call, Query
from forge.serve.runtime import ServerSettings
from forge.serve.smoke import run_smoke
from forge.serve.wire import RefusedError, Sampling
from tests.stand_in_server import Failure, StandIn
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with serve_embedded(ServerSettings(model, "tiny", 512, threads=1)) as served:
        yield served


def _query(text: str, expect: str | None = None, max_tokens: int = 64) -> Query:
    system = {"role": "system", "content": "Yoda you are."}
    return Query((system, {"role": "user", "content": text}), expect, max_tokens)


def test_answers_are_held_against_their_patterns(endpoint: Endpoint) -> None:
    """I2: the probe prompt, its answer, and whether it is what was expected."""
    found, missed, cut, free = "(?i)^in THIS sandwich", "^Bacon", "^In", None
    answers = run_smoke(
        endpoint,
        [
            _query("a", found),
            _query("b", missed),
            _query("c", cut, max_tokens=2),
            _query("d", free, max_tokens=2),
        ],
    )
    assert answers == [
        Answer("a", REPLY, True, "stop", found),
        Answer("b", REPLY, False, "stop", missed),
        Answer("c", "In this", False, "length", cut),
        Answer("d", "In this", True, "length", free),
    ]


def test_blank_answer_is_not_ok() -> None:
    with StandIn() as server:
        (answer,) = run_smoke(server.endpoint, [Query(({"role": "user", "content": "  "},))])
    assert not answer.ok


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("name", "arguments", "ok"),
    [
        ("weather", '{"city": "Rome"}', True),
        ("weather", '{"city": "Oslo"}', False),
        ("weather", "city: Rome", False),
        ("news", '{"city": "Rome"}', False),
    ],
)
def test_a_call_of_a_tool_is_expected(name: str, arguments: str, ok: bool) -> None:
    """The call's name and JSON arguments are held against the query's."""
    function = {"name": name, "arguments": arguments}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}
    body = {
        "choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    wanted = Call("weather", {"city": "Rome"})
    query = Query(({"role": "user", "content": "How is it in Rome?"},), None, 64, (WEATHER,), wanted)
    with StandIn(failures=[Failure(200, body=json.dumps(body).encode())]) as server:
        (answer,) = run_smoke(server.endpoint, [query])
    assert server.asked[0]["tools"] == [WEATHER]
    assert (answer.ok, json.loads(answer.answer)) == (ok, function)
    assert answer.expect == 'a call of weather with {"city": "Rome"}'


def test_words_are_no_call() -> None:
    wanted = Call("weather")
    with StandIn() as server:
        (answer,) = run_smoke(
            server.endpoint, [Query(({"role": "user", "content": "weather"},), None, 64, (WEATHER,), wanted)]
        )
    assert not answer.ok


def test_greedy_and_seeded() -> None:
    with StandIn() as server:
        run_smoke(server.endpoint, [_query("a", max_tokens=9)], seed=5)
    body = server.asked[0]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.0, 5, 9)


def test_every_wrong_pattern_is_named_before_anything_is_asked() -> None:
    with StandIn() as server:
        with pytest.raises(RecipeError) as caught:
            run_smoke(server.endpoint, [_query("a", "("), _query("b", "b"), _query("c", "[")])
    assert [problem.field for problem in caught.value.problems] == ["smoke[0].expect", "smoke[2].expect"]
    assert server.asked == []


def test_refused_query_is_an_error(endpoint: Endpoint) -> None:
    with pytest.raises(RefusedError, match="context holds 512"):
        run_smoke(endpoint, [_query("x" * 600)])


def _talk(
    endpoint: Endpoint,
    lines: list[str | BaseException],
    *,
    on_write: Callable[[str], None] | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
) -> str:
    """The whole of what a conversation writes, given what is typed."""
    waiting = iter(lines)
    written: list[str] = []

    def read(prompt: str) -> str:
        written.append(prompt)
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        written.append(line + "\n")
        return line

    def write(text: str) -> None:
        written.append(text)
        if on_write:
            on_write(text)

    converse(endpoint, read=read, write=write, sampling=sampling, system=system)
    return "".join(written)


def test_conversation_with_the_real_server(endpoint: Endpoint) -> None:
    assert _talk(endpoint, ["Hello", "", "Again", "/quit", "never read"]) == (
        f"> Hello\n{REPLY}\n> \n> Again\n{REPLY}\n> /quit\n"
    )


def test_answer_cut_by_its_limit_says_so(endpoint: Endpoint) -> None:
    text = _talk(endpoint, ["Hello"], sampling=Sampling(max_tokens=2))
    assert text == "> Hello\nIn this\n[cut: the answer reached its limit of tokens]\n> \n"


def test_turns_and_system_prompt_travel() -> None:
    with StandIn() as server:
        _talk(
            server.endpoint, ["a", "b", "/system  Be brief. ", "c", "/reset", "d", "/system", "e"], system="S"
        )
    asked = [[f"{turn['role']}: {turn['content']}" for turn in body["messages"]] for body in server.asked]
    assert asked == [
        ["system: S", "user: a"],
        ["system: S", "user: a", "assistant: A ", "user: b"],
        ["system: Be brief.", "user: c"],
        ["system: Be brief.", "user: d"],
        ["user: e"],
    ]


def test_errors_do_not_end_the_conversation() -> None:
    failures = [Failure(503, "Loading model"), Failure(0)]
    with StandIn(failures=failures) as server:
        text = _talk(server.endpoint, ["one", "two", "caf\udce9", "three"])
    assert "error: what is asked is no text in UTF-8" in text
    url = server.endpoint.url
    assert f"error: {url} answered 503: Loading model\nhint: try again later" in text
    assert f"error: {url} broke off its answer" in text
    # What was not answered is not in the conversation.
    assert [len(body["messages"]) for body in server.asked] == [1, 1, 1]
    assert text.endswith("> three\nTHREE \n> \n")


def test_interrupt_stops_the_answer_alone() -> None:
    def interrupt(text: str) -> None:
        if text == "TWO ":
            raise KeyboardInterrupt

    with StandIn() as server:
        text = _talk(server.endpoint, ["one two three", "four"], on_write=interrupt)
    assert text == "> one two three\nONE TWO \n[stopped]\n> four\nFOUR \n> \n"
    assert [turn["content"] for turn in server.asked[1]["messages"]] == ["one two three", "ONE TWO ", "four"]


def test_interrupt_at_the_prompt_leaves() -> None:
    with StandIn() as server:
        assert _talk(server.endpoint, [KeyboardInterrupt(), "never"]) == "> \n"


def test_saved_conversation_is_training_data(tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    with StandIn() as server:
        text = _talk(
            server.endpoint,
            ["/save", f"/save {saved}", "hé", f"/save {saved}", f"/save {tmp_path}", "/save ~no\0body/x"],
        )
    assert "body/x cannot be written: " in text
    assert "save to which file? /save FILE\n" in text
    assert "nothing was said yet\n" in text
    assert f"saved to {saved}\n" in text
    assert f"error: {tmp_path} cannot be written: Is a directory\n" in text
    turns = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "HÉ "}]
    assert json.loads(saved.read_text(encoding="utf-8")) == {"messages": turns}


def test_help_and_unknown_commands_are_not_sent() -> None:
    with StandIn() as server:
        text = _talk(server.endpoint, ["/help", "/qiut"])
    assert text == f"> /help\n{HELP}> /qiut\nno such command: /qiut\n{HELP}> \n"
    assert server.asked == []
