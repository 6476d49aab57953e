"""Ways to ask: the async client, raw prompts, schemas, several endpoints, the example scripts."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forge import process
from forge.cli.main import run_command
from forge.commands.ask import _endpoints, _schema
from forge.errors import DataError, RecipeError
from forge.serve.client import find
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.generate import answer_rows
from forge.serve.runtime import ServerSettings
from forge.serve.wire import Sampling
from tests.conftest import ROOT
from tests.stand_in_server import StandIn
from tests.test_generate import expected_texts, texts_of, write_prompts
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network]
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with serve_embedded(ServerSettings(model, "tiny", 512, threads=1, api_key="k")) as endpoint:
        yield endpoint


def _stand_in(**how: object) -> StandIn:
    return StandIn(**how)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.serve.retries.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("forge.serve.retries.LONGEST_PAUSE_SECONDS", 0.05)


@pytest.mark.programs
def test_raw_prompts_get_no_template(served: Endpoint, tmp_path: Path) -> None:
    """Pitfall 56: only who asks for it sends bare text to a chat model."""
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"id": 1, "prompt": "ab\n"}) + "\n")
    result = answer_rows(served, prompts, out, raw=True)
    [row] = map(json.loads, out.read_text().splitlines())
    assert row == {
        "id": 1, "text": REPLY, "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 7},
    }  # fmt: skip
    assert (result.written, result.cut) == (1, 0)
    prompts.write_text('{"id": 1, "messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(DataError) as caught:
        answer_rows(served, prompts, out, raw=True)
    assert "messages cannot be sent raw" in str(caught.value.problems[0])


@pytest.mark.programs
@pytest.mark.parametrize("raw", [False, True])
def test_every_answer_meets_the_schema(served: Endpoint, tmp_path: Path, raw: bool) -> None:
    """A model that would say something else entirely is held to it."""
    prompts, out = write_prompts(tmp_path, 5), tmp_path / "out.jsonl"
    sampling = Sampling(max_tokens=60, temperature=1.0, schema=NUMBER)
    answer_rows(served, prompts, out, sampling=sampling, raw=raw)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        if row["finish_reason"] == "stop":
            assert isinstance(json.loads(row["text"])["n"], int)
        else:
            assert row["text"].lstrip().startswith("{")


def test_schema_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    for text in ("[1]", "{", ""):
        path.write_text(text)
        with pytest.raises(RecipeError, match="--json-schema"):
            _schema(path)
    path.write_text(json.dumps(NUMBER), encoding="utf-8-sig")
    assert _schema(path) == NUMBER
    assert _schema(None) is None


def test_sampling_is_sent_as_it_was_asked_for(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 1)
    sampling = Sampling(max_tokens=9, temperature=0.5, seed=3, stop=("x",), top_p=0.9, top_k=40, min_p=0.1)
    with _stand_in() as server:
        answer_rows(server.endpoint, prompts, tmp_path / "one", sampling=sampling)
        answer_rows(server.endpoint, prompts, tmp_path / "two")
    chosen, plain = server.asked
    assert {key: value for key, value in chosen.items() if key not in ("model", "messages")} == {
        "max_tokens": 9, "temperature": 0.5, "seed": 3, "stop": ["x"], "top_p": 0.9, "top_k": 40, "min_p": 0.1
    }  # fmt: skip
    assert plain.keys() == {"model", "messages", "max_tokens", "temperature", "seed"}


def test_the_model_is_the_one_that_was_told(tmp_path: Path) -> None:
    """Of several, as Ollama, vLLM and `--lora` have them; as the server lists it."""
    with _stand_in(models=("base", "poet", "yoda:latest")) as server:
        url = server.endpoint.url
        assert [find(url, model=name).model for name in (None, "poet", "yoda")] == [
            "base", "poet", "yoda:latest"
        ]  # fmt: skip
        with pytest.raises(RecipeError, match="serves no model clerk") as unknown:
            find(url, model="clerk")
        assert unknown.value.hint == "served are base, poet, yoda:latest"
        command = ["generate", str(write_prompts(tmp_path, 2)), str(tmp_path / "out"), "--endpoint", url]
        assert run_command([*command, "--model", "clerk"]) == 2
        assert server.asked == []
        assert run_command([*command, "--model", "poet"]) == 0
    assert [body["model"] for body in server.asked] == ["poet", "poet"]


def test_several_endpoints_share_the_rows(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 40), tmp_path / "out.jsonl"
    with _stand_in(slots=3, seconds=0.02) as one, _stand_in(slots=3, seconds=0.02) as two:
        answer_rows([one.endpoint, two.endpoint], prompts, out)
    assert texts_of(out) == expected_texts(40)
    assert (one.most_at_once, two.most_at_once) == (3, 3)
    assert min(len(one.asked), len(two.asked)) >= 10


def test_endpoint_that_goes_away_leaves_its_rows_to_the_others(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, 60), tmp_path / "out.jsonl"
    gone = _stand_in()
    gone.start()
    gone.stop()
    with _stand_in(seconds=0.01) as there:
        result = answer_rows([gone.endpoint, there.endpoint], prompts, out, concurrency=4)
    assert (result.written, result.failed) == (60, 0)
    assert texts_of(out) == expected_texts(60)


@pytest.mark.parametrize("told", [(), ("--model", "stand-in")])
def test_endpoint_that_is_away_at_the_start_is_asked_again_while_another_answers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    told: tuple[str, ...],
) -> None:
    """It gets its share when it comes, under its model's name; where none answers nothing begins."""
    late = _stand_in()
    late.start()
    late.stop()
    prompts, out = write_prompts(tmp_path, 60), tmp_path / "out.jsonl"
    with _stand_in(seconds=0.05) as there:
        command = ["generate", str(prompts), str(out), "--endpoint", late.endpoint.url, *told]
        assert run_command(command) == 3
        assert not out.exists()

        def come() -> None:
            deadline = time.monotonic() + 20
            while len(there.asked) < 10 and time.monotonic() < deadline:
                time.sleep(0.005)
            late.start()

        coming = threading.Thread(target=come)
        coming.start()
        try:
            assert run_command([*command, "--endpoint", there.endpoint.url, "--concurrency", "2"]) == 0
        finally:
            coming.join()
            late.stop()
    assert "it is asked again while others answer" in capsys.readouterr().err
    assert texts_of(out) == expected_texts(60)
    assert late.asked and {body["model"] for body in late.asked} == {"stand-in"}


