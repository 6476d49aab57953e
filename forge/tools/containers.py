"""Containers, through the docker SDK: docker's own daemon or podman's socket.

A container that is run here cannot write, holds no capability and no other user's rights, and
sees what is mounted read-only. Not covered: remote daemons, whose machine does not have our files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import report
from forge.errors import MissingToolError, StageError

# The user inside, where we are root ourselves; no machine has one of this number by default.
USER = 10001
_SECONDS_TO_STOP = 20
_OLD_NAMES = ("ghcr.io/ggerganov/llama.cpp", "ghcr.io/ggernanov/llama.cpp")


@dataclass(frozen=True)
class Engine:
    """A daemon; `api` is the docker SDK's client of it."""

    api: Any

    def has_image(self, name: str) -> bool:
        from docker.errors import ImageNotFound

        with _told():
            try:
                self.api.images.get(name)
            except ImageNotFound:
                return False
            return True

    def pull(self, name: str) -> None:
        report.info(f"pulling {name}")
        with _told():
            self.api.images.pull(name)

    def build(self, directory: Path, name: str) -> None:
        """Build the Dockerfile in `directory`; raises `StageError` with the last lines of the build."""
        from docker.errors import BuildError

        report.info(f"building {name} from {directory}")
        with _told():
            try:
                self.api.images.build(path=str(directory), tag=name, rm=True, forcerm=True)
            except BuildError as failure:
                lines = [str(line.get("stream") or line.get("error") or "") for line in failure.build_log]
                last = "".join(lines[-8:])
                raise StageError(f"{name} was not built: {failure.msg}", hint=last) from failure

    def run(
        self,
        image: str,
        command: Sequence[str],
        *,
        name: str,
        mounts: Mapping[str, Path],
        published: tuple[str, int],
        port: int,
        gpu: bool = False,
        environment: Mapping[str, str] | None = None,
        memory: int | None = None,
        processes: int | None = None,
    ) -> Container:
        """Start a container whose `port` is published at `published` (host, port or 0).

        `mounts`: the path inside -> the file or directory here. `memory` in bytes and `processes`, threads
        among them, are the most that it may have.
        """
        from docker.types import DeviceRequest, Mount

        bound = [
            Mount(target, str(path.absolute()), "bind", read_only=True) for target, path in mounts.items()
        ]
        user = os.getuid() or USER
        with _told():
            created = self.api.containers.create(
                image,
                list(command),
                name=name,
                mounts=bound,
                ports={f"{port}/tcp": (published[0], published[1] or None)},
                user=f"{user}:{os.getgid() or USER}",
                read_only=True,
                # Podman would lay memory that can be written over these.
                tmpfs=dict.fromkeys(("/run", "/tmp", "/var/tmp"), "ro"),
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                labels={"forge": name},
                environment=dict(environment or {}),
                mem_limit=memory,
                pids_limit=processes,
                device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpu else [],
            )
        container = Container(created)
        try:
            with _told():
                created.start()
        except BaseException:
            # It exists, although it does not run.
            container.remove()
            raise
        return container


@dataclass(frozen=True)
class Container:
    """A container that we started."""

    raw: Any

    @property
    def id(self) -> str:
        return str(self.raw.short_id)

    def published(self, port: int) -> int | None:
        """The host's port for the container's, or None once it has ended."""
        with _told():
            self.raw.reload()
            bound = self.raw.ports.get(f"{port}/tcp")
        return int(bound[0]["HostPort"]) if bound else None

    def exit_status(self) -> int | None:
        """None while it runs."""
        with _told():
            self.raw.reload()
            state = self.raw.attrs["State"]
        return None if state["Running"] else int(state["ExitCode"])

    def said(self) -> list[str]:
        """Its lines so far."""
        with _told():
            text = self.raw.logs().decode("utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def remove(self) -> None:
        """Stop it and take it away, whatever state it is in."""
        from docker.errors import NotFound

        with _told(), contextlib.suppress(NotFound):
            self.raw.stop(timeout=_SECONDS_TO_STOP)
            self.raw.remove(v=True, force=True)


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """The daemon that DOCKER_HOST names, docker's, or podman's; raises `MissingToolError`."""
    try:
        import docker
    except ImportError as missing:
        raise MissingToolError(
            "the Python package docker, which speaks to docker and podman, is not installed",
            hint="pip install docker",
        ) from missing
    with _told():
        api = docker.DockerClient(base_url=_address())
    try:
        with _told():
            api.ping()
        yield Engine(api)
    finally:
        api.close()


def _address() -> str:
    if host := os.environ.get("DOCKER_HOST"):
        if host.startswith("unix://") and not Path(host.removeprefix("unix://")).is_socket():
            raise MissingToolError(f"DOCKER_HOST is {host}, and no daemon is there", hint="start it")
        return host
    own = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    places = (
        "/var/run/docker.sock",
        f"{own}/docker.sock",
        f"{own}/podman/podman.sock",
        "/run/podman/podman.sock",
    )
    for place in places:
        if Path(place).is_socket():
            return f"unix://{place}"
    raise MissingToolError(
        "no docker daemon and no podman socket is here",
        hint="start one (docker, or: systemctl --user start podman.socket), or set DOCKER_HOST",
    )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """The edge where the SDK's exceptions become forge's."""
    import requests
    from docker.errors import DockerException, NotFound

    try:
        yield
    except NotFound:
        raise
    except (DockerException, requests.RequestException) as failure:
        reason = getattr(failure, "explanation", None) or failure
        if isinstance(failure, requests.ConnectionError) or "Error while fetching" in str(failure):
            raise MissingToolError(
                f"the container daemon does not answer: {reason}",
                hint="is docker (or podman's socket) running?",
            ) from failure
        raise StageError(f"the container daemon refused: {reason}") from failure


def docker_files() -> Path:
    """The shipped `docker/`: of the installed package, or of a clone."""
    package = Path(__file__).parent.parent
    for root in (package / "_shipped", package.parent):
        if (root / "docker" / "server" / "Dockerfile").is_file():
            return root / "docker"
    raise MissingToolError("forge's own docker/ is not here", hint="install forge again, or name an --image")


def current_name(image: str) -> str:
    """The image's name today: llama.cpp has moved, and old documents name its old place."""
    for old in _OLD_NAMES:
        if image.startswith(old):
            now = image.replace(old, "ghcr.io/ggml-org/llama.cpp", 1)
            report.warning(f"{image} has moved: {now} is used")
            return now
    return image
