"""A run of two files, the base's GGUF and the adapter's: whatever takes it serves the trained model (N4).

The base says `REPLY`, with its adapter it says "Y". Ships of such runs are in test_ship_adapter.
"""

from __future__ import annotations

import json
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from forge import process
from forge.chat.hand_over import hand_over_of, write_modelfiles
from forge.commands.bundle import bundle
from forge.commands.import_ import import_into_ollama
from forge.errors import DataError, RecipeError
from forge.model.gguf_header import read_gguf
from forge.runs.find import find_model
from forge.serve.client import Client, find
from forge.serve.embedded import serve_embedded
from forge.serve.manifests import manifest
from forge.serve.options import server_arguments
from forge.serve.runtime import ServerSettings
from forge.serve.runtimes import runtime_for
from forge.serve.slots import memory_bytes
from forge.ship.serving import Wish, settings
from tests.fake_ollama import FakeOllama
from tests.servers import HELLO, llama_server, own_servers, write_adapter
from tests.shipping import Workshop, processes_of
from tests.tiny_gguf import REPLY, write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory as a ship with `export.mode: adapter` leaves it."""
    directory = tmp_path / "runs" / "yoda"
    directory.mkdir(parents=True)
    gguf = write_tiny_gguf(directory / "yoda-q8_0.gguf")
    write_adapter(directory / "yoda-q8_0-adapter.gguf", says="Y")
    write_modelfiles(directory, file=gguf.name, handed=hand_over_of(gguf), adapter="yoda-q8_0-adapter.gguf")
    facts = {"export": {"mode": "adapter"}, "deploy": {"context_tokens": 512}}
    asked = [{"prompt": "Hello", "answer": "Y", "ok": True}]
    told = {"facts": {**facts, "smoke": {"smoke": asked}}}
    (directory / "manifest.json").write_text(json.dumps(told))
    return directory


def test_a_run_is_both_files_and_a_path_is_that_file(run: Path) -> None:
    """N4, pitfall 52: never the bare base under the run's name."""
    gguf, adapter = run / "yoda-q8_0.gguf", run / "yoda-q8_0-adapter.gguf"
    assert find_model(str(run)) == (gguf, adapter)
    assert find_model(str(gguf)) == (gguf, None)
    chosen = settings(Wish(str(run)))
    assert (chosen.model, chosen.adapter, chosen.loaded_adapters) == (gguf, adapter, (adapter,))
    adapter.unlink()
    with pytest.raises(DataError, match=r"yoda-q8_0-adapter\.gguf is gone, and yoda-q8_0\.gguf without it"):
        find_model(str(run))
    gguf.unlink()
    with pytest.raises(DataError, match="has no GGUF"):
        find_model(str(run))


@pytest.mark.parametrize("runtime", ["embedded", pytest.param("llama-server", marks=pytest.mark.slow)])
def test_its_adapter_is_on_in_every_answer(run: Path, runtime: str) -> None:
    chosen = settings(Wish(str(run), runtime=runtime, threads=1))
    if runtime == "llama-server":
        chosen = replace(chosen, program=str(llama_server()))
    with runtime_for(runtime)(chosen) as endpoint, Client(endpoint) as client:
        assert client.chat(HELLO).text == "".join(client.stream_chat(HELLO)) == "Y"
        assert client.complete("x\n").text == "Y"
    assert not own_servers()


def test_other_adapters_take_its_place(run: Path, tmp_path: Path) -> None:
    """`forge serve RUN --lora`: all are adapters of one base, and the run's name is the run's own."""
    other = write_adapter(tmp_path / "no.gguf", says="N")
    chosen = settings(Wish(str(run), threads=1))
    with serve_embedded(replace(chosen, adapters={"no": other})) as endpoint:
        for _ in range(2):
            for name, said in (("yoda", "Y"), ("no", "N")):
                with Client(replace(endpoint, model=name)) as client:
                    assert client.chat(HELLO).text == said
                    assert client.model_names() == ["yoda", "no"]


def test_an_adapter_of_another_architecture_is_refused(run: Path) -> None:
    write_adapter(run / "yoda-q8_0-adapter.gguf", says="Y", architecture="qwen2")
    with pytest.raises(DataError, match="an adapter for the architecture qwen2"):
        with serve_embedded(settings(Wish(str(run)))):
            raise AssertionError("it serves")


@pytest.fixture
def place(run: Path, tmp_path: Path) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path, tmp_path / "home")
    yield workshop
    workshop.forge("stop")
    assert not processes_of(workshop.home)


def test_serve_detach_and_chat_as_a_person_runs_them(place: Workshop) -> None:
    started = place.forge("serve", "yoda", "--port", "0", "--detach")
    assert started.code == 0, started.said
    with Client(find(started.fields["endpoint"])) as client:
        assert client.chat(HELLO).text == "Y"
    assert place.forge("stop").fields == {"stopped": ["yoda"]}
    with place.start("chat", "yoda") as child:
        child.send("Hello\n/quit\n")
        said = "\n".join(child.lines())
        assert child.wait() == 0
    assert "Y" in said and REPLY not in said


