"""Batch generation: every id once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from forge import process, report
from forge.errors import StageError
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.generate import Generated, answer_rows
from forge.serve.runtime import ServerSettings
from forge.serve.wire import RefusedError, Sampling
from tests.servers import own_servers
from tests.stand_in_server import Failure, StandIn
from tests.tiny_gguf import REPLY, write_tiny_gguf
from tests.told_sink import Told

pytestmark = [pytest.mark.network]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.serve.retries.FIRST_PAUSE_SECONDS", 0.02)


def write_prompts(folder: Path, count: int) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": n, "prompt": f"row {n}"}) + "\n" for n in range(count)))
    return path


def _rows(path: Path) -> dict[Any, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len({row["id"] for row in rows}) == len(rows), "an id stands there twice"
    return {row["id"]: row for row in rows}


def texts_of(path: Path) -> dict[Any, str]:
    return {key: row.get("text", "failed").strip() for key, row in _rows(path).items()}


def expected_texts(count: int) -> dict[Any, str]:
    return {n: f"ROW {n}" for n in range(count)}


@pytest.mark.programs
def test_real_server_answers_every_row(tmp_path: Path) -> None:
    """U, R3: bulk generation over REST, both kinds of rows, with the usage of each."""
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    talk = [{"role": "system", "content": "Be"}, {"role": "user", "content": "abc"}]
    rows: list[dict[str, object]] = [
        {"id": f"p{n}", "prompt": "x" * n, "note": "left alone"} for n in range(40)
    ]
    rows += [{"id": 7, "messages": talk}, {"id": "long", "prompt": "x" * 600}]
    prompts.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    with serve_embedded(ServerSettings(model, "tiny", 512, threads=1)) as endpoint:
        result = answer_rows(endpoint, prompts, out)
        again = answer_rows(endpoint, prompts, out)
        cut = answer_rows(endpoint, prompts, tmp_path / "cut.jsonl", sampling=Sampling(max_tokens=2))
    assert (result.written, result.skipped, result.failed) == (41, 0, 1)
    assert result.tokens_per_second > 0
    assert again == Generated(0, 42, 1, 0.0)
    assert cut.written == 41
    header = len("user\n") + 2 + 1 + 1 + len("assistant\n")
    expected: dict[Any, dict[str, Any]] = {
        f"p{n}": {
            "id": f"p{n}", "text": REPLY, "finish_reason": "stop",
            "usage": {"prompt_tokens": header + n, "completion_tokens": 7},
        }
        for n in range(40)
    }  # fmt: skip
    expected[7] = {**expected["p3"], "id": 7}
    expected[7]["usage"] = {"prompt_tokens": header + 3 + len("system\nBe\n") + 2, "completion_tokens": 7}
    expected["long"] = {
        "id": "long",
        "error": "the prompt is 619 tokens long and the server's context holds 512",
    }
    assert _rows(out) == expected
    assert _rows(tmp_path / "cut.jsonl")["p1"]["finish_reason"] == "length"


def test_only_what_can_never_succeed_becomes_a_failed_row(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 12), tmp_path / "out.jsonl"
    refusal = "the prompt is 99 tokens long and the server's context holds 8"
    with StandIn(refuse="row 1") as server:
        result = answer_rows(server.endpoint, prompts, out)
        assert (result.written, result.skipped, result.failed) == (9, 0, 3)
        assert _rows(out)[1] == {"id": 1, "error": refusal}
        assert texts_of(out) == expected_texts(12) | {1: "failed", 10: "failed", 11: "failed"}
        # A failed row stays one, and is asked for no more, until that is wanted.
        assert answer_rows(server.endpoint, prompts, out) == Generated(0, 12, 3, 0.0)
        server.refuse = "row 11"
        result = answer_rows(server.endpoint, prompts, out, retry_failed=True)
        assert (result.written, result.skipped, result.failed) == (2, 9, 1)
    assert texts_of(out) == expected_texts(12) | {11: "failed"}


def test_wrong_key_stops_everything_and_writes_nothing(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 5), tmp_path / "out.jsonl"
    with StandIn(api_key="k") as server:
        with pytest.raises(RefusedError, match="Invalid API Key"):
            answer_rows(Endpoint(server.endpoint.url, "m", "wrong"), prompts, out)
    assert out.read_bytes() == b""


def test_busy_server_gets_fewer_requests_and_all_is_answered(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 30), tmp_path / "out.jsonl"
    failures = [Failure(429), Failure(503, "Loading model"), Failure(500), Failure(502), Failure(0)] * 4
    with StandIn(failures=failures) as server:
        result = answer_rows(server.endpoint, prompts, out, concurrency=6)
        assert (result.written, result.failed) == (30, 0)
        assert len(server.asked) == 50
    assert texts_of(out) == expected_texts(30)


_GARBLED = (b"<html>a proxy restarts</html>", b"{}")


def test_what_is_no_answer_is_asked_again(tmp_path: Path) -> None:
    """A proxy's page, with 200, while the server behind it restarts; as often as it takes."""
    prompts, out = write_prompts(tmp_path, 4), tmp_path / "out.jsonl"
    with StandIn(failures=[Failure(200, body=body) for body in _GARBLED] * 12) as server:
        assert answer_rows(server.endpoint, prompts, out).written == 4
    assert texts_of(out) == expected_texts(4)