def test_endpoint_that_comes_late_without_the_model_answers_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does one that asks for a key; the batch ends where nobody else is left."""
    prompts, out = write_prompts(tmp_path, 12), tmp_path / "out.jsonl"
    with _stand_in(models=("other",)) as late:
        pass
    with _stand_in(api_key="k") as locked, _stand_in() as there:
        away = _endpoints([late.endpoint.url, there.endpoint.url], "stand-in", None)[:1]
        away.append(replace(locked.endpoint, api_key=None, proved=False))
        with late:
            assert answer_rows([*away, there.endpoint], prompts, out, concurrency=2).written == 12
            with pytest.raises(RecipeError, match="serves no model stand-in"):
                answer_rows(away[0], prompts, tmp_path / "alone.jsonl")
        assert late.asked == locked.asked == []
    assert texts_of(out) == expected_texts(12)
    said = capsys.readouterr().err
    assert said.count(f"{late.endpoint.url} serves no model stand-in: it is left out") == 1
    assert said.count("Invalid API Key: it is left out") == 1


def test_endpoint_that_comes_late_may_still_load_its_model(tmp_path: Path) -> None:
    """It lists none by then, and is asked again."""
    prompts, out = write_prompts(tmp_path, 60), tmp_path / "out.jsonl"
    with _stand_in(models=()) as late, _stand_in(seconds=0.05) as there:

        def load() -> None:
            deadline = time.monotonic() + 20
            while len(there.asked) < 10 and time.monotonic() < deadline:
                time.sleep(0.005)
            late.models = ("stand-in",)

        loading = threading.Thread(target=load)
        loading.start()
        endpoints = [replace(late.endpoint, model="", proved=False), there.endpoint]
        try:
            assert answer_rows(endpoints, prompts, out, concurrency=2).written == 60
        finally:
            loading.join()
    assert texts_of(out) == expected_texts(60)
    assert late.asked and {body["model"] for body in late.asked} == {"stand-in"}


def test_endpoint_that_stays_away_does_not_end_what_a_slow_one_works_on(tmp_path: Path) -> None:
    """Its first answers may take longer than the patience with one that is away."""
    prompts, out = write_prompts(tmp_path, 4), tmp_path / "out.jsonl"
    with _stand_in() as away:
        pass
    with _stand_in(seconds=0.5) as slow:
        answer_rows([away.endpoint, slow.endpoint], prompts, out, concurrency=2, patience_seconds=0.1)
    assert texts_of(out) == expected_texts(4)


@pytest.mark.programs
@pytest.mark.parametrize("name", ["ask_with_requests.py", "ask_with_openai.py"])
def test_examples_run_as_they_stand(served: Endpoint, name: str) -> None:
    script = ROOT / "docs" / "examples" / name
    finished = process.run([sys.executable, str(script), served.url, "Hello"], environment={"API_KEY": "k"})
    assert finished.status == 0, finished.output
    lines = finished.output.splitlines()
    assert lines[:2] == [REPLY, REPLY]
    if "openai" in name:
        assert "".join(lines[2:]).lstrip().startswith("{")


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_temperature_that_is_no_number(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ("--endpoint", "http://127.0.0.1:9")
    for command in (("generate", str(tmp_path), str(tmp_path), *url), ("chat", "http://127.0.0.1:9")):
        assert run_command([*command, "--temperature", number]) == 2
        assert f"'--temperature': {number} is not finite" in capsys.readouterr().err


def test_an_empty_stop_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server would end every answer before its first word."""
    command = ["generate", str(tmp_path), str(tmp_path), "--endpoint", "http://127.0.0.1:9", "--stop", ""]
    assert run_command(command) == 2
    assert "--stop: an empty text" in capsys.readouterr().err
