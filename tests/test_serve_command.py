"""`forge serve`, `ps` and `stop` as a person runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from forge.errors import RecipeError
from forge.serve.client import Client, find
from forge.serve.runtime import ServerSettings
from forge.serve.wire import RefusedError
from forge.ship.serving import Wish, read_key, settings
from tests.servers import HELLO, KEY, listens, servers_of, write_adapter
from tests.shipping import Answer, Workshop, processes_of, wait_for
from tests.tiny_gguf import REPLY, write_tiny_gguf


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workshop]:
    """A directory with a model, a key and an adapter. Nothing runs when the test is over."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    write_adapter(tmp_path / "yes.gguf", says="Y")
    (tmp_path / "key").write_text(KEY + "\n")
    workshop = Workshop(tmp_path, tmp_path / "home")
    yield workshop
    # A process that was killed may take a moment to be gone.
    _, left = psutil.wait_procs(processes_of(workshop.home), timeout=10)
    for one in left:
        one.kill()
    assert not left


def _everything_shown(place: Workshop, *answers: Answer) -> str:
    """What the commands answered, what the store holds, and what anybody sees of the processes."""
    shown = "".join(json.dumps(one.fields) + one.said for one in answers)
    for one in processes_of(place.home):
        shown += " ".join(one.cmdline()) + str(one.environ())
    files = (path for path in place.home.rglob("*") if path.is_file())
    return shown + "".join(path.read_text("utf-8", "replace") for path in files)


@pytest.mark.network
@pytest.mark.programs
@pytest.mark.parametrize(
    ("number", "flags", "slots"),
    # Up to eight where nobody says, by the memory that happens to be free.
    [(signal.SIGINT, ("--parallel", "3"), "3"), (signal.SIGTERM, (), "[1-8]")],
)
def test_serves_in_the_foreground_until_it_is_told_to_stop(
    place: Workshop, number: signal.Signals, flags: tuple[str, ...], slots: str
) -> None:
    with place.start("serve", "tiny.gguf", "--port", "0", "--json", *flags) as child:
        lines = child.lines()
        ready = json.loads(next(lines))
        assert ready == {
            "endpoint": ready["endpoint"], "model": "tiny", "pid": child.pid, "device": "CPU"
        }  # fmt: skip
        with Client(find(ready["endpoint"])) as client:
            assert client.chat(HELLO).text == REPLY
        os.kill(child.pid, number)
        assert json.loads(list(lines)[-1])["error"]["code"] == 130
        assert child.wait(60) == 130
    said = (place.directory / "errors.txt").read_text()
    assert re.search(f"context 4096 tokens, {slots} requests at once, ", said)
    assert " threads, on CPU" in said
    assert not listens(ready["endpoint"])


@pytest.mark.network
@pytest.mark.programs
def test_detach_ps_and_stop(place: Workshop) -> None:
    """The server outlives the command; its key is in no list, record, log or process table."""
    flags = ("--port", "0", "--api-key-file", "key", "--lora", "yes=yes.gguf", "--detach")
    started = place.forge("serve", "tiny.gguf", *flags)
    assert started.code == 0
    endpoint = find(started.fields["endpoint"], api_key=KEY)
    with Client(endpoint) as client:
        assert client.model_names() == ["tiny", "yes"]
        assert client.chat(HELLO).text == REPLY
    again = place.forge("serve", "tiny.gguf", "--port", "0", "--detach")
    assert (again.code, again.fields["error"]["message"]) == (2, "tiny is being served already")
    listed = place.forge("ps")
    [row] = listed.fields["running"]
    assert (row["name"], row["pid"], row["runtime"]) == ("tiny", started.fields["pid"], "embedded")
    assert KEY not in _everything_shown(place, started, listed)
    wrong = place.forge("stop", "other")
    assert (wrong.code, wrong.fields["error"]["hint"]) == (2, "running are: tiny")
    assert place.forge("stop", "tiny").fields == {"stopped": ["tiny"]}
    assert processes_of(place.home) == []
    assert not listens(started.fields["endpoint"])
    assert place.forge("ps").fields == {"running": []}
    assert place.forge("stop").fields == {"stopped": []}
    assert not list((place.home / "serving").iterdir())