_EMPTY: tuple[dict[str, Any], ...] = (
    {"choices": []},
    {"choices": None},
    {"choices": [{}]},
    {"choices": [{"message": None, "finish_reason": "content_filter"}]},
    {"choices": [{"message": {"content": 5}}]},
)


@pytest.mark.parametrize("payload", _EMPTY, ids=json.dumps)
def test_a_server_without_an_answer_is_not_waited_for(tmp_path: Path, payload: dict[str, Any]) -> None:
    """It speaks the API: the row is set aside after five tries, not after minutes, and says what came."""
    prompts, out = write_prompts(tmp_path, 1), tmp_path / "out.jsonl"
    with StandIn(failures=[Failure(200, body=json.dumps(payload).encode())] * 5) as server:
        with pytest.raises(StageError, match=r"1 left to do: 0: .* answered without a message: ") as caught:
            answer_rows(server.endpoint, prompts, out)
        assert answer_rows(server.endpoint, prompts, out).written == 1
    assert json.dumps(payload["choices"])[:80] in caught.value.message


def test_a_long_wait_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.serve.retries.SECONDS_TO_A_WORD", 0.1)
    prompts, out = write_prompts(tmp_path, 3), tmp_path / "out.jsonl"
    told = Told()
    report.configure(sink=told)
    with StandIn(failures=[Failure(200, body=_GARBLED[0])] * 1000) as server:
        with pytest.raises(StageError, match="not JSON"):
            answer_rows(server.endpoint, prompts, out, patience_seconds=0.6)
    said = [text for kind, text in told.texts if kind == "warning"]
    assert len(said) == 1 and said[0].endswith("trying again for up to 1 s"), said


def test_a_gateway_whose_server_restarts_costs_no_row(tmp_path: Path) -> None:
    """Seven times each, which of a server's own errors would be too often."""
    prompts, out = write_prompts(tmp_path, 4), tmp_path / "out.jsonl"
    with StandIn(failures=[Failure(502, body=b"<html>gateway</html>"), Failure(504)] * 14) as server:
        assert answer_rows(server.endpoint, prompts, out).written == 4
    assert texts_of(out) == expected_texts(4)


