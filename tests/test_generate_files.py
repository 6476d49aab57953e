"""`forge generate` and its two files: streams, full disks, links, a million rows, batches of OpenAI."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from forge import process
from forge.cli.main import run_command
from forge.errors import DataError, StageError
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint
from forge.serve.generate import answer_rows
from forge.serve.output import AnswerFile
from tests.conftest import ROOT
from tests.stand_in_server import Failure, StandIn
from tests.test_generate import expected_texts, texts_of, write_prompts

pytestmark = [pytest.mark.network]
CASES = ROOT / "tests" / "cases" / "serving"
FORGE = [sys.executable, "-m", "forge", "generate"]


def _answer(message: dict[str, Any], finish_reason: str = "stop") -> Failure:
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}
    return Failure(200, body=json.dumps({"id": "c1", "choices": [choice], "usage": usage}).encode())


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_reason_of_a_fastapi_server_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """abetlen/llama-cpp-python #1290: `{"detail": ...}` of vLLM, TGI and llama-cpp-python."""
    detail = {"detail": [{"loc": ["body", "seed"], "msg": "extra fields not permitted"}]}
    prompts, out = CASES / "generate-422-detail" / "p.jsonl", tmp_path / "o.jsonl"
    with StandIn(failures=[Failure(422, body=json.dumps(detail).encode())]) as server:
        assert run_command(["generate", str(prompts), str(out), "--endpoint", server.endpoint.url]) == 5
        [row] = _read(out)
    assert row == {
        "id": 1, "error": f"{server.endpoint.url} answered 422: body.seed: extra fields not permitted"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"detail": "Not now"}', "Not now"),
        (b'{"object": "error", "message": "too large"}', "too large"),
        (b'{"error": {"message": "its own"}}', "its own"),
        (b"Rate limit reached", "Rate limit reached"),
        (b"<html>gateway</html>", "no reason given"),
        (b"[" * 100_000, "no reason given"),
    ],
)
def test_reasons_of_other_servers(body: bytes, reason: str) -> None:
    with StandIn(failures=[Failure(400, body=body)]) as server, Client(server.endpoint) as client:
        with pytest.raises(DataError, match=f"answered 400: {reason}"):
            client.chat([{"role": "user", "content": "x"}])


@pytest.mark.programs
@pytest.mark.parametrize("out", ["/dev/stdout", "-"])
def test_answers_go_into_a_pipe(tmp_path: Path, out: str) -> None:
    """Rows alone on standard output, what is said on standard error; prompts come from a pipe too."""
    prompts = CASES / "generate-dev-stdout" / "p.jsonl"
    with StandIn() as server, (tmp_path / "log").open("w") as log:
        forge = [*FORGE, "-" if out == "-" else str(prompts), out, "--endpoint", server.endpoint.url]
        piped = ["bash", "-c", 'exec "$@" < "$0"', str(prompts), *forge]
        with process.Child(piped, separate_errors=True, log=log) as child:
            lines = list(child.lines())
            assert child.wait(20) == 0
    assert [json.loads(line)["text"].strip() for line in lines] == ["ONE"]
    assert "1 written, 0 skipped, 0 failed" in (tmp_path / "log").read_text()


@pytest.mark.programs
def test_a_reader_that_goes_away_ends_it_cleanly(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 200)
    with StandIn() as server:
        command = f"{' '.join(FORGE)} {prompts} - --endpoint {server.endpoint.url}"
        ended = process.run(["bash", "-c", command + " | head -n 1; exit ${PIPESTATUS[0]}"])
    assert ended.status == 4
    assert "- cannot be written any more: Broken pipe" in ended.output
    assert "bug" not in ended.output and "Traceback" not in ended.output


@pytest.mark.programs
def test_a_full_disk_keeps_whole_rows_and_goes_on_later(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 60), tmp_path / "out.jsonl"
    with StandIn() as server:
        command = [*FORGE, str(prompts), str(out), "--endpoint", server.endpoint.url]
        # What the system says of a file that may not grow further, as on a full disk.
        limited = process.run(["bash", "-c", 'ulimit -f 2; exec "$@"', "bash", *command])
        assert limited.status == 4, limited.output
        assert f"{out} cannot be written: File too large" in limited.output
        assert "of 60 rows written" in limited.output
        kept = len(texts_of(out))
        assert 0 < kept < 60
        assert answer_rows(server.endpoint, prompts, out).written == 60 - kept
    assert texts_of(out) == expected_texts(60)


