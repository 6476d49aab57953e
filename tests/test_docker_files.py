"""What is shipped under docker/: linted, and true to the schema and to what `forge serve` runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from forge import process
from forge.serve import front_nginx
from forge.serve.container import BUILD, IMAGE, PORT
from forge.tools.containers import USER
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
NEEDS_KEY = "HOST-needs-API_KEY_FILE-see-docker-README"
DOCKERFILES = sorted(DOCKER.glob("*/Dockerfile"))


def _compose(name: str) -> Any:
    return YAML(typ="safe").load((DOCKER / name).read_text())


@pytest.mark.programs
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    finished = process.run([str(hadolint), str(path)])
    assert (finished.status, finished.output) == (0, "")


@pytest.mark.programs
def test_linter_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN apt-get install gcc\n")
    finished = process.run([str(Path(sys.executable).parent / "hadolint"), str(bad)])
    assert finished.status != 0
    assert "DL3007" in finished.output


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_every_base_is_pinned_and_nobody_is_root(path: Path) -> None:
    text = path.read_text()
    bases = re.findall(r"^(?:FROM|ARG BASE=) ?([^\s$]+)", text, re.MULTILINE)
    assert bases
    assert not any(re.search(r":(latest|server|server-cuda)$", base) or ":" not in base for base in bases)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == [f"{USER}:{USER}"]


def test_server_is_the_one_that_forge_runs() -> None:
    text = (DOCKER / "server" / "Dockerfile").read_text()
    assert f"ARG BASE=ghcr.io/ggml-org/llama.cpp:server-{BUILD}\n" in text
    assert f"EXPOSE {PORT}\n" in text
    server = _compose("compose.yaml")["services"]["server"]
    assert server["image"] == IMAGE
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert server["user"] == f"{USER}:{USER}"
    assert all(volume["read_only"] for volume in server["volumes"])
    assert server["networks"] == ["behind"] and "ports" not in server
    front = _compose("compose.yaml")["services"]["front"]
    assert front["image"] == front_nginx.IMAGE
    assert front["ports"] == [f"${{HOST:-127.0.0.1}}:${{PORT:-8080}}:{PORT}"]
    for one in (server, front):
        assert one["mem_limit"] and one["pids_limit"]


@pytest.mark.programs
def test_compose_file_is_true_to_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text((DOCKER / "compose.yaml").read_text())
    assert _checked(path).status == 0
    path.write_text(path.read_text().replace("read_only: true\n", "read_onli: true\n"))
    assert _checked(path).status != 0


def _interpolated(text: str, variables: Mapping[str, str]) -> str:
    """As Compose replaces `${NAME:-default}` and `${NAME:+replacement}`, one within another."""

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        given = variables.get(name, "")
        return (given or other) if kind == "-" else (other if given else "")

    while "${" in text:
        text, count = re.subn(r"\$\{(\w+):([-+])([^${}]*)\}", value, text)
        assert count, f"nothing that every Compose reads alike: {text}"
    return text


# HOST and API_KEY_FILE -> where it is published, and the file that is mounted as the key.
_DOORS: Mapping[str, tuple[Mapping[str, str], str, str]] = {
    "this machine": ({}, "127.0.0.1:8080:8080", "/dev/null"),
    "this machine with a key": ({"API_KEY_FILE": "./key"}, "127.0.0.1:8080:8080", "./key"),
    "others with a key": ({"HOST": "0.0.0.0", "API_KEY_FILE": "./key"}, "0.0.0.0:8080:8080", "./key"),
    "everybody": ({"HOST": "0.0.0.0", "API_KEY_FILE": "/dev/null"}, "0.0.0.0:8080:8080", "/dev/null"),
    "others without": ({"HOST": "0.0.0.0"}, "0.0.0.0:8080:8080", f"/dev/null/{NEEDS_KEY}"),
}


@pytest.mark.parametrize("door", _DOORS)
def test_others_come_in_with_a_key_or_by_an_explicit_word(door: str) -> None:
    variables, published, key = _DOORS[door]
    services = _compose("compose.yaml")["services"]
    server = services["server"]
    [port], mount = services["front"]["ports"], server["volumes"][1]
    assert _interpolated(port, variables) == published
    assert _interpolated(mount["source"], variables) == key
    assert mount["target"] == server["command"][server["command"].index("--api-key-file") + 1]
    assert mount["bind"] == {"create_host_path": False}


def _checked(path: Path) -> process.Finished:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return process.run(command)


def test_what_the_compose_file_asks_of_the_server_are_its_flags() -> None:
    """No flag that the runtime would not give."""
    from forge.serve.options import server_arguments
    from forge.serve.runtime import ServerSettings

    given = server_arguments(ServerSettings(Path("m"), "m", 512, adapters={"a": Path("a")}, gpu_layers=1))
    known = {one for one in given if one.startswith("--")} | {"--api-key-file"}
    command = _compose("compose.yaml")["services"]["server"]["command"]
    assert {one for one in command if one.startswith("--")} <= known
