"""Into Ollama with proof: what is checked, what a failure leaves, and servers that are down, full or slow."""

# ruff: noqa: E501 - one case a line
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from forge.chat.hand_over import hand_over_of
from forge.chat.template import ChatTemplate
from forge.cli.main import run
from forge.errors import CheckError, DataError, MissingToolError, RecipeError, StageError
from forge.model.builtin.tokenizer import CHATML
from forge.serve.client import Client
from forge.serve.ollama import import_model, prove_prompts
from forge.serve.runtime import Settings
from forge.serve.runtimes import check_runtime, runtime_for
from forge.serve.wire import Sampling
from forge.tools import ollama as tool
from forge.tools.ollama import Ollama, OllamaError, server_url
from forge.tools.ollama_server import reach
from tests.fake_ollama import FakeOllama
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]
PINNED = ChatTemplate(CHATML, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}).pinned_source()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", template=PINNED)


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


def only(fake: FakeOllama, *names: str) -> bool:
    """No trial model is left."""
    return set(fake.models) == {f"{name}:latest" for name in names}


@pytest.mark.parametrize(("version", "way"), [("0.33.0-rc2", "jinja"), ("0.0.0", "jinja"), ("0.12.6", "go")])
def test_the_way_follows_the_version(gguf: Path, version: str, way: str) -> None:
    """Q2, P2, P3."""
    with FakeOllama(version=version) as fake, Ollama(fake.url) as server:
        done = import_model(server, "yoda", gguf, hand_over_of(gguf))
        assert (done.name, done.way, done.digest) == ("yoda", way, server.digest("yoda"))
        assert done.prompts > 40
        assert only(fake, "yoda")
        assert fake.models["yoda:latest"].parameters == {"stop": ["<|im_end|>"], "num_ctx": 4096}
        assert (fake.models["yoda:latest"].template is None) == (way == "jinja")


def test_servers_that_are_too_old(gguf: Path, tmp_path: Path) -> None:
    """Nothing is proved, so nothing is imported, and it says why."""
    with FakeOllama(version="0.11.4") as fake, Ollama(fake.url) as server:
        with pytest.raises(OllamaError, match="does not show its prompts") as caught:
            import_model(server, "yoda", gguf, hand_over_of(gguf))
        assert "0.11.5" in caught.value.hint and only(fake)
    reverse = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    path = write_tiny_gguf(tmp_path / "m.gguf", template=reverse)
    with FakeOllama(version="0.29.9") as fake, Ollama(fake.url) as server:
        with pytest.raises(CheckError, match="yoda is as it was") as failed:
            import_model(server, "yoda", path, hand_over_of(path))
        assert "the server is older than 0.30" in str(failed.value.problems[0]) and only(fake)


def test_a_blob_goes_up_once(fake: FakeOllama, gguf: Path) -> None:
    with Ollama(fake.url) as server:
        for _ in range(2):
            import_model(server, "yoda", gguf, hand_over_of(gguf))
    assert fake.asked.count("POST /api/blobs/sha256") == 1
    assert fake.asked.count("HEAD /api/blobs/sha256") == 2


def test_where_jinja_differs_go_is_taken(fake: FakeOllama, tmp_path: Path) -> None:
    """A GGUF that nobody pinned: the server switches thinking on, a TEMPLATE keeps it off."""
    thinking = (
        CHATML
        + "{% if add_generation_prompt and enable_thinking is defined %}<think>{% endif %}{# "
        + "x " * 200
        + "#}"
    )
    path = write_tiny_gguf(tmp_path / "m.gguf", template=thinking)
    with Ollama(fake.url) as server:
        assert import_model(server, "yoda", path, hand_over_of(path)).way == "go"