def test_no_room_on_a_device(tmp_path: Path) -> None:
    with StandIn() as server, pytest.raises(StageError, match="No space left on device"):
        answer_rows(server.endpoint, write_prompts(tmp_path, 3), Path("/dev/full"))


@pytest.mark.parametrize("how", ["link", "hard link", "folder"])
def test_the_file_itself_is_locked(tmp_path: Path, how: str) -> None:
    """Two clients through two names once wrote 933 ids twice."""
    prompts, out, other = write_prompts(tmp_path, 2), tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    with AnswerFile(out):
        if how == "link":
            other.symlink_to(out)
        elif how == "hard link":
            os.link(out, other)
        else:
            (tmp_path / "folder").symlink_to(tmp_path)
            other = tmp_path / "folder" / "out.jsonl"
        with pytest.raises(StageError, match="another process is writing"):
            answer_rows(Endpoint("http://127.0.0.1:9", "m"), prompts, other)
    assert not list(tmp_path.glob(".*.lock"))


def test_asking_the_failed_again_keeps_the_lock_and_the_link(tmp_path: Path) -> None:
    prompts, out, link = write_prompts(tmp_path, 3), tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    out.write_text('{"id": 0, "text": "ROW 0"}\n{"id": 1, "error": "no"}\n')
    link.symlink_to(out)
    with AnswerFile(link, retry_failed=True) as output:
        assert output.failed == 0
        with pytest.raises(StageError, match="another process is writing"), AnswerFile(out):
            pass
    with StandIn() as server:
        assert answer_rows(server.endpoint, prompts, link, retry_failed=True).written == 2
    assert link.is_symlink()
    assert texts_of(out) == expected_texts(3)


def test_thinking_and_tool_calls_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SubtitleEdit #15010, software-agent-sdk #2419, picoclaw #966, lmstudio-bug-tracker #1602."""
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answers = [
        _answer({"content": "", "reasoning_content": "One it is."}),
        _answer({"content": None, "tool_calls": [call]}, "tool_calls"),
        _answer({"content": "One.", "reasoning": "Ollama's name of it."}),
    ]
    prompts, out = CASES / "generate-reasoning-content" / "p.jsonl", tmp_path / "o.jsonl"
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    expected = [
        {"id": 1, "text": "", "reasoning_content": "One it is.", "finish_reason": "stop", "usage": usage},
        {"id": 1, "text": "", "tool_calls": [call], "finish_reason": "tool_calls", "usage": usage},
        {
            "id": 1, "text": "One.", "reasoning_content": "Ollama's name of it.", "finish_reason": "stop",
            "usage": usage,
        },
    ]  # fmt: skip
    for answer, row in zip(answers, expected, strict=True):
        out.unlink(missing_ok=True)
        with StandIn(failures=[answer]) as server:
            assert run_command(["generate", str(prompts), str(out), "--endpoint", server.endpoint.url]) == 0
        assert _read(out) == [row]
        assert ("1 answers have no text" in capsys.readouterr().err) == (row["text"] == "")


_THOUGHTS: dict[str, dict[str, Any]] = {
    "Mistral": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "One it is."}]},
            {"type": "text", "text": "One."},
        ]
    },
    "OpenRouter": {
        "content": "One.", "reasoning_details": [{"type": "reasoning.text", "text": "One it is."}]
    },
    "an object": {"content": "One.", "reasoning": {"content": "One it is."}},
    "nothing of it": {"content": "One.", "reasoning": True},
}  # fmt: skip


@pytest.mark.parametrize("server", _THOUGHTS)
def test_thinking_wherever_a_server_puts_it(tmp_path: Path, server: str) -> None:
    prompts, out = CASES / "generate-reasoning-content" / "p.jsonl", tmp_path / "o.jsonl"
    with StandIn(failures=[_answer(_THOUGHTS[server])]) as stand_in:
        assert run_command(["generate", str(prompts), str(out), "--endpoint", stand_in.endpoint.url]) == 0
    [row] = _read(out)
    thought = "" if server == "nothing of it" else "One it is."
    assert (row["text"], row.get("reasoning_content", "")) == ("One.", thought)