def test_manifests_serve_it_with_its_adapter(run: Path) -> None:
    chosen = settings(Wish(str(run), runtime="container", parallel=2))
    names = ["/models/yoda-q8_0.gguf", "/models/yoda-q8_0-adapter.gguf"]
    [compose] = YAML(typ="safe").load_all(manifest("compose", chosen))
    server = compose["services"]["server"]
    assert [one["target"] for one in server["volumes"]] == names
    assert [one["source"] for one in server["volumes"]] == [str(run / Path(name).name) for name in names]
    _, deployment, _ = YAML(typ="safe").load_all(manifest("kubernetes", chosen))
    container, _ = deployment["spec"]["template"]["spec"]["containers"]
    for command in (server["command"], container["args"]):
        assert [command[command.index(flag) + 1] for flag in ("--model", "--lora")] == names
        assert "--lora-scaled" not in command
    header, alone = read_gguf(chosen.model), replace(chosen, adapter=None)
    more = memory_bytes(chosen, header) - memory_bytes(alone, header)
    assert more == (run / "yoda-q8_0-adapter.gguf").stat().st_size
    with pytest.raises(RecipeError, match=r"fetches one file, and this model is two"):
        manifest("kubernetes", chosen, model_url="https://models.example/yoda.gguf")


def test_switched_adapters_are_off_until_a_request_asks_for_one(run: Path) -> None:
    chosen = settings(Wish(str(run)))
    assert "--lora-scaled" not in server_arguments(chosen)
    command = server_arguments(replace(chosen, adapters={"a": Path("/a.gguf"), "b": Path("/b.gguf")}))
    own = str(run.absolute() / "yoda-q8_0-adapter.gguf")
    assert command[-6:] == ["--lora", own, "--lora-scaled", "/a.gguf:0", "--lora-scaled", "/b.gguf:0"]
    for name in ("/a:1.gguf", "/a,b/x.gguf", '/"x".gguf'):
        with pytest.raises(RecipeError, match="llama-server takes no such path"):
            server_arguments(replace(chosen, adapters={"a": Path(name)}))


@pytest.mark.parametrize(
    ("name", "fits"), [("/a,b/x.gguf", False), ('/"x".gguf', False), ("/a:1.gguf", True)]
)
def test_the_own_adapters_path_is_one_of_a_list(name: str, fits: bool) -> None:
    """`--lora` takes several, by commas; only `--lora-scaled` reads colons."""
    chosen = ServerSettings(Path("/m.gguf"), "m", 512, adapter=Path(name))
    if fits:
        assert server_arguments(chosen)[-2:] == ["--lora", name]
    else:
        with pytest.raises(RecipeError, match="llama-server takes no such path") as refused:
            server_arguments(chosen)
        assert "rename the file or its directory" in refused.value.hint


@pytest.mark.slow
def test_a_bundle_brings_it_and_passes_its_smoke_test(run: Path, tmp_path: Path) -> None:
    """R5: the archive's own start script and smoke test, whose expected answer the base would not give."""
    out = tmp_path / "yoda.tar"
    bundle(str(run), out)
    with tarfile.open(out) as opened:
        opened.extractall(tmp_path / "there", filter="data")
    root = tmp_path / "there" / "yoda"
    assert "yoda-q8_0-adapter.gguf" in (root / "SHA256SUMS").read_text()
    assert "ADAPTER ./yoda-q8_0-adapter.gguf" in (root / "Modelfile.jinja").read_text()
    assert (root / "smoke.expect").read_text() == "Y"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"PORT": port}
    with process.Child([str(root / "start.sh")], environment=environment, separate_errors=True):
        finished = process.run([str(root / "smoke.sh")], environment=environment)
    assert finished.status == 0, finished.output
    assert finished.output.splitlines()[-1] == "smoke test: passed"


def test_ollama_gets_both(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`forge import RUN` and `forge serve RUN --runtime ollama`; another adapter beside it is refused."""
    with FakeOllama() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        import_into_ollama(str(run), "imported", None, None)
        import_into_ollama(str(run / "yoda-q8_0.gguf"), "base", None, None)
        said = {}
        with runtime_for("ollama")(settings(Wish(str(run), runtime="ollama"))) as endpoint:
            for name in ("yoda", "imported", "base"):
                with Client(replace(endpoint, model=name)) as client:
                    said[name] = client.chat(HELLO).text
        assert said == {"yoda": "Y", "imported": "Y", "base": REPLY}
        with pytest.raises(RecipeError, match="has one of its own, and Ollama takes one"):
            import_into_ollama(str(run), "both", None, run / "yoda-q8_0-adapter.gguf")