@pytest.mark.network
@pytest.mark.programs
def test_the_key_of_a_background_server_may_come_out_of_a_pipe(place: Workshop) -> None:
    """`--api-key-file <(pass show key) --detach`: read once, it reaches the server and nobody else."""
    pipe = place.directory / "pipe"
    os.mkfifo(pipe)
    # Opening it waits for a reader, the first and only one.
    threading.Thread(target=pipe.write_text, args=(KEY + "\n",), daemon=True).start()
    started = place.forge("serve", "tiny.gguf", "--port", "0", "--api-key-file", "pipe", "--detach")
    assert started.code == 0, started.said
    endpoint = find(started.fields["endpoint"], api_key=KEY)
    with Client(endpoint) as client:
        assert client.chat(HELLO).text == REPLY
    for wrong in (None, KEY + "x"):
        with Client(replace(endpoint, api_key=wrong)) as client:
            with pytest.raises(RefusedError, match="Invalid API Key"):
                client.chat(HELLO)
    listed = place.forge("ps")
    assert [row["name"] for row in listed.fields["running"]] == ["tiny"]
    shown = _everything_shown(place, started, listed)
    assert "--handed-over" in shown
    assert KEY not in shown
    place.forge("stop")


@pytest.mark.network
@pytest.mark.programs
def test_killed_background_server_is_gone_from_the_list(place: Workshop) -> None:
    started = place.forge("serve", "tiny.gguf", "--port", "0", "--detach")
    os.kill(started.fields["pid"], signal.SIGKILL)
    psutil.wait_procs(processes_of(place.home), timeout=10)
    assert place.forge("ps").fields == {"running": []}
    assert not listens(started.fields["endpoint"])
    once_more = place.forge("serve", "tiny.gguf", "--port", "0", "--detach")
    assert once_more.code == 0
    assert place.forge("stop").fields == {"stopped": ["tiny"]}


@pytest.mark.network
@pytest.mark.programs
def test_what_fails_in_the_background_is_told_in_the_foreground(place: Workshop) -> None:
    model = place.directory / "tiny.gguf"
    model.write_bytes(model.read_bytes().replace(b"llama", b"lxama"))
    failed = place.forge("serve", "tiny.gguf", "--port", "0", "--detach")
    assert failed.code == 4
    problems = [one["message"] for one in failed.fields["error"]["problems"]]
    assert any("unknown model architecture: 'lxama'" in one for one in problems)
    hint = failed.fields["error"]["hint"]
    assert hint.count(hint.partition(" (")[0]) == 1, "both commands say it"
    assert place.forge("ps").fields == {"running": []}


@pytest.mark.network
@pytest.mark.programs
def test_server_that_dies_ends_the_command_with_its_last_words(place: Workshop) -> None:
    with place.start("serve", "tiny.gguf", "--port", "0", "--json") as child:
        lines = child.lines()
        json.loads(next(lines))
        (server,) = servers_of(child.pid)
        server.kill()
        wait_for("the end", lambda: child.status is not None or not server.is_running(), child)
        error = json.loads(list(lines)[-1])["error"]
        assert error["code"] == 4
        assert "killed by signal 9" in error["message"]


