"""`forge verify --ollama`: a model that lives in an Ollama, and what is said of what cannot be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.chat.hand_over import hand_over_of
from forge.cli.main import run_command
from forge.model.base import BUILTIN
from forge.serve.ollama import import_model
from forge.tools.ollama import Ollama
from tests.conftest import link_converters
from tests.fake_ollama import FakeOllama
from tests.fake_ollama_prompts import CHATML_GO
from tests.models import make_adapter
from tests.ollama_servers import PINNED, make
from tests.specimens import Specimen

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs]

TINY = BUILTIN / "tiny"
PARAMETERS = {"stop": ["<|im_end|>"], "num_ctx": 1024}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The f16 GGUF of `builtin:tiny`, its template pinned as an export pins it."""
    root = tmp_path_factory.mktemp("exported")
    return Specimen(TINY, None, root / "no rows", root).f16(root / "f16", chat_template=PINNED)


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_HOME", str(link_converters(tmp_path / "home")))


def verified(
    fake: FakeOllama, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0
) -> dict[str, Any]:
    """The JSON of the command on the model `yoda`; what was said is under `said`."""
    capsys.readouterr()
    found = run_command(
        ["verify", "--ollama", "yoda", "--host", fake.url, "--base", "builtin:tiny", *more, "--json"]
    )
    printed = capsys.readouterr()
    assert found == code, printed.err
    fields: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    return {**fields, "said": printed.err}


def test_a_model_that_was_imported_is_the_base(
    fake_ollama: FakeOllama, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q3: prompts, stops and weights; nothing is left in the server or changed there."""
    with Ollama(fake_ollama.url) as server:
        import_model(server, "yoda", exported, hand_over_of(exported))
        digest = server.digest("yoda")
    fields = verified(fake_ollama, capsys)
    assert fields["ok"] is True and [one["to"] for one in fields["handovers"]][-1] == "GGUF f16"
    found = fields["ollama"]
    assert (found["name"], found["digest"], found["way"]) == ("yoda", digest, "jinja")
    assert found["prompts"] > 40 and found["counted"] == 12 and found["differ"] == []
    assert set(fake_ollama.models) == {"yoda:latest"}


@pytest.mark.slow
def test_weights_without_the_adapter_that_they_should_have(
    fake_ollama: FakeOllama, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ollama(fake_ollama.url) as server:
        import_model(server, "yoda", exported, hand_over_of(exported))
    adapter = make_adapter(TINY, tmp_path / "adapter")
    fields = verified(fake_ollama, capsys, "--adapter", str(adapter), code=5)
    assert fields["broken_stage"] == "merge" and fields["ollama"]["differ"] == []


@pytest.mark.parametrize(
    ("version", "fields", "way"),
    [
        ("0.33.0", {}, "jinja"),
        ("0.33.0", {"template": CHATML_GO}, "go"),
        ("0.12.6", {"template": CHATML_GO}, "go"),
        ("0.33.0", {"renderer": "qwen3-coder", "template": CHATML_GO}, "renderer"),
    ],
)  # fmt: skip
def test_weights_that_are_elsewhere_are_not_proved(
    exported: Path, capsys: pytest.CaptureFixture[str], version: str, fields: dict[str, str], way: str
) -> None:
    """As of a server in a container; which of RENDERER, TEMPLATE and the GGUF's Jinja counts is said."""
    with FakeOllama(version=version, store=Path("/root/.ollama/models/blobs")) as fake:
        with Ollama(fake.url) as server:
            make(server, "yoda", exported, parameters=PARAMETERS, **fields)
        answer = verified(fake, capsys, code=5)
    error, found = answer["error"], answer["ollama"]
    assert error["message"].startswith("the weights of yoda in Ollama are not proved; its prompts and stops")
    assert "is not on this machine" in error["problems"][0]["message"] and "--gguf" in error["hint"]
    assert (found["way"], found["differ"]) == (way, []) and found["prompts"] > 40
    assert found["not_proved"] and answer["ok"] is False and "handovers" not in answer


def test_what_differs_is_named(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another TEMPLATE, a stop that lacks; a SYSTEM and settings are for the reader to judge."""
    wrong = CHATML_GO.replace("<|im_end|>", "<|endoftext|>")
    with FakeOllama(store=Path("/root/.ollama/models/blobs")) as fake:
        with Ollama(fake.url) as server:
            make(
                server, "yoda", exported, template=wrong, system="Be brief.",
                parameters={"stop": ["Human:"], "temperature": 0.7},
            )  # fmt: skip
        answer = verified(fake, capsys, code=5)
    problems = {one["field"].rpartition(": ")[2]: one["message"] for one in answer["error"]["problems"]}
    assert problems["stops"] == "no stop for <|im_end|>: a reply may not end"
    assert "<|im_end|>" in problems["trained on"] and "<|endoftext|>" in problems["Ollama"]
    assert "not proved" in problems
    for note in (
        "Be brief.",
        "it stops at Human: too",
        "temperature is 0.7, of the base's own none",
        "num_ctx",
    ):
        assert note in answer["said"]


def test_a_second_bos_is_counted(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOllama(store=Path("/root"), counts_more=1) as fake:
        with Ollama(fake.url) as server:
            make(server, "yoda", exported, parameters=PARAMETERS)
        answer = verified(fake, capsys, code=5)
    assert any("tokens" in one["message"] for one in answer["ollama"]["differ"])


def test_bytes_that_are_not_those_of_their_name(
    fake_ollama: FakeOllama, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ollama(fake_ollama.url) as server:
        make(server, "yoda", exported, parameters=PARAMETERS)
    blob = fake_ollama.blob(fake_ollama.models["yoda:latest"].blob)
    blob.write_bytes(blob.read_bytes() + b"x")
    answer = verified(fake_ollama, capsys, code=5)
    assert "has not the bytes that its name says" in answer["error"]["problems"][0]["message"]


def test_bad_input(fake_ollama: FakeOllama, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no model yoda" in verified(fake_ollama, capsys, code=2)["error"]["message"]
    for more in (("--gguf", "a.gguf"), ("--max-kl", "nan")):
        assert verified(fake_ollama, capsys, *more, code=2)["error"]["hint"]
    assert (
        run_command(["verify", "--base", "builtin:tiny", "--gguf", "a.gguf", "--host", fake_ollama.url]) == 2
    )
    assert "--host" in capsys.readouterr().err
