"""The container runtime, on a real docker daemon and through podman's, with the image of docker/server."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from forge.errors import DataError, MissingToolError, RecipeError, StageError
from forge.serve.client import Client
from forge.serve.container import IMAGE, MOST_PROCESSES, serve_container
from forge.serve.runtime import ServerSettings
from forge.serve.wire import GoneError, RefusedError
from forge.tools.containers import current_name, docker_files, engine
from tests.docker_daemon import BASE, load_base
from tests.servers import HELLO, KEY, listens, write_adapter
from tests.specimens import rewrite
from tests.test_docker_files import NEEDS_KEY
from tests.test_serve_front import attack
from tests.tiny_gguf import REPLY, write_tiny_gguf


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    model = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    model.chmod(0o444)
    return ServerSettings(model, "yoda", 1024, threads=1, parallel=2)


@pytest.fixture(scope="module", params=["docker_daemon", "podman_service"])
def either(request: pytest.FixtureRequest) -> Any:
    client = request.getfixturevalue(request.param)
    load_base(client)
    return client


@pytest.fixture
def daemon(either: Any) -> Iterator[Any]:
    """The daemon, on which a test leaves no container."""
    yield either
    assert either.containers.list(all=True) == []


def _is_podman(daemon: Any) -> bool:
    return any(part["Name"] == "Podman Engine" for part in daemon.version()["Components"])


def test_old_names_of_images() -> None:
    for old in ("ghcr.io/ggerganov/llama.cpp:server", "ghcr.io/ggernanov/llama.cpp:server"):
        assert current_name(old) == "ghcr.io/ggml-org/llama.cpp:server"
    assert current_name("my/own:1") == "my/own:1"


@pytest.mark.network
def test_no_daemon_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(MissingToolError, match=r"DOCKER_HOST is unix://.*none\.sock, and no daemon"):
        with engine():
            raise AssertionError("it connected")
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setattr(Path, "is_socket", lambda self: False)
    with pytest.raises(MissingToolError, match="no docker daemon and no podman socket"):
        with engine():
            raise AssertionError("it connected")


def test_layers_on_a_gpu_without_cuda_are_refused_before_an_image_is_made(settings: ServerSettings) -> None:
    with pytest.raises(RecipeError, match=r"forge-llama-server:.* runs on the CPU only"):
        with serve_container(replace(settings, gpu_layers=5)):
            raise AssertionError("it served")


def test_one_of_several_parts_is_refused_before_an_image_is_made(
    settings: ServerSettings, tmp_path: Path
) -> None:
    part = rewrite(settings.model, tmp_path / "part.gguf", split__count=2)
    with pytest.raises(DataError, match="one of the 2 parts"):
        with serve_container(replace(settings, model=part)):
            raise AssertionError("it served")


def test_shipped_files_are_found() -> None:
    assert (docker_files() / "server" / "Dockerfile").is_file()
    assert os.access(docker_files() / "compose.yaml", os.R_OK)


def _inside(container: Any, *command: str) -> tuple[int, str]:
    status, output = container.exec_run(list(command))
    return int(status), output.decode()


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_shipped_image_serves_through_the_published_port(
    daemon: Any, settings: ServerSettings, tmp_path: Path
) -> None:
    """R1, R3, pitfall 57: built from docker/server, published on loopback, asked from here."""
    log = tmp_path / "log"
    with serve_container(replace(settings, api_key=KEY), log=log) as endpoint:
        assert urlsplit(endpoint.url).hostname == "127.0.0.1"
        with Client(endpoint) as client:
            assert client.model_names() == ["yoda"]
            assert client.chat(HELLO).text == REPLY
            assert "".join(client.stream_chat(HELLO)) == REPLY
            assert client.properties()["total_slots"] == 2
        with Client(replace(endpoint, api_key="wrong")) as client, pytest.raises(RefusedError):
            client.chat(HELLO)
        [container] = daemon.containers.list()
        assert container.short_id == endpoint.container
        _cannot_do_harm(container)
        _becomes_healthy(daemon, container)
        shown = Path(f"/proc/{container.attrs['State']['Pid']}/cmdline").read_text()
        assert KEY not in json.dumps(container.attrs) + shown
    assert not listens(endpoint.url)
    assert KEY not in log.read_text()
    assert "listening on" in log.read_text()
    # The shipped Dockerfile's image, on the base that it names.
    base, made = (daemon.images.get(name) for name in (BASE, IMAGE))
    layers, below = (image.attrs["RootFS"]["Layers"] for image in (made, base))
    assert made.id != base.id and layers[: len(below)] == below


def _cannot_do_harm(container: Any) -> None:
    """Security: nobody, without a capability, who can write nowhere, the model least of all."""
    container.reload()
    host = container.attrs["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert host["Memory"] > 0 and host["PidsLimit"] == MOST_PROCESSES
    assert container.attrs["Config"]["User"] == "10001:10001"
    assert all(mount["RW"] is False for mount in container.attrs["Mounts"])
    status = Path(f"/proc/{container.attrs['State']['Pid']}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert fields["Uid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    for place in ("/models/tiny.gguf", "/models/new", "/tmp/new", "/var/tmp/new", "/run/new", "/app/new"):
        code, said = _inside(container, "/usr/bin/curl", "-s", "-o", place, "file:///app/llama-server")
        assert code == 23, (place, code, said)  # curl: cannot write what it got


def _becomes_healthy(daemon: Any, container: Any) -> None:
    if _is_podman(daemon):
        # It leaves the times to systemd, which is not here; the check itself is the image's.
        url = f"{daemon.api.base_url}/v4.0.0/libpod/containers/{container.id}/healthcheck"
        assert daemon.api.get(url).json()["Status"] == "healthy"
        return
    deadline = time.monotonic() + 60
    while container.attrs["State"]["Health"]["Status"] != "healthy":
        assert time.monotonic() < deadline, container.attrs["State"]["Health"]
        time.sleep(0.5)
        container.reload()


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_container_that_is_killed_is_told_and_taken_away(daemon: Any, settings: ServerSettings) -> None:
    with serve_container(settings) as endpoint:
        [container] = daemon.containers.list()
        container.kill()
        with Client(endpoint) as client, pytest.raises(GoneError, match=r"ended by itself \(status 137\)"):
            client.chat(HELLO)


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_model_that_does_not_load_shows_the_servers_own_words(
    daemon: Any, settings: ServerSettings, tmp_path: Path
) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(settings.model.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(StageError, match=r"did not start with .*strange\.gguf") as caught:
        with serve_container(replace(settings, model=strange)):
            raise AssertionError("it served")
    assert any("unknown model architecture: 'lxama'" in one.message for one in caught.value.problems)


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_adapters_named_ports_and_the_image_of_old_documents(
    daemon: Any, settings: ServerSettings, tmp_path: Path
) -> None:
    daemon.images.get(BASE).tag("ghcr.io/ggml-org/llama.cpp", "server")
    adapter = write_adapter(tmp_path / "yes.gguf", says="Y")
    with pytest.raises(StageError, match="refused: "):
        # It has no entry point, which says that it is this image that was run.
        with serve_container(replace(settings, image="ghcr.io/ggerganov/llama.cpp:server")):
            raise AssertionError("it served")
    # One file under two names: both are there.
    with serve_container(replace(settings, adapters={"yes": adapter, "aye": adapter})) as endpoint:
        for name, answer in (("yoda", REPLY), ("yes", "Y"), ("aye", "Y")):
            with Client(replace(endpoint, model=name)) as client:
                assert client.chat(HELLO).text == answer
    with contextlib.ExitStack() as stack:
        # With an adapter of its own, which is on from the start.
        first = stack.enter_context(serve_container(replace(settings, adapter=adapter)))
        assert stack.enter_context(Client(first)).chat(HELLO).text == "Y"
        port = urlsplit(first.url).port
        assert port is not None
        with pytest.raises(StageError, match="cannot be listened on"):
            stack.enter_context(serve_container(replace(settings, alias="other", port=port)))


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
def test_no_daemon_starts_a_server_for_others_without_a_key(daemon: Any) -> None:
    """What docker/compose.yaml mounts as the key where HOST alone is set."""
    from docker.errors import APIError
    from docker.types import Mount

    mount = Mount("/run/secrets/api-key", f"/dev/null/{NEEDS_KEY}", "bind", read_only=True)
    with pytest.raises(APIError, match=NEEDS_KEY):
        daemon.containers.create(BASE, ["x"], mounts=[mount])


@pytest.mark.docker
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.slow
@pytest.mark.parametrize("key", [None, KEY], ids=["open", "key"])
def test_container_withstands(daemon: Any, settings: ServerSettings, tmp_path: Path, key: str | None) -> None:
    own, other = (write_adapter(tmp_path / f"{name}.gguf", says=name) for name in "YN")
    chosen = replace(settings, alias="yes", adapter=own, adapters={"no": other} if key else {}, api_key=key)
    attack(serve_container, chosen)