def test_a_call_as_it_was_written_before_tool_calls(tmp_path: Path) -> None:
    call = {"name": "f", "arguments": "{}"}
    prompts, out = CASES / "generate-reasoning-content" / "p.jsonl", tmp_path / "o.jsonl"
    with StandIn(failures=[_answer({"content": None, "function_call": call}, "function_call")]) as server:
        assert run_command(["generate", str(prompts), str(out), "--endpoint", server.endpoint.url]) == 0
    [row] = _read(out)
    assert row["tool_calls"] == [{"type": "function", "function": call}]


def test_rows_of_a_batch_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's batch files, in and out; the body is the request."""
    prompts, out = tmp_path / "batch.jsonl", tmp_path / "out.jsonl"
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "row 1"}], "max_tokens": 7}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {
            "custom_id": "b",
            "body": {"messages": [{"role": "developer", "content": "row 2"}], "max_tokens": 7},
        },
        {"id": 3, "prompt": "row 3"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with StandIn(refuse="row 2") as server:
        result = answer_rows(server.endpoint, prompts, out, concurrency=1)
        assert (result.written, result.failed) == (2, 1)
        assert server.asked[0] == {**body, "model": "stand-in"}
        assert server.asked[1]["messages"][0]["role"] == "system"
        assert answer_rows(server.endpoint, prompts, out).skipped == 3
        server.refuse = None
        assert answer_rows(server.endpoint, prompts, out, retry_failed=True).written == 1
    assert "rows name the model gpt-4o-mini; stand-in is asked" in capsys.readouterr().err
    rows = {row.get("custom_id", row["id"]): row for row in _read(out)}
    assert rows.keys() == {"a", "b", 3}
    first = rows["a"]
    assert first.keys() == {"id", "custom_id", "response", "error"} and first["error"] is None
    assert first["response"]["status_code"] == 200
    assert first["response"]["body"]["choices"][0]["message"]["content"].strip() == "ROW 1"


def test_wrong_rows_of_a_batch(tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    good = {"messages": [{"role": "user", "content": "x"}]}
    lines: list[dict[str, Any]] = [
        {"custom_id": 1, "body": good}, {"custom_id": "1"}, {"custom_id": "2", "body": good, "url": "/x"},
        {"custom_id": "3", "body": good, "method": "GET"}, {"custom_id": "4", "body": {"messages": []}},
        {"custom_id": "5", "body": {**good, "stream": True}}, {"body": good},
    ]  # fmt: skip
    prompts.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError) as caught:
        answer_rows(Endpoint("http://127.0.0.1:9", "m"), prompts, tmp_path / "out")
    assert [problem.line for problem in caught.value.problems] == list(range(1, 8))


def test_messages_as_other_programs_write_them(tmp_path: Path) -> None:
    """Parts of a content, the role developer, a tool's call and answer."""
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
        {"role": "user", "content": "go on"},
    ]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(json.dumps({"id": 1, "messages": messages}))
    with StandIn() as server:
        assert answer_rows(server.endpoint, prompts, tmp_path / "out").written == 1
        assert server.asked[0]["messages"] == [{**messages[0], "role": "system"}, *messages[1:]]
    for content in ([], [{"text": "x"}], ["x"], [{"type": "text"}], 5, None):
        prompts.write_text(json.dumps({"id": 1, "messages": [{"role": "user", "content": content}]}))
        with pytest.raises(DataError):
            answer_rows(Endpoint("http://127.0.0.1:9", "m"), prompts, tmp_path / "other")


@pytest.mark.parametrize(
    "form", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions/", "/v1/models"]
)
def test_every_form_of_the_url(tmp_path: Path, form: str) -> None:
    with StandIn() as server:
        endpoint = Endpoint(server.endpoint.url + form, "m")
        assert endpoint.url == server.endpoint.url
        assert answer_rows(endpoint, write_prompts(tmp_path, 1), tmp_path / "out").written == 1