def test_what_stays_no_answer_ends_the_run_with_what_is_left(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 3), tmp_path / "out.jsonl"
    with StandIn(failures=[Failure(200, body=_GARBLED[0])] * 1000) as server:
        with pytest.raises(StageError, match=r"0 of 3 rows written, 3 left to do: .* not JSON") as caught:
            answer_rows(server.endpoint, prompts, out, patience_seconds=0.2)
    assert caught.value.hint == "run the same command again: it goes on where it stopped"


def test_backs_off_to_what_the_server_can_take(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 80), tmp_path / "out.jsonl"
    with StandIn(capacity=2, seconds=0.02) as server:
        answer_rows(server.endpoint, prompts, out, concurrency=16)
        # About 35; without backing off 120 and more.
        assert 0 < server.turned_away < 80
    assert texts_of(out) == expected_texts(80)


def test_waits_as_long_as_the_server_asks(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 1), tmp_path / "out.jsonl"
    begin = time.monotonic()
    with StandIn(failures=[Failure(429, headers=(("Retry-After", "1"),))]) as server:
        answer_rows(server.endpoint, prompts, out)
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize(("slots", "concurrency", "most"), [(3, None, 3), (None, None, 4), (3, 6, 6)])
def test_as_many_at_once_as_the_server_has_slots(
    tmp_path: Path, slots: int | None, concurrency: int | None, most: int
) -> None:
    prompts, out = write_prompts(tmp_path, 24), tmp_path / "out.jsonl"
    with StandIn(slots=slots, seconds=0.1) as server:
        answer_rows(server.endpoint, prompts, out, concurrency=concurrency)
        assert server.most_at_once == most


def test_row_that_breaks_the_server_blocks_no_other(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 6), tmp_path / "out.jsonl"
    with StandIn(broken="row 2") as server:
        with pytest.raises(
            StageError, match=r"5 of 6 rows written, 1 left to do: 2: .* answered 500"
        ) as caught:
            answer_rows(server.endpoint, prompts, out)
        assert caught.value.hint == "run the same command again: it goes on where it stopped"
        assert server.prompts.count("row 2") == 5
        server.broken = None
        assert answer_rows(server.endpoint, prompts, out).written == 1
    assert texts_of(out) == expected_texts(6)


def test_row_that_never_gets_an_answer_blocks_no_other(tmp_path: Path) -> None:
    """It makes room at once, and is set aside once the server has answered others often enough."""
    prompts, out = write_prompts(tmp_path, 40), tmp_path / "out.jsonl"
    with StandIn(garbled="row 9") as server:
        with pytest.raises(StageError, match=r"39 of 40 rows written, 1 left to do: 9: .* not JSON"):
            answer_rows(server.endpoint, prompts, out, concurrency=1, patience_seconds=5)
        assert server.prompts.count("row 9") == 6
        # More of them than the requests that run at once.
        server.garbled = "row 1"
        with pytest.raises(StageError, match=r"30 of 41 rows written, 11 left to do: .* not JSON"):
            answer_rows(
                server.endpoint,
                write_prompts(tmp_path, 41),
                tmp_path / "other",
                concurrency=2,
                patience_seconds=2,
            )


def test_usage_that_is_not_told_is_none(tmp_path: Path) -> None:
    answer: dict[str, Any] = {"choices": [{"finish_reason": "stop", "message": {"content": "Yes"}}]}
    unknown = {"prompt_tokens": None, "completion_tokens": None}
    bodies = [answer, answer | {"usage": None}, answer | {"usage": unknown}]
    prompts, out = write_prompts(tmp_path, 3), tmp_path / "out.jsonl"
    with StandIn(failures=[Failure(200, body=json.dumps(body).encode()) for body in bodies]) as server:
        assert answer_rows(server.endpoint, prompts, out).written == 3
    assert {row["text"] for row in _rows(out).values()} == {"Yes"}
    assert [row["usage"] for row in _rows(out).values()] == [{"prompt_tokens": 0, "completion_tokens": 0}] * 3


