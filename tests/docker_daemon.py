"""A docker daemon of the tests' own: started in a directory, with an image for a base, gone without a trace.

No registry is asked: the base that docker/server/Dockerfile names is made here, from the compiled
llama-server, curl and the libraries of both, as upstream's holds them.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
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
_DOCKER, _PODMAN = Path("/usr/sbin/dockerd"), Path("/usr/bin/podman")


@pytest.fixture(scope="module")
def docker_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The docker SDK's client of a daemon that lives as long as a module's tests; DOCKER_HOST names it.

    The module's last test takes it down, so that one must be marked `programs` too.
    """
    if not _DOCKER.exists() or os.getuid():
        pytest.skip("needs root and dockerd: apt-get install docker.io iptables")
    root = tmp_path_factory.mktemp("docker")
    places = {"--data-root": "data", "--exec-root": "run", "--pidfile": "pid"}
    command = [str(_DOCKER), "-H", f"unix://{root}/docker.sock"]
    command += [f"{flag}={root / name}" for flag, name in places.items()]
    # Two daemons, of files of tests that run at the same time, would share the bridge docker0.
    with FileLock(Path(tempfile.gettempdir()) / "forge-tests-docker.lock"):
        with _served(command, root / "docker.sock", "API listen on") as client:
            yield client
        process.run(["ip", "link", "delete", "docker0"])


@pytest.fixture(scope="module")
def podman_service() -> Iterator[Any]:
    """The same for podman's service, which is spoken to as docker is."""
    if not _PODMAN.exists() or os.getuid():
        pytest.skip("needs root and podman: apt-get install podman netavark runc")
    # Podman takes no longer path than 50 characters for what runs.
    root = Path(tempfile.mkdtemp(prefix="podman-", dir="/tmp"))
    # Its own limits are above what a container of the tests' machine may have. How a command in a
    # container ended would be kept for minutes. No systemd need be here to time the health checks.
    limits = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
    (root / "containers.conf").write_text(f"{limits}[engine]\nexit_command_delay = 5\n")
    command = ["env", f"CONTAINERS_CONF={root}/containers.conf", "DISABLE_HC_SYSTEMD=true", str(_PODMAN)]
    places = {"--root": "data", "--runroot": "run", "--tmpdir": "tmp", "--network-config-dir": "networks"}
    command += [f"{flag}={root / name}" for flag, name in places.items()]
    command += ["--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=file", "--log-level=info"]
    command += ["system", "service", "--time=0", f"unix://{root}/podman.sock"]
    try:
        with _served(command, root / "podman.sock", "API service listening") as client:
            yield client
    finally:
        process.run(["umount", str(root / "data" / "overlay")])
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _served(command: list[str], socket: Path, begins: str) -> Iterator[Any]:
    """The SDK's client of a daemon until the block ends; it answers once its log says `begins`."""
    import docker

    told = socket.with_name("log")
    with (
        told.open("a+") as log,
        process.Child(
            ["/bin/sh", "-c", 'exec "$0" "$@" >&2', *command], log=log, separate_errors=True
        ) as child,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("DOCKER_HOST", f"unix://{socket}")
        deadline = time.monotonic() + 120
        # Asked sooner, the SDK leaves a socket open.
        while begins not in told.read_text():
            assert child.status is None and time.monotonic() < deadline, told.read_text()[-3000:]
            time.sleep(0.1)
        client = docker.DockerClient(f"unix://{socket}")
        try:
            yield client
        finally:
            client.close()


@pytest.fixture(scope="module")
def base_image(docker_daemon: Any) -> str:
    """The image that docker/server/Dockerfile begins with."""
    load_base(docker_daemon)
    return BASE


def load_base(client: Any) -> None:
    """Make the image that docker/server/Dockerfile begins with."""
    from tests.servers import llama_server  # here: it imports conftest, whose plugin this is

    files: dict[str, Path] = {"app/llama-server": llama_server(), "usr/bin/curl": Path("/usr/bin/curl")}
    for program in (llama_server(), Path("/usr/bin/curl")):
        for name, path in libraries(program).items():
            inside = str(path).lstrip("/") if name.startswith("ld-linux") else f"app/{name}"
            files[inside] = path
    load_image(client, BASE, files, ["ENV LD_LIBRARY_PATH=/app"])


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
    # Podman takes no notice of a tag that comes by itself.
    client.api.import_image_from_data(content.getvalue(), repository=name, changes=changes)
