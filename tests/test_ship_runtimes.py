"""Ships whose `deploy.runtime` is a compiled llama-server, or a container: proved and asked the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import link_converters
from tests.servers import listens, llama_server
from tests.shipping import Workshop, processes_of

pytestmark = [
    pytest.mark.training,
    pytest.mark.network,
    pytest.mark.programs,
    pytest.mark.slow,
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A recipe that ships the built-in base as it is; the compiled llama-server is on the PATH."""
    monkeypatch.setenv("PATH", f"{llama_server().parent}:{os.environ['PATH']}")
    workshop = Workshop(tmp_path, link_converters(tmp_path / "home"))
    workshop.recipe(train="none", data=None)
    return workshop


def _shipped_by(place: Workshop, runtime: str) -> None:
    answer = place.ship("-o", f"deploy.runtime={runtime}", "-o", "deploy.keep=true")
    deployed = place.manifest()["facts"]["deploy"]
    assert deployed["runtime"] == runtime
    assert deployed["prompts_compared"] >= 2
    assert [one["ok"] for one in answer.fields["smoke"]] == [True]
    [listed] = place.forge("ps").fields["running"]
    assert (listed["runtime"], listed["endpoint"]) == (runtime, answer.fields["endpoint"])
    assert bool(listed["container"]) == (runtime == "container")
    assert place.forge("stop").fields == {"stopped": ["mini"]}
    assert not listens(answer.fields["endpoint"])
    _, left = psutil.wait_procs(processes_of(place.home), timeout=10)
    assert not left


def test_llama_server_on_the_path(place: Workshop) -> None:
    _shipped_by(place, "llama-server")


@pytest.mark.docker
def test_container(place: Workshop, docker_daemon: Any, base_image: str) -> None:
    """U: the smoke queries of a recipe, answered through a container's published port."""
    _shipped_by(place, "container")
    assert docker_daemon.containers.list(all=True) == []


@pytest.mark.docker
def test_killed_supervisor_leaves_a_container_that_docker_shows(
    place: Workshop, docker_daemon: Any, base_image: str
) -> None:
    """What `forge serve` cannot take away when it is killed with -9 can be found by its label."""
    model = place.ship("--until", "export").fields["gguf"]
    started = place.forge("serve", model, "--runtime", "container", "--port", "0", "--detach")
    os.kill(started.fields["pid"], 9)
    [left] = docker_daemon.containers.list(filters={"label": "forge"})
    assert left.short_id == started.fields["container"]
    left.remove(force=True)