@pytest.mark.parametrize("error", ["no upstream", {"message": "no upstream", "code": 429}])
def test_an_error_that_came_with_success_is_said(tmp_path: Path, error: object) -> None:
    prompts, out = write_prompts(tmp_path, 1), tmp_path / "out.jsonl"
    with StandIn(failures=[Failure(200, body=json.dumps({"error": error}).encode())] * 1000) as server:
        with pytest.raises(StageError, match=r"0 of 1 rows written, 1 left to do: .*: no upstream"):
            answer_rows(server.endpoint, prompts, out, patience_seconds=0.2)


def test_server_that_dies_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 40), tmp_path / "out.jsonl"
    server = StandIn(seconds=0.02)
    server.start()

    def die_and_come_back() -> None:
        while len(server.asked) < 10:
            time.sleep(0.005)
        server.stop()
        time.sleep(0.3)
        server.start()

    thread = threading.Thread(target=die_and_come_back)
    thread.start()
    result = answer_rows(server.endpoint, prompts, out, concurrency=3)
    thread.join()
    server.stop()
    assert (result.written, result.failed) == (40, 0)
    assert texts_of(out) == expected_texts(40)


def test_server_that_stays_away_ends_the_run_with_what_is_left(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 8), tmp_path / "out.jsonl"
    with StandIn(failures=[]) as server:
        answer_rows(server.endpoint, write_prompts(tmp_path, 3), out)
        endpoint = server.endpoint
    write_prompts(tmp_path, 8)
    with pytest.raises(StageError, match=r"0 of 5 rows written, 5 left to do: .* does not answer") as caught:
        answer_rows(endpoint, prompts, out, patience_seconds=0.2)
    assert caught.value.hint == "run the same command again: it goes on where it stopped"
    assert texts_of(out) == expected_texts(3)


@pytest.mark.programs
def test_embedded_server_that_dies_is_said_at_once(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 8), tmp_path / "out.jsonl"
    with serve_embedded(
        ServerSettings(write_tiny_gguf(tmp_path / "tiny.gguf"), "tiny", 512, threads=1)
    ) as endpoint:
        (server,) = own_servers()
        server.kill()
        with pytest.raises(StageError, match=r"0 of 8 rows written, 8 left to do: .*killed by signal 9"):
            answer_rows(endpoint, prompts, out)


GENERATE = """
import sys
from pathlib import Path
from forge import process
from forge.errors import ForgeError
from forge.serve.endpoint import Endpoint
from forge.serve.generate import answer_rows
url, prompts, out = sys.argv[1:]
with process.signals_as_interrupt():
    try:
        answer_rows(Endpoint(url, "m"), Path(prompts), Path(out), concurrency=4)
    except ForgeError as stop:
        print(type(stop).__name__, stop.message)
"""


@pytest.mark.programs
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_keeps_what_is_written(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and kill -9: the next run does the rest, and writes every id once."""
    prompts, out = write_prompts(tmp_path, 60), tmp_path / "out.jsonl"
    with StandIn(seconds=0.05) as server:
        command = [sys.executable, "-c", GENERATE, server.endpoint.url, str(prompts), str(out)]
        with process.Child(command) as child:
            while not out.exists() or out.read_bytes().count(b"\n") < 8:
                assert child.status is None, list(child.lines())
                time.sleep(0.01)
            os.kill(child.pid, number)
            said = list(child.lines())
            child.wait(5)
        before = _rows(out) if number != signal.SIGKILL else {}
        kept = out.read_bytes().count(b"\n")
        assert 8 <= kept < 60
        if number != signal.SIGKILL:
            assert said == [
                f"InterruptedByUserError interrupted: {kept} of 60 rows written, {60 - kept} left to do"
            ]
        server.seconds = 0.0
        result = answer_rows(server.endpoint, prompts, out)
    assert (result.written, result.skipped) == (60 - kept, kept)
    assert texts_of(out) == expected_texts(60)
    assert before.items() <= _rows(out).items()