def test_other_roots_of_the_api() -> None:
    assert Endpoint("https://h/api/paas/v4", "m").route("/v1/models") == "https://h/api/paas/v4/models"
    whole = Endpoint("https://h/v1beta/openai/chat/completions?k=1", "m")
    assert whole.route("/v1/chat/completions") == "https://h/v1beta/openai/chat/completions?k=1"


def test_a_password_in_the_url_is_sent_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, 1)
    with StandIn(failures=[Failure(400, "no")]) as server:
        port = server.port
        url = f"http://me:pass%2Fword@127.0.0.1:{port}/v1"
        assert run_command(["generate", str(prompts), str(tmp_path / "out"), "--endpoint", url]) == 5
        assert server.logins[-1] == "me:pass/word"
    assert run_command(["generate", str(prompts), str(tmp_path / "two"), "--endpoint", url]) == 3
    for wrong in ("me:pass%2Fword@h", "http://me:pass%2Fword@[::", "ftp://me:pass@h/v1"):
        assert run_command(["generate", str(prompts), str(tmp_path / "two"), "--endpoint", wrong]) == 2
    shown = capsys.readouterr()
    assert "pass" not in shown.out + shown.err
    assert "pass" not in repr(Endpoint(url, "m"))
    assert "pass" not in (tmp_path / "out").read_text()


MEASURE = """
import sys, time
from pathlib import Path
from forge.model.memory import peak_memory
from forge.serve import generate as module
from forge.serve.endpoint import Endpoint
began = time.process_time()  # what it takes, whatever else the machine does
first = []
ask = module._Batch._ask
async def noted(self, lane, row):
    if not first:
        first.append(time.process_time() - began)
        print(first[0], peak_memory(), flush=True)  # getrusage counts what the parent had
    return await ask(self, lane, row)
module._Batch._ask = noted
module.answer_rows(Endpoint(sys.argv[1], "m"), Path(sys.argv[2]), Path(sys.argv[3]), concurrency=4)
"""


@pytest.mark.programs
def test_a_million_prompts_begin_at_once_in_little_memory(tmp_path: Path) -> None:
    """They took 677 MB before the first request."""
    prompts = tmp_path / "in.jsonl"
    with prompts.open("w") as stream:
        for start in range(0, 1_000_000, 1000):
            stream.write(
                "".join(f'{{"id": "{n:x}-x", "prompt": "row"}}\n' for n in range(start, start + 1000))
            )
    with StandIn(seconds=0.05) as server:
        command = [sys.executable, "-c", MEASURE, server.endpoint.url, str(prompts), str(tmp_path / "out")]
        with process.Child(command) as child:
            line = next(child.lines())
            time.sleep(1)
            os.kill(child.pid, signal.SIGINT)
            peak = int(line.split()[1])
            list(child.lines())
    assert float(line.split()[0]) < 2.5, line
    assert peak < 150_000_000, line


@pytest.mark.programs
def test_wrong_rows_far_in_the_file_are_said_and_what_is_answered_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.serve.rows.SECONDS_OF_CHECKING", 0.0)
    prompts, out = write_prompts(tmp_path, 4000), tmp_path / "out.jsonl"
    with prompts.open("a") as stream:
        stream.write('{"id": 1, "prompt": "twice"}\n')
    with StandIn() as server, pytest.raises(DataError, match=r"1 of its lines .*rows written") as caught:
        answer_rows(server.endpoint, prompts, out)
    assert [problem.line for problem in caught.value.problems] == [4001]
    assert texts_of(out).items() <= expected_texts(4000).items()


@pytest.mark.programs
def test_ctrl_c_twice(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 200), tmp_path / "out.jsonl"
    with StandIn(seconds=0.05) as server:
        with process.Child([*FORGE, str(prompts), str(out), "--endpoint", server.endpoint.url]) as child:
            while not out.exists() or out.read_bytes().count(b"\n") < 4:
                time.sleep(0.01)
            for _ in range(3):
                os.kill(child.pid, signal.SIGINT)
                time.sleep(0.002)
            lines = list(child.lines())
            assert child.wait(10) == 130
        assert not any("Traceback" in line for line in lines), lines
        assert any(line.startswith("interrupted") for line in lines), lines
        kept = len(texts_of(out))
        server.seconds = 0
        assert answer_rows(server.endpoint, prompts, out).written == 200 - kept
