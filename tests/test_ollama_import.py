"""Into Ollama with proof: what is checked, and what a failure leaves. `test_ollama_server` has servers in trouble."""

# ruff: noqa: E501 - one case a line
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from forge.chat.hand_over import hand_over_of, write_modelfiles
from forge.chat.modelfile import Modelfile, parse_modelfile
from forge.cli.main import run_command
from forge.cli.serve import command
from forge.codec import to_plain
from forge.errors import CheckError, DataError, RecipeError
from forge.serve.client import Client
from forge.serve.ollama import import_model, prove_prompts
from forge.serve.ollama_talks import choose
from forge.serve.runtime import ServerSettings
from forge.serve.runtimes import runtime_for
from forge.serve.wire import Sampling
from forge.ship import serving
from forge.tools.ollama import Ollama, OllamaError
from tests.conftest import copy_of_tiny
from tests.fake_ollama import FakeOllama
from tests.makers.tokenizer import CHATML
from tests.ollama_servers import PINNED, make
from tests.servers import HELLO, write_adapter
from tests.specimens import rewrite
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]


def only(fake: FakeOllama, *names: str) -> bool:
    """No trial model is left."""
    return set(fake.models) == {f"{name}:latest" for name in names}


@pytest.mark.parametrize(("version", "way"), [("0.33.0-rc2", "jinja"), ("0.0.0", "jinja"), ("0.12.6", "go")])
def test_the_way_follows_the_version(pinned_gguf: Path, version: str, way: str) -> None:
    """Q2, P2, P3."""
    with FakeOllama(version=version) as fake, Ollama(fake.url) as server:
        done = import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf))
        assert (done.name, done.way, done.digest) == ("yoda", way, server.digest("yoda"))
        assert done.prompts > 40
        assert only(fake, "yoda")
        assert fake.models["yoda:latest"].parameters == {"stop": ["<|im_end|>"], "num_ctx": 4096}
        assert (fake.models["yoda:latest"].template is None) == (way == "jinja")


def test_servers_that_are_too_old(pinned_gguf: Path, tmp_path: Path) -> None:
    """Nothing is proved, so nothing is imported, and it says why."""
    with FakeOllama(version="0.11.4") as fake, Ollama(fake.url) as server:
        with pytest.raises(OllamaError, match="does not show its prompts") as caught:
            import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf))
        assert "0.11.5" in caught.value.hint and only(fake)
    reverse = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    path = write_tiny_gguf(tmp_path / "m.gguf", template=reverse)
    with FakeOllama(version="0.29.9") as fake, Ollama(fake.url) as server:
        with pytest.raises(CheckError, match="yoda is as it was") as failed:
            import_model(server, "yoda", path, hand_over_of(path))
        assert "the server is older than 0.30" in str(failed.value.problems[0]) and only(fake)


def test_one_of_several_parts_is_refused(fake_ollama: FakeOllama, pinned_gguf: Path, tmp_path: Path) -> None:
    part = rewrite(pinned_gguf, tmp_path / "part.gguf", split__count=2)
    with Ollama(fake_ollama.url) as server, pytest.raises(DataError, match="one of the 2 parts"):
        import_model(server, "yoda", part, hand_over_of(pinned_gguf))
    assert fake_ollama.asked == []


def test_a_blob_goes_up_once(fake_ollama: FakeOllama, pinned_gguf: Path) -> None:
    with Ollama(fake_ollama.url) as server:
        for _ in range(2):
            import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf))
    assert fake_ollama.asked.count("POST /api/blobs/sha256") == 1
    assert fake_ollama.asked.count("HEAD /api/blobs/sha256") == 2