@pytest.mark.programs
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--host", "0.0.0.0"), 2, "others than this machine could use the server, and there is no API key"),
        (("--runtime", "vllm"), 2, "there is no runtime vllm"),
        (("--image", "x"), 2, "the runtime embedded has no image to choose"),
        (("--context", "5000"), 2, "a context of 5000 tokens is asked for, the model was made for 4096"),
        (("--api-key-file", "none"), 2, "--api-key-file: none: No such file or directory"),
        (("--lora", "yes"), 2, "yes: NAME=FILE, each name once"),
        (("--lora", "tiny=yes.gguf"), 2, "--lora tiny: the model itself has that name"),
        (("--lora", "yes=none.gguf"), 2, "none.gguf"),
        (("--runtime", "llama-server", "--llama-server", "/none"), 3, "there is no program /none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(place: Workshop, flags: tuple[str, ...], code: int, message: str) -> None:
    refused = place.forge("serve", "tiny.gguf", "--port", "0", *flags)
    assert refused.code == code
    assert message in refused.fields["error"]["message"]


def test_settings_are_handed_over_as_data(tmp_path: Path) -> None:
    """What is detached is what was asked for, and what its run's Modelfile says."""
    from forge.chat.modelfile import Modelfile

    chosen = ServerSettings(
        tmp_path / "x.gguf", "x", 512, host="::1", port=9, parallel=2, threads=1, gpu_layers=-1, api_key="k",
        adapter=tmp_path / "own.gguf", adapters={"b": Path("b.gguf"), "a": Path("a.gguf")}, without_key=True,
        cors_origins="*", allow_hosts=("c", "d"), control_routes=True, program="p", image="i",
        modelfile=Modelfile("x.gguf", "{{ .Prompt }}", parameters={"stop": ("<|im_end|>",), "num_ctx": 512}),
    )  # fmt: skip
    again = ServerSettings.from_json(chosen.to_json())
    assert again == chosen
    assert list(again.adapters) == ["b", "a"], "their places are llama-server's numbers"


def test_context_is_the_models_or_4096(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    chosen = settings(Wish(str(model), context=512))
    assert (chosen.alias, chosen.context_tokens) == ("tiny", 512)
    assert settings(Wish(str(model))).context_tokens == 4096


@pytest.mark.parametrize("text", ["", " \n", "#commented", "two words", "one\ntwo", "schlüssel"])
def test_files_that_hold_no_key(tmp_path: Path, text: str) -> None:
    """llama-server would take the first lines for no key at all, and let everyone in."""
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(RecipeError, match="holds no key"):
        read_key(path)


@pytest.mark.network
@pytest.mark.programs
def test_chat_with_a_file_and_with_the_url_of_a_server_with_a_key(place: Workshop) -> None:
    """R3: several turns, /reset, /save and a system prompt, on a GGUF and on a URL."""
    typed = "Hello\nAgain\n/save talk.jsonl\n/reset\nOnce more\n/save talk.jsonl\n/quit\n"
    answer = place.forge("chat", "tiny.gguf", "--system", "Be brief", typed=typed)
    assert (answer.code, answer.fields) == (0, {"model": "tiny"})
    assert answer.said.count(REPLY) == 3
    first, second = map(json.loads, (place.directory / "talk.jsonl").read_text().splitlines())
    roles = [turn["role"] for turn in first["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in second["messages"]] == ["Be brief", "Once more", REPLY]
    shared = ("--port", "0", "--api-key-file", "key", "--lora", "yes=yes.gguf", "--detach")
    served = place.forge("serve", "tiny.gguf", *shared)
    url = served.fields["endpoint"]
    talked = place.forge("chat", url, "--api-key-file", "key", "--max-tokens", "2", typed="Hello\n/quit\n")
    assert talked.code == 0
    assert "[cut: the answer reached its limit of tokens]" in talked.said
    adapted = place.forge("chat", url, "--api-key-file", "key", "--model", "yes", typed="Hello\n/quit\n")
    assert (adapted.fields, "> Y\n" in adapted.said) == ({"model": "yes"}, True)
    refused = place.forge("chat", url, typed="Hello\n")
    assert (refused.code, "Invalid API Key" in refused.fields["error"]["message"]) == (2, True)
    wrong: tuple[tuple[str, ...], ...] = (
        (url, "--context", "512"),
        (url, "--api-key-file", "key", "--model", "no"),
        ("tiny.gguf", "--api-key-file", "key"),
        ("tiny.gguf", "--model", "yes"),
    )
    for flags in wrong:
        assert place.forge("chat", *flags).code == 2
    place.forge("stop")


@pytest.mark.network
@pytest.mark.programs
def test_open_shows_the_servers_page(place: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser that only writes down what it was told to open."""
    browser, opened = place.directory / "browser", place.directory / "opened"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.partial && mv {opened}.partial {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    with place.start("serve", "tiny.gguf", "--port", "0", "--open", "--json") as child:
        lines = child.lines()
        endpoint = json.loads(next(lines))["endpoint"]
        wait_for("the browser", opened.exists, child)
        assert opened.read_text() == endpoint
        child.terminate()
        list(lines)