FAULTS = {
    "a newline dropped": lambda text: text.replace("<|im_end|>\n", "<|im_end|>"),
    "a second BOS": lambda text: "<|endoftext|>" + text,
    "the end of turn dropped": lambda text: text.replace("<|im_end|>", ""),
    "thinking opened": lambda text: text + "<think>\n",
    "a default system prompt": lambda text: "<|im_start|>system\nYou help.<|im_end|>\n" + text,
    "older turns cut": lambda text: "<|im_start|>" + text.split("<|im_start|>")[-2] + "<|im_start|>assistant\n",
    "content trimmed": lambda text: text.replace("  ", " ").replace("after <", "after<"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_prompts_that_differ_stop_the_import(fake: FakeOllama, gguf: Path, fault: str) -> None:
    """Silent wrongs 1, 2, 3, 14, 17: caught on the server, whatever wrote them; the name stays as it was."""
    with Ollama(fake.url) as server:
        import_model(server, "yoda", gguf, hand_over_of(gguf))
        before = server.digest("yoda")
        fake.spoil = FAULTS[fault]
        with pytest.raises(CheckError, match="yoda is as it was") as caught:
            import_model(server, "yoda", gguf, hand_over_of(gguf))
        assert {problem.field.partition(": ")[2] for problem in caught.value.problems} == {
            "trained on",
            "Ollama",
        }
        assert server.digest("yoda") == before and only(fake, "yoda")


def test_lost_stops_stop_the_import(fake: FakeOllama, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent wrong 4."""
    told = hand_over_of(gguf)
    monkeypatch.setattr("forge.serve.ollama.stops_in", lambda shown: {"<|im_end|>"})
    with Ollama(fake.url) as server, pytest.raises(CheckError) as caught:
        import_model(server, "yoda", gguf, replace(told, stops=("<|im_end|>", "</s>")))
    assert "['<|im_end|>'] instead of ['</s>', '<|im_end|>']" in str(caught.value.problems[0])


@pytest.mark.parametrize("counts_new_alone", [False, True])
def test_a_second_bos_shows_in_the_count(fake: FakeOllama, tmp_path: Path, counts_new_alone: bool) -> None:
    """The text is right, the tokens are not (silent wrong 3, pitfall 48); whether or not it counts what it kept."""
    fake.counts_new_alone = counts_new_alone
    path = write_tiny_gguf(tmp_path / "m.gguf", template=PINNED)
    template = hand_over_of(path).template
    user = [{"role": "user", "content": "Hello?"}]
    with Ollama(fake.url) as server:
        import_model(server, "yoda", path, hand_over_of(path))
        right = server.chat("yoda", user, options={"num_predict": 1})["prompt_eval_count"]
        prove_prompts(server, "yoda", template, [user] * 3, writes_bos=None, count=lambda text: right)
        with pytest.raises(CheckError, match="the prompt is another") as caught:
            prove_prompts(server, "yoda", template, [user], writes_bos=None, count=lambda text: right - 1)
    assert str(caught.value.problems[1]).startswith("Ollama: ")


def test_a_bos_that_training_never_saw_is_refused(fake: FakeOllama, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", template=PINNED, adds_bos=True)
    with (
        Ollama(fake.url) as server,
        pytest.raises(CheckError, match="that training by the template never saw"),
    ):
        import_model(server, "yoda", path, hand_over_of(path))
    assert only(fake)


def test_a_proof_of_nothing_is_none(fake: FakeOllama, gguf: Path) -> None:
    with (
        Ollama(fake.url) as server,
        pytest.raises(CheckError, match="no conversation fits into a context of 24"),
    ):
        import_model(server, "yoda", gguf, replace(hand_over_of(gguf), context_tokens=24))
    assert only(fake)


def test_stops_are_read_as_go_quotes_them() -> None:
    quoted = {
        r'"\x7f"': "\x7f",
        r'"\U000e0001"': "\U000e0001",
        r'"\u00a0<|x|>"': "\u00a0<|x|>",
        r'"a\n\"\\\a"': 'a\n"\\\a',
        '"é漢"': "é漢",
        "plain": "plain",
    }
    shown = "\n".join(f"stop                           {text}" for text in quoted)
    assert tool.stops_in({"parameters": f"{shown}\nnum_ctx    5"}) == set(quoted.values())
    with pytest.raises(OllamaError, match="not quoted as Go does"):
        tool.stops_in({"parameters": r'stop "\q"'})


def test_smoke_queries_come_before_the_name(fake: FakeOllama, gguf: Path) -> None:
    def ask(endpoint: object) -> None:
        raise CheckError("1 of 1 smoke queries failed")

    with Ollama(fake.url) as server, pytest.raises(CheckError, match="smoke"):
        import_model(server, "yoda", gguf, hand_over_of(gguf), ask=ask)
    assert only(fake)


TROUBLES = {
    "full": (("/api/blobs/", "error", 500, "write blob: no space left on device"), "no space left on device", "its disk is full"),
    "500": (("/api/create", "error", 500, "out of luck"), r"\(500\): out of luck", ""),
    "dies in an upload": (("/api/blobs/", "die", 0, ""), "broke off while it", "its own log"),
    "dies in a chat": (("/api/chat", "die", 0, ""), "broke off while it", "its own log"),
    "a late error": (("/api/create", "late", 0, "llama-quantize: exit status 1"), "made forge-import-.*: llama-quantize: exit status 1", ""),
    "no debug rendering": (("/api/chat", "error", 404, "404 page not found"), r"\(404\)", ""),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_server_in_trouble_is_one_clear_error(fake: FakeOllama, tmp_path: Path, trouble: str) -> None:
    (route, kind, status, message), said, hint = TROUBLES[trouble]
    path = write_tiny_gguf(tmp_path / "m.gguf", template=PINNED)
    with Ollama(fake.url) as server:
        import_model(server, "yoda", path, hand_over_of(path))
        other = write_tiny_gguf(tmp_path / "n.gguf", template=PINNED, reply="Another, this is.")
        before = server.digest("yoda")
        fake.troubles[route.rstrip("/")] = fake.troubles[route] = (kind, status, message)
        with pytest.raises(OllamaError, match=said) as caught:
            import_model(server, "yoda", other, hand_over_of(other))
        fake.troubles.clear()
        assert hint in caught.value.hint
        assert server.digest("yoda") == before


def test_a_server_that_does_not_answer_in_time(fake: FakeOllama) -> None:
    fake.troubles["/api/version"] = ("slow", 1, "")
    with Ollama(fake.url, timeout=httpx.Timeout(0.2)) as server:
        with pytest.raises(OllamaError, match="gave no answer in time while it asked its version"):
            server.version()


def test_another_server_at_that_address(fake: FakeOllama) -> None:
    fake.version = '"'
    with Ollama(f"{fake.url}/nowhere") as server, pytest.raises(OllamaError, match=r"\(404\)"):
        server.version()


def test_a_missing_server_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pitfall 55."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert run(["import", str(gguf), "--name", "yoda", "--json"]) == 3
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert told["message"] == "no Ollama server answers at http://127.0.0.1:9"
    assert told["hint"].startswith("start it with: ollama serve")
    with pytest.raises(MissingToolError):
        check_runtime("ollama")


def test_it_is_started_where_the_program_is_here(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q1: for the time of the command, and stopped after it."""
    import socket
    import sys

    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntest "$1" = serve && exec {sys.executable} -m tests.fake_ollama\n')
    program.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    check_runtime("ollama")
    assert run(["import", str(gguf), "--name", "yoda", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["name"] == "yoda" and told["prompt_checked"] > 40 and told["digest"]
    with pytest.raises(MissingToolError):
        Ollama(server_url()).version()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.0.1", "[::1]"])
def test_a_program_that_does_not_start(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of this machine is one: it is tried there."""
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(StageError, match="was started and does not answer"):
        with reach(f"http://{host}:9"):
            pass


def test_the_runtime(fake: FakeOllama, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`deploy.runtime: ollama`; what the run's Modelfile says of stops and sampling is handed over."""
    (tmp_path / "Modelfile.jinja").write_text(
        'FROM ./tiny.gguf\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|x|>"\nPARAMETER num_ctx 1024\nPARAMETER top_k 5\nLICENSE MIT\n'
    )
    monkeypatch.setenv("OLLAMA_HOST", fake.url)
    settings = Settings(
        gguf, "yoda", context_tokens=512, threads=2, gpu_layers=-1, modelfile=tmp_path / "Modelfile.jinja"
    )
    with runtime_for("ollama")(settings, log=tmp_path / "log.txt") as endpoint:
        with Client(endpoint) as client:
            reply = client.chat([{"role": "user", "content": "Hello?"}], Sampling(max_tokens=64))
        assert (reply.text, reply.finish_reason) == (REPLY, "stop")
    model = fake.models["yoda:latest"]
    assert model.parameters == {
        "stop": ["<|im_end|>", "<|x|>"],
        "num_ctx": 512,
        "top_k": 5,
        "num_gpu": 999,
        "num_thread": 2,
    }
    assert model.licences == ["MIT"]
    for setting in ({"api_key": "k"}, {"parallel": 2}, {"adapters": (gguf,)}, {"image": "x"}):
        with pytest.raises(RecipeError, match="the runtime ollama has no"):
            runtime_for("ollama")(replace(settings, **setting)).__enter__()
    with pytest.raises(DataError, match="a context of 999999 tokens is asked for, the model was made for"):
        runtime_for("ollama")(replace(settings, context_tokens=999999)).__enter__()
    with pytest.raises(RecipeError, match="others than this machine could use the server"):
        runtime_for("ollama")(replace(settings, host="example.com", port=1)).__enter__()
    adapter = write_tiny_gguf(tmp_path / "adapter.gguf", kind="adapter")
    with pytest.raises(DataError, match=r"a GGUF of type adapter, not a model"):
        runtime_for("ollama")(replace(settings, model=adapter)).__enter__()
    with pytest.raises(RecipeError, match="there is no runtime vllm"):
        runtime_for("vllm")


def test_adapters_are_looked_at_here_because_ollama_does_not(
    fake: FakeOllama, gguf: Path, tmp_path: Path
) -> None:
    told = hand_over_of(gguf)
    wrong = write_tiny_gguf(tmp_path / "a.gguf", architecture="qwen2", kind="adapter")
    right = write_tiny_gguf(tmp_path / "b.gguf", kind="adapter")
    with Ollama(fake.url) as server:
        with pytest.raises(DataError, match="architecture qwen2"):
            import_model(server, "yoda", gguf, told, adapter=wrong)
        with pytest.raises(DataError, match="a model, not an adapter"):
            import_model(server, "yoda", gguf, told, adapter=gguf)
        import_model(server, "yoda", gguf, told, adapter=right)
    assert fake.models["yoda:latest"].adapter is not None


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("example.com", "http://example.com:11434"),
        (":8080", "http://127.0.0.1:8080"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/ollama/", "https://example.com:443/ollama"),
        ("[::1]:5", "http://[::1]:5"),
        ('"127.0.0.1:1"', "http://127.0.0.1:1"),
    ],
)  # fmt: skip
def test_addresses_are_read_as_ollama_reads_them(
    monkeypatch: pytest.MonkeyPatch, told: str, url: str
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", told)
    assert server_url() == url
    assert server_url(told) == url


@pytest.mark.parametrize("told", ["127.0.0.1:port", "ftp://x", "127.0.0.1:99999"])
def test_no_addresses(told: str) -> None:
    with pytest.raises(RecipeError, match="not the address of a server"):
        tool.server_url(told)
