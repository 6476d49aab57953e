"""`forge serve --print`: what it writes is what Compose and Kubernetes take, and what forge itself runs."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from forge import process
from forge.cli.main import run_command
from forge.errors import DataError, RecipeError
from forge.model.gguf_header import read_gguf
from forge.serve.container import CUDA_IMAGE, IMAGE
from forge.serve.front_nginx import front_conf
from forge.serve.manifests import manifest
from forge.serve.runtime import ServerSettings
from forge.serve.slots import memory_bytes
from tests.specimens import rewrite
from tests.tiny_gguf import write_tiny_gguf

URL = "https://models.example/yoda.gguf"
UPSTREAM = "server:8080 resolve max_fails=1 fail_timeout=5s"


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    model = write_tiny_gguf(tmp_path / "yoda.gguf")
    return ServerSettings(model, "Yoda_Q4", 1024, parallel=2, api_key="open-sesame-1234")


def _documents(text: str) -> list[Any]:
    return list(YAML(typ="safe").load_all(text))


@pytest.mark.parametrize("url", [None, URL])
@pytest.mark.parametrize("key", ["k", None])
def test_kubernetes_takes_it(settings: ServerSettings, url: str | None, key: str | None) -> None:
    text = manifest("kubernetes", replace(settings, api_key=key), model_url=url, replicas=3)
    config, deployment, service = _documents(text)
    for one in (config, deployment, service):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    pod = deployment["spec"]["template"]["spec"]
    server, front = pod["containers"]
    assert server["args"][-4:] == ["--host", "127.0.0.1", "--port", "8081"], "its front alone reaches it"
    assert front["ports"] == [{"name": "http", "containerPort": 8080}]
    assert "server 127.0.0.1:8081;" in config["data"]["nginx.conf"]
    assert {"name": "GOMP_SPINCOUNT", "value": "1000"} in server["env"]
    assert (deployment["kind"], deployment["metadata"]["name"]) == ("Deployment", "yoda-q4")
    assert deployment["spec"]["replicas"] == 3
    assert server["image"] == IMAGE
    assert ("--api-key-file" in server["args"]) == bool(key)
    assert "--threads" not in server["args"]
    assert front["readinessProbe"]["httpGet"]["path"] == "/health"
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounted = {one["name"] for container in pod["containers"] for one in container["volumeMounts"]}
    assert {one["name"] for one in pod["volumes"]} == mounted
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    if url:
        [fetcher] = pod["initContainers"]
        digest = hashlib.sha256(settings.model.read_bytes()).hexdigest()
        assert fetcher["command"][-3:] == ["/models/yoda.gguf", url, digest]


def test_one_of_several_parts_is_refused(settings: ServerSettings, tmp_path: Path) -> None:
    part = rewrite(settings.model, tmp_path / "part.gguf", split__count=2)
    with pytest.raises(DataError, match="one of the 2 parts"):
        manifest("kubernetes", replace(settings, model=part))


def test_the_validator_can_refuse(settings: ServerSettings) -> None:
    _, deployment, _ = _documents(manifest("kubernetes", settings))
    deployment["spec"]["replikas"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def _compose_server(settings: ServerSettings, path: Path) -> Any:
    """The service that is written, which Compose's own schema takes."""
    path.write_text(manifest("compose", settings))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    finished = process.run(command)
    assert finished.status == 0, finished.output
    [document] = _documents(path.read_text())
    assert "ports" not in document["services"]["server"], "its front alone reaches it"
    assert document["networks"]["behind"] == {"internal": True}
    return document["services"]["server"]


