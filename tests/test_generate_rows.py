"""The two files of a batch: what is accepted, what is refused, and how a torn output goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.chat.modelfile import OLLAMA_PARAMETERS
from forge.errors import DataError, StageError
from forge.serve.endpoint import Endpoint
from forge.serve.generate import answer_rows
from forge.serve.output import AnswerFile
from tests.stand_in_server import StandIn
from tests.test_generate import expected_texts, texts_of, write_prompts

pytestmark = [pytest.mark.network]


def test_rows_are_checked_before_anything_is_sent(tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    lines = [
        '{"id": 1, "prompt": "fine"}', '{"id": 1, "prompt": "twice"}', '{"prompt": "x"}', "{", "[]",
        '{"id": null, "prompt": "x"}', '{"id": true, "prompt": "x"}', '{"id": 2}',
        '{"id": 3, "prompt": "x", "messages": []}', '{"id": 4, "prompt": 5}', '{"id": 5, "messages": []}',
        '{"id": 6, "messages": [{"role": "human", "content": "x"}]}',
        '{"id": 7, "messages": [{"role": "user"}]}',
        '{"id": 8, "prompt": "\\ud83d"}', '{"id": 9, "id": 10, "prompt": "x"}',
        '{"id": 11, "prompt": "x", "system": "Be brief.", "topic": "read by nobody"}', "",
        '{"id": "1", "prompt": "a text is another id"}',
    ]  # fmt: skip
    prompts.write_text("\n".join(lines))
    with StandIn() as server, pytest.raises(DataError) as caught:
        answer_rows(server.endpoint, prompts, tmp_path / "out.jsonl")
    assert [problem.line for problem in caught.value.problems] == list(range(2, 17))
    messages = [problem.message for problem in caught.value.problems]
    assert messages[0] == "the id 1 stands on line 1 already"
    assert messages[1] == "no id"
    assert "unknown role 'human'" in messages[10]
    assert '"id" stands twice' in messages[13]
    assert "system is not read from such a row" in messages[14]
    assert server.asked == []
    assert not (tmp_path / "out.jsonl").exists()


# Fields of OpenAI's that ask for no other answer, or that tables have for things of their own, too.
_REPORTED = {
    "access_programs", "audio", "background", "background_options", "context_management", "conversation",
    "image", "include", "input", "metadata", "model", "moderation", "prediction", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier",
    "store", "stream_options", "text", "truncation", "user",
}  # fmt: skip


def test_what_would_ask_for_another_answer_is_refused(tmp_path: Path) -> None:
    """Each field of OpenAI's requests, each parameter of Ollama's, and llama-server's own."""
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params

    bases = (
        completion_create_params.CompletionCreateParamsBase,
        chat_create_params.CompletionCreateParamsBase,
        response_create_params.ResponseCreateParamsBase,
    )
    openai = {name for base in bases for name in base.__annotations__} - {"prompt", "messages"} - _REPORTED
    names = sorted(openai | OLLAMA_PARAMETERS | {"chat_template_kwargs", "enable_thinking", "n_probs"})
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, "prompt": "x", name: 1}) + "\n" for name in names))
    with StandIn() as server, pytest.raises(DataError) as caught:
        answer_rows(server.endpoint, prompts, tmp_path / "out.jsonl")
    assert [problem.message.partition(" is not read")[0] for problem in caught.value.problems] == names


def test_what_else_is_not_read_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "in.jsonl"
    rows: list[dict[str, object]] = [
        {"id": 1, "prompt": "a", "topic": 1, "response": "b"},
        {"id": 2, "messages": [{"role": "user", "content": "a"}], "topic": 2},
        {
            "custom_id": "3",
            "body": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
            "set": 1,
        },
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with StandIn() as server:
        answer_rows(server.endpoint, prompts, tmp_path / "out.jsonl")
    assert f"{prompts}: not read of its rows: topic, response, set" in capsys.readouterr().out.split("\n")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("", "no prompts"), ("\n\n", "no prompts")]
)
def test_no_prompts(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        answer_rows(Endpoint("http://127.0.0.1:9", "m"), path, tmp_path / "out.jsonl")


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 9), tmp_path / "out.jsonl"
    with StandIn() as server:
        answer_rows(server.endpoint, prompts, out)
        whole = out.read_bytes()
        lines = whole.splitlines(keepends=True)
        # Torn at every place of its third line, as by a crash.
        for length in (0, 1, 5, len(lines[2]) // 2, len(lines[2]) - 1):
            out.write_bytes(b"".join(lines[:2]) + lines[2][:length])
            server.asked.clear()
            result = answer_rows(server.endpoint, prompts, out)
            assert (result.written, result.skipped, result.failed) == (7, 2, 0)
            assert len(server.asked) == 7
            assert texts_of(out) == expected_texts(9)
            assert out.read_bytes().startswith(b"".join(lines[:2]))


@pytest.mark.parametrize(
    "content",
    ["my notes", "my notes\n", '{"id": 1}\n', '{"id": 1, "text": ""}\n{"id": 1, "text": ""}\n', "\n"],
)
def test_output_that_is_not_ours_is_left_alone(tmp_path: Path, content: str) -> None:
    prompts, out = write_prompts(tmp_path, 2), tmp_path / "out.jsonl"
    out.write_text(content)
    with StandIn() as server, pytest.raises(DataError, match="left as it is"):
        answer_rows(server.endpoint, prompts, out)
    assert out.read_text() == content
    with StandIn() as server, pytest.raises(DataError):
        answer_rows(server.endpoint, prompts, prompts)
    assert server.asked == []


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 1)
    for out in (tmp_path / "no" / "out.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be written"):
            answer_rows(Endpoint("http://127.0.0.1:9", "m"), prompts, out, patience_seconds=0)
    assert not (tmp_path / "no").exists()


def test_second_process_on_one_output_is_refused(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 1), tmp_path / "out.jsonl"
    with AnswerFile(out), pytest.raises(StageError, match="another process is writing"):
        answer_rows(Endpoint("http://127.0.0.1:9", "m"), prompts, out)


@pytest.mark.timeout(30)  # without the refusal it would ask the stand-in again and again
@pytest.mark.parametrize("asked", ['"functions": [{"name": "f"}]', '"audio": {"voice": "x"}', '"best_of": 3'])
def test_a_body_that_no_server_of_texts_answers(asked: str, tmp_path: Path) -> None:
    """llama-server leaves it out in silence, and the answer would be another one."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        f'{{"custom_id": "a", "body": {{"messages": [{{"role": "user", "content": "q"}}], {asked}}}}}'
    )
    with StandIn() as server, pytest.raises(DataError) as caught:
        answer_rows(server.endpoint, prompts, tmp_path / "out.jsonl")
    (problem,) = caught.value.problems
    assert problem.message.startswith(asked.split('"')[1])
