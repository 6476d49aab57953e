"""The two files of a batch: what is accepted, what is refused, and how a torn output goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    assert "the key 'id' stands twice" in messages[13]
    assert "system is not read from such a row" in messages[14]
    assert server.asked == []
    assert not (tmp_path / "out.jsonl").exists()


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