@pytest.mark.programs
def test_compose_takes_it(settings: ServerSettings, tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    server = _compose_server(replace(settings, port=9000), path)
    [document] = _documents(path.read_text())
    front = document["services"]["front"]
    assert front["ports"] == ["127.0.0.1:9000:8080"]
    assert front["read_only"] and front["cap_drop"] == ["ALL"] and front["mem_limit"] and front["pids_limit"]
    assert server["mem_limit"] and server["pids_limit"]
    text = document["configs"]["front"]["content"].replace("$$", "$")
    assert text.rstrip() == front_conf(settings, upstream=UPSTREAM, resolver="127.0.0.11").rstrip()
    assert server["read_only"] is True
    assert server["volumes"][0]["source"] == str(settings.model), "an absolute path"
    assert all(volume["read_only"] for volume in server["volumes"])


@pytest.mark.programs
@pytest.mark.parametrize(("layers", "gpu"), [(-1, True), (None, True), (0, False)])
def test_a_cuda_image_is_given_a_gpu(
    settings: ServerSettings, tmp_path: Path, layers: int | None, gpu: bool
) -> None:
    """In the words of each; no other image is, and none is asked for layers that it has no place for."""
    wish = replace(settings, image=CUDA_IMAGE, gpu_layers=layers)
    _, deployment, _ = _documents(manifest("kubernetes", wish))
    kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)
    container, _ = deployment["spec"]["template"]["spec"]["containers"]
    server = _compose_server(wish, tmp_path / "compose.yaml")
    assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if gpu else None)
    assert ("deploy" in server) == gpu
    for command in (container["args"], server["command"]):
        assert (" --n-gpu-layers all " in " ".join(command)) == (layers == -1)
    if gpu:
        [device] = server["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


@pytest.mark.parametrize("kind", ["kubernetes", "compose"])
@pytest.mark.parametrize("image", [None, "my/own:1"])
def test_layers_on_a_gpu_without_cuda_are_refused(
    settings: ServerSettings, kind: str, image: str | None
) -> None:
    assert "nvidia" not in manifest(kind, replace(settings, image=image))
    with pytest.raises(RecipeError, match="runs on the CPU only") as refused:
        manifest(kind, replace(settings, image=image, gpu_layers=-1))
    assert refused.value.hint.endswith(f"--image {CUDA_IMAGE}")


def test_dollars_in_names_stay_dollars(settings: ServerSettings, tmp_path: Path) -> None:
    """Compose replaces $HOME and ${HOME}, Kubernetes $(HOME); both read $$ as a dollar."""
    odd = write_tiny_gguf(tmp_path / "a$HOME$$(HOME).gguf")
    wish = replace(settings, model=odd, alias="${HOME}", api_key=None)
    compose, (_, kubernetes, _) = (_documents(manifest(kind, wish)) for kind in ("compose", "kubernetes"))
    server = compose[0]["services"]["server"]
    [mount] = server["volumes"]
    args = kubernetes["spec"]["template"]["spec"]["containers"][0]["args"]
    written = [mount["source"], mount["target"], *server["command"], *args]
    assert all("$" not in text.replace("$$", "") for text in written)
    inside = "/models/a$HOME$$(HOME).gguf"
    assert [mount[end].replace("$$", "$") for end in ("source", "target")] == [str(odd), inside]
    for command in (server["command"], args):
        said = [one.replace("$$", "$") for one in command]
        assert (said[said.index("--model") + 1], said[said.index("--alias") + 1]) == (inside, "${HOME}")


def test_no_key_is_in_what_is_printed(settings: ServerSettings) -> None:
    for kind in ("compose", "kubernetes"):
        assert "open-sesame" not in manifest(kind, settings)


def test_memory_is_file_cache_and_server(settings: ServerSettings) -> None:
    """The tiny model: one layer, one key head of 64 numbers, f16: 256 bytes a token."""
    header = read_gguf(settings.model)
    more = replace(settings, context_tokens=2048)
    assert memory_bytes(more, header) - memory_bytes(settings, header) == 256 * 1024 * 2
    assert memory_bytes(settings, header) > settings.model.stat().st_size + 256 * 2048
    longest = replace(settings, context_tokens=131072)
    with_log_probabilities = 131072 * 20 * 700
    assert memory_bytes(longest, header) > 131072 * 256 * 2 + with_log_probabilities


def test_what_a_manifest_cannot_say_is_refused(settings: ServerSettings) -> None:
    with pytest.raises(RecipeError, match="--lora"):
        manifest("kubernetes", replace(settings, adapters={"a": Path("a")}))
    with pytest.raises(RecipeError, match="goes with --print kubernetes"):
        manifest("compose", settings, model_url=URL)
    with pytest.raises(RecipeError, match="said to Compose"):
        manifest("compose", settings, replicas=2)
    with pytest.raises(RecipeError, match="not an https URL"):
        manifest("kubernetes", settings, model_url="http://x/y")


def test_command_prints_it(settings: ServerSettings, capsys: pytest.CaptureFixture[str]) -> None:
    kubernetes = ["serve", str(settings.model), "--print", "kubernetes", "--replicas", "2"]
    # A pod listens to its cluster: as open as --host 0.0.0.0 is.
    assert run_command(kubernetes) == 2
    capsys.readouterr()
    assert run_command([*kubernetes, "--without-key"]) == 0
    assert [one["kind"] for one in _documents(capsys.readouterr().out)] == [
        "ConfigMap",
        "Deployment",
        "Service",
    ]
    assert run_command(["serve", str(settings.model), "--replicas", "2"]) == 2
    assert run_command(["serve", str(settings.model), "--runtime", "ollama", "--print", "compose"]) == 2
    assert "--print writes how llama.cpp's server is started, not Ollama" in capsys.readouterr().err
    assert run_command(["serve", str(settings.model), "--print", "compose", "--host", "0.0.0.0"]) == 2