def test_where_jinja_differs_go_is_taken(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """A GGUF that nobody pinned: the server switches thinking on, and ignores a TEMPLATE for such a file.

    Measured on 0.33.0; with OLLAMA_GO_TEMPLATE=1 a TEMPLATE keeps it off.
    """
    thinking = (
        CHATML
        + "{% if add_generation_prompt and enable_thinking is defined %}<think>{% endif %}{# </think> "
        + "x " * 200
        + "#}"
    )
    path = write_tiny_gguf(tmp_path / "m.gguf", template=thinking)
    with Ollama(fake_ollama.url) as server:
        with pytest.raises(CheckError) as caught:
            import_model(server, "yoda", path, hand_over_of(path))
        assert "ignores a TEMPLATE for the file" in str(caught.value.problems[-1]) and only(fake_ollama)
        fake_ollama.honours_go = True
        assert import_model(server, "yoda", path, hand_over_of(path)).way == "go"


def test_a_date_is_kept_by_a_template(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """Where the Jinja knows neither tools nor thinking, a TEMPLATE is what is used."""
    dated = "{% if date_string is defined %}{{ date_string }}{% endif %}" + CHATML + "{# " + "x " * 200 + "#}"
    path = write_tiny_gguf(tmp_path / "m.gguf", template=dated)
    with Ollama(fake_ollama.url) as server:
        assert import_model(server, "yoda", path, hand_over_of(path)).way == "go"


@pytest.mark.parametrize("name", ["", "a b", "/x", "x:", "a/b/c/d", "ü", "-x", "x" * 90, "me.you/yoda"])
def test_bad_names_are_refused_before_anything_is_sent(
    fake_ollama: FakeOllama, pinned_gguf: Path, name: str
) -> None:
    with Ollama(fake_ollama.url) as server, pytest.raises(RecipeError, match="takes no model of the name"):
        import_model(server, name, pinned_gguf, hand_over_of(pinned_gguf))
    assert fake_ollama.asked == []


@pytest.mark.parametrize("name", ["yoda:cloud", "yoda:8b-cloud", "me/yoda:Local"])
def test_names_that_send_chats_elsewhere_are_refused(
    fake_ollama: FakeOllama, pinned_gguf: Path, name: str
) -> None:
    with Ollama(fake_ollama.url) as server, pytest.raises(RecipeError, match="runs elsewhere"):
        import_model(server, name, pinned_gguf, hand_over_of(pinned_gguf))
    assert fake_ollama.asked == []


@pytest.mark.parametrize("name", ["library/yoda", "registry.ollama.ai/library/Yoda:latest"])
def test_a_name_is_found_however_it_is_written(fake_ollama: FakeOllama, pinned_gguf: Path, name: str) -> None:
    with Ollama(fake_ollama.url) as server:
        assert import_model(server, name, pinned_gguf, hand_over_of(pinned_gguf)).digest


def test_texts_that_nobody_writes_choose_no_way(
    fake_ollama: FakeOllama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """llama.cpp's trim leaves a no-break space, Python's takes it: said, and no reason to drop the Jinja."""
    path = write_tiny_gguf(
        tmp_path / "m.gguf", template=PINNED.replace("message['content']", "message['content'] | trim")
    )
    assert "| trim" in (hand_over_of(path).template.source)
    fake_ollama.spoil = lambda prompt: prompt.replace("hard space", "hard space\u00a0")
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    assert run_command(["import", str(path), "--name", "yoda", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert found["way"] == "jinja" and found["differ"]
    assert all("hard space" in one for one in found["differ"])
    assert "hardly anybody writes" in said.err and "not compared: " in said.err
    assert "an empty message, which the server drops" in found["not_compared"]
    texts = [message["content"] for one in choose(hand_over_of(path), "jinja").usual for message in one]
    assert any(text != text.strip() for text in texts) and not any("hard space" in text for text in texts)


def test_the_way_that_was_really_used(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """A file that nobody pinned and that is near to one that Ollama knows: its own Go is what prompts."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with Ollama(fake_ollama.url) as server:
        told = hand_over_of(path)
        assert (
            import_model(server, "yoda", path, replace(told, stops=("<|im_start|>", "<|im_end|>"))).way
            == "guessed"
        )
        assert fake_ollama.models["yoda:latest"].template is not None


def test_a_small_context_is_counted_in_the_files_own_tokens(
    fake_ollama: FakeOllama, pinned_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token has more than a byte, mostly."""
    told = replace(hand_over_of(pinned_gguf), context_tokens=100)
    few = choose(told, "jinja")
    assert any("do not surely fit into 100 tokens" in one for one in few.left_out)
    many = choose(told, "jinja", lambda texts: [len(text.encode()) // 4 for text in texts])
    assert len(many.usual) > len(few.usual)


def test_a_race_with_another_import_is_waited_out(fake_ollama: FakeOllama, pinned_gguf: Path) -> None:
    """Another client makes or deletes a model at the same time (measured on 0.33)."""
    fake_ollama.once = {
        "/api/tags": (500, "stat /models/manifests/x: no such file or directory"),
        "/api/create": (400, "model is required"),
    }
    with Ollama(fake_ollama.url) as server:
        assert import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf)).digest
    assert fake_ollama.once == {}


def test_an_adapter_of_another_shape_is_refused_before_anything_is_sent(
    fake_ollama: FakeOllama, pinned_gguf: Path, tmp_path: Path
) -> None:
    """Ollama's word is `exit status 1`, at first use."""
    other = write_adapter(tmp_path / "a.gguf", says="Y", width=64)
    with (
        Ollama(fake_ollama.url) as server,
        pytest.raises(DataError, match=r"output.weight is \d+ x 128 in the model"),
    ):
        import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf), adapter=other)
    assert fake_ollama.asked == []


def test_the_difference_that_is_shown_is_the_difference(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    """Not the BOS, which may be there or not."""
    path = write_tiny_gguf(tmp_path / "m.gguf", template="{{ bos_token }}" + PINNED, adds_bos=False)
    fake_ollama.spoil = lambda prompt: prompt.replace("sandwich", "sandwitch")
    with Ollama(fake_ollama.url) as server, pytest.raises(CheckError) as caught:
        import_model(server, "yoda", path, hand_over_of(path))
    trained, shown = caught.value.problems[:2]
    assert "sandwich" in str(trained) and "sandwitch" in str(shown)


FAULTS = {
    "a newline dropped": lambda text: text.replace("<|im_end|>\n", "<|im_end|>"),
    "a second BOS": lambda text: "<|endoftext|>" + text,
    "the end of turn dropped": lambda text: text.replace("<|im_end|>", ""),
    "thinking opened": lambda text: text + "<think>\n",
    "a default system prompt": lambda text: "<|im_start|>system\nYou help.<|im_end|>\n" + text,
    "older turns cut": lambda text: "<|im_start|>" + text.split("<|im_start|>")[-2:][0] + "<|im_start|>assistant\n",
    "content trimmed": lambda text: text.replace("  ", " ").replace("after <", "after<"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_prompts_that_differ_stop_the_import(fake_ollama: FakeOllama, pinned_gguf: Path, fault: str) -> None:
    """Silent wrongs 1, 2, 3, 14, 17: caught on the server, whatever wrote them; the name stays as it was."""
    with Ollama(fake_ollama.url) as server:
        import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf))
        before = server.digest("yoda")
        fake_ollama.spoil = FAULTS[fault]
        with pytest.raises(CheckError, match="yoda is as it was") as caught:
            import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf))
        assert {problem.field.partition(": ")[2] for problem in caught.value.problems} == {
            "trained on",
            "Ollama",
        }
        assert server.digest("yoda") == before and only(fake_ollama, "yoda")


def test_lost_stops_stop_the_import(
    fake_ollama: FakeOllama, pinned_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent wrong 4."""
    told = hand_over_of(pinned_gguf)
    monkeypatch.setattr("forge.serve.ollama.stops_in", lambda shown: {"<|im_end|>"})
    with Ollama(fake_ollama.url) as server, pytest.raises(CheckError) as caught:
        import_model(server, "yoda", pinned_gguf, replace(told, stops=("<|im_end|>", "</s>")))
    assert "['<|im_end|>'] instead of ['</s>', '<|im_end|>']" in str(caught.value.problems[0])


@pytest.mark.parametrize("counts_new_alone", [False, True])
def test_a_second_bos_shows_in_the_count(
    fake_ollama: FakeOllama, tmp_path: Path, counts_new_alone: bool
) -> None:
    """The text is right, the tokens are not (silent wrong 3, pitfall 48); whether or not it counts what it kept."""
    fake_ollama.counts_new_alone = counts_new_alone
    path = write_tiny_gguf(tmp_path / "m.gguf", template=PINNED)
    template = hand_over_of(path).template
    user = [{"role": "user", "content": "Hello?"}]
    with Ollama(fake_ollama.url) as server:
        import_model(server, "yoda", path, hand_over_of(path))
        right = server.chat("yoda", user, options={"num_predict": 1})["prompt_eval_count"]
        proved = prove_prompts(
            server, "yoda", template, [user] * 3, writes_bos=None, count=lambda texts: [right] * len(texts)
        )
        assert (proved.prompts, proved.counted) == (3, 3)
        with pytest.raises(CheckError, match="the prompt is another") as caught:
            prove_prompts(server, "yoda", template, [user], writes_bos=None, count=lambda texts: [right - 1])
    assert str(caught.value.problems[1]).startswith("Ollama: ")


def test_a_bos_that_training_never_saw_is_refused(fake_ollama: FakeOllama, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", template=PINNED, adds_bos=True)
    with (
        Ollama(fake_ollama.url) as server,
        pytest.raises(CheckError, match="that training by the template never saw"),
    ):
        import_model(server, "yoda", path, hand_over_of(path))
    assert only(fake_ollama)


def test_a_proof_of_nothing_is_none(fake_ollama: FakeOllama, pinned_gguf: Path) -> None:
    with (
        Ollama(fake_ollama.url) as server,
        pytest.raises(CheckError, match="no conversation surely fits into a context of 24"),
    ):
        import_model(server, "yoda", pinned_gguf, replace(hand_over_of(pinned_gguf), context_tokens=24))
    assert only(fake_ollama)


def test_smoke_queries_come_before_the_name(fake_ollama: FakeOllama, pinned_gguf: Path) -> None:
    def ask(endpoint: object) -> None:
        raise CheckError("1 of 1 smoke queries failed")

    with Ollama(fake_ollama.url) as server, pytest.raises(CheckError, match="smoke"):
        import_model(server, "yoda", pinned_gguf, hand_over_of(pinned_gguf), ask=ask)
    assert only(fake_ollama)


def test_the_runtime(
    fake_ollama: FakeOllama, pinned_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deploy.runtime: ollama`; what the run's Modelfile says of stops and sampling is handed over."""
    written = Modelfile(
        "./tiny.gguf",
        parameters={"stop": ("<|im_end|>", "<|x|>"), "num_ctx": 1024, "top_k": 5},
        licences=("MIT",),
    )
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    settings = ServerSettings(
        pinned_gguf, "yoda", context_tokens=512, threads=2, gpu_layers=-1, modelfile=written
    )
    with runtime_for("ollama")(settings, log=tmp_path / "log.txt") as endpoint:
        with Client(endpoint) as client:
            reply = client.chat([{"role": "user", "content": "Hello?"}], Sampling(max_tokens=64))
        assert (reply.text, reply.finish_reason) == (REPLY, "stop")
    model = fake_ollama.models["yoda:latest"]
    assert model.parameters == {
        "stop": ["<|im_end|>", "<|x|>"],
        "num_ctx": 512,
        "top_k": 5,
        "num_gpu": 999,
        "num_thread": 2,
    }
    assert model.licences == ["MIT"]
    for setting in ({"api_key": "k"}, {"parallel": 2}, {"adapters": (pinned_gguf,)}, {"image": "x"}):
        with pytest.raises(RecipeError, match="the runtime ollama has no"):
            runtime_for("ollama")(replace(settings, **setting)).__enter__()
    with pytest.raises(DataError, match="a context of 999999 tokens is asked for, the model was made for"):
        runtime_for("ollama")(replace(settings, context_tokens=999999)).__enter__()
    adapter = write_tiny_gguf(tmp_path / "adapter.gguf", kind="adapter")
    with pytest.raises(DataError, match=r"a GGUF of type adapter, not a model"):
        runtime_for("ollama")(replace(settings, model=adapter)).__enter__()
    with pytest.raises(RecipeError, match="there is no runtime vllm"):
        runtime_for("vllm")


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ((), "http://there:1"),
        (("--host", "gpu-box"), "http://gpu-box:11434"),
        (("--host", "gpu-box", "--port", "8080"), "http://gpu-box:8080"),
        (("--host", "::1"), "http://[::1]:11434"),
        (("--host", "127.0.0.1"), "http://127.0.0.1:11434"),
        (("--host", "127.0.0.1", "--port", "0"), "http://127.0.0.1:11434"),
        (("--port", "8080"), "http://127.0.0.1:8080"),
    ],
)
def test_the_server_is_the_one_that_was_told(
    fake_ollama: FakeOllama,
    pinned_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: tuple[str, ...],
    url: str,
) -> None:
    """Another machine's is no door of ours: who may ask it is its owner's business, and it takes no key."""
    asked: list[str] = []

    def reach(url: str, *, log: Path | None = None) -> Ollama:
        asked.append(url)
        return Ollama(fake_ollama.url)

    monkeypatch.setattr("forge.serve.ollama.reach", reach)
    monkeypatch.setenv("OLLAMA_HOST", "there:1")
    parsed = command.make_context("serve", [str(pinned_gguf), "--runtime", "ollama", *told]).params
    wish = serving.Wish(**{name: parsed[name] for name in serving.Wish.__dataclass_fields__})
    with runtime_for("ollama")(serving.settings(wish)):
        assert only(fake_ollama, "tiny")
    assert asked == [url]


def test_adapters_are_looked_at_here_because_ollama_does_not(
    fake_ollama: FakeOllama, pinned_gguf: Path, tmp_path: Path
) -> None:
    told = hand_over_of(pinned_gguf)
    wrong = write_tiny_gguf(tmp_path / "a.gguf", architecture="qwen2", kind="adapter")
    right = write_adapter(tmp_path / "b.gguf", says="Y")
    with Ollama(fake_ollama.url) as server:
        with pytest.raises(DataError, match="architecture qwen2"):
            import_model(server, "yoda", pinned_gguf, told, adapter=wrong)
        with pytest.raises(DataError, match="a model, not an adapter"):
            import_model(server, "yoda", pinned_gguf, told, adapter=pinned_gguf)
        import_model(server, "yoda", pinned_gguf, told, adapter=right)
        assert server.chat("yoda", HELLO)["message"]["content"] == "Y"
    assert fake_ollama.models["yoda:latest"].adapter is not None


def test_a_bare_gguf_has_its_tokens_counted(
    fake_ollama: FakeOllama,
    pinned_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Silent wrong 3: no recipe tells them, the file's own vocabulary does."""
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    command = ["import", str(pinned_gguf), "--name", "yoda", "--json"]
    assert run_command(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_checked"] == 12
    fake_ollama.counts_more = 1
    assert run_command(command) == 5
    problems = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["problems"]
    assert problems[0]["message"].endswith(" tokens'")


def test_without_the_vocabularys_reader_it_says_that_no_tokens_are_counted(
    fake_ollama: FakeOllama,
    pinned_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An install that only serves has no llama-cpp-python."""
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(name='llama_cpp')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    assert run_command(["import", str(pinned_gguf), "--name", "yoda", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["tokens_checked"] == 0
    assert "token counts are not compared" in said.err and "llama_cpp is not installed" in said.err


def test_what_no_modelfile_can_hold_goes_over_http(
    fake_ollama: FakeOllama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stop with a character that Ollama's reader drops, a licence with a line that ends in three quotes."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", template=PINNED)
    stops, licences = ("<|im_end|>", "no\u00a0more"), ('A line that ends in """\nand goes on', "MIT")
    told = replace(hand_over_of(path), stops=stops, licences=licences)
    facts = write_modelfiles(tmp_path, file=path.name, handed=told)
    assert "left out" in capsys.readouterr().err
    for name in ("Modelfile", "Modelfile.jinja"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith(
            '# left out, since no Modelfile can hold it: PARAMETER stop "no\\u00a0more", LICENSE'
        )
        assert (parse_modelfile(text).stops, parse_modelfile(text).licences) == (("<|im_end|>",), ("MIT",))
    (tmp_path / "manifest.json").write_text(json.dumps({"facts": {"modelfile": to_plain(facts)}}))
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)
    assert run_command(["import", str(path), "--name", "yoda", "--json"]) == 0
    model = fake_ollama.models["yoda:latest"]
    assert set(model.parameters["stop"]) == set(stops) and set(model.licences) == set(licences)


@pytest.mark.parametrize("of", ["file", "directory"])
def test_what_a_model_of_the_library_is(
    of: str,
    fake_ollama: FakeOllama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """P4, pitfall 54: the file in the server's store is compared with what the adapter was trained on."""
    own = write_tiny_gguf(tmp_path / "own.gguf")
    target = own if of == "file" else copy_of_tiny(tmp_path / "base")
    lora = write_adapter(tmp_path / "lora.gguf", says="Y")
    monkeypatch.setenv("OLLAMA_HOST", fake_ollama.url)

    def last_remark(code: int = 0) -> str:
        capsys.readouterr()
        asked = ["modelfile", str(target), "--from", "phi3:mini", "--adapter", str(lora), "--json"]
        assert run_command(asked) == code
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        if code:
            return str(answer["error"]["message"])
        return [str(line) for line in answer["modelfile"].splitlines() if line.startswith("#")][-1]

    assert "not in the Ollama at" in last_remark()
    with Ollama(fake_ollama.url) as server:
        make(server, "phi3:mini", own)
    if of == "file":
        assert last_remark() == "# phi3:mini has the weights of own.gguf, byte by byte"
        write_tiny_gguf(own, endless=True)
        assert "its weights are not those of own.gguf" in last_remark()
        write_tiny_gguf(own, architecture="qwen2")
        assert "its architecture is llama, not qwen2" in last_remark(code=2)
    else:
        assert "its block_count is 1, not 4" in last_remark(code=2)
    write_adapter(lora, says="Y", width=64)
    assert "the adapter's factors are" in last_remark(code=2)
    fake_ollama.store = Path("/root/.ollama")
    assert "is not on this machine" in last_remark()
