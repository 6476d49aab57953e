"""A docker daemon of the tests' own: started in a directory, with an image for a base, gone without a trace.

No registry is asked: the base that docker/server/Dockerfile names is made here, from the compiled
llama-server, curl and the libraries of both, as upstream's holds them.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from forge import process
from forge.tools.native import libraries

BASE = "ghcr.io/ggml-org/llama.cpp:server-b10868"
_DAEMON = "/usr/sbin/dockerd"


@pytest.fixture(scope="module")
def docker_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The docker SDK's client of a daemon that lives as long as a module's tests; DOCKER_HOST names it.

    The module's last test takes it down, so that one must be marked `programs` too.
    """
    import docker

    if not Path(_DAEMON).exists() or os.getuid():
        pytest.skip("needs root and dockerd: apt-get install docker.io iptables")
    root = tmp_path_factory.mktemp("docker")
    places = {"--data-root": "data", "--exec-root": "run", "--pidfile": "pid"}
    command = [_DAEMON, "-H", f"unix://{root}/docker.sock"]
    command += [f"{flag}={root / name}" for flag, name in places.items()]
    with (
        # Two daemons, of files of tests that run at the same time, would share the bridge docker0.
        FileLock(Path(tempfile.gettempdir()) / "forge-tests-docker.lock"),
        (root / "log").open("a+") as log,
        process.Child(
            ["/bin/sh", "-c", 'exec "$0" "$@" >&2', *command], log=log, separate_errors=True
        ) as child,
    ):
        before = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = f"unix://{root}/docker.sock"
        client = _connected(docker, child, root)
        try:
            yield client
        finally:
            client.close()
            if before is None:
                del os.environ["DOCKER_HOST"]
            else:
                os.environ["DOCKER_HOST"] = before
            child.stop()
            process.run(["ip", "link", "delete", "docker0"])


def _connected(docker: Any, child: process.Child, root: Path) -> Any:
    deadline = time.monotonic() + 120
    address = root / "docker.sock"
    while time.monotonic() < deadline and child.status is None:
        # The SDK leaves a socket open that found no one.
        if "API listen on" in (root / "log").read_text():
            return docker.DockerClient(f"unix://{address}")
        time.sleep(0.1)
    raise AssertionError((root / "log").read_text()[-3000:])


@pytest.fixture(scope="module")
def base_image(docker_daemon: Any) -> str:
    """The image that docker/server/Dockerfile begins with."""
    from tests.servers import llama_server  # here: it imports conftest, whose plugin this is

    files: dict[str, Path] = {"app/llama-server": llama_server(), "usr/bin/curl": Path("/usr/bin/curl")}
    for program in (llama_server(), Path("/usr/bin/curl")):
        for name, path in libraries(program).items():
            inside = str(path).lstrip("/") if name.startswith("ld-linux") else f"app/{name}"
            files[inside] = path
    load_image(docker_daemon, BASE, files, ["ENV LD_LIBRARY_PATH=/app"])
    return BASE


def load_image(client: Any, name: str, files: Mapping[str, Path], changes: list[str]) -> None:
    """Make an image that holds `files` (path inside -> file here) and an empty /tmp, and nothing else."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        directory = tarfile.TarInfo("tmp")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(directory)
        for inside, path in files.items():
            member = archive.gettarinfo(str(path.resolve()), inside)
            member.mode = 0o755
            with path.resolve().open("rb") as stream:
                archive.addfile(member, stream)
    repository, _, tag = name.rpartition(":")
    client.api.import_image_from_data(content.getvalue(), repository=repository, tag=tag, changes=changes)
