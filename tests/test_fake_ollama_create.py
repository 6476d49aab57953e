"""What was measured on a live Ollama 0.33 of blobs and /api/create; see `test_fake_ollama`."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from forge.tools.ollama import Ollama
from tests.fake_ollama import FakeOllama
from tests.ollama_servers import make
from tests.servers import write_adapter
from tests.tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.network, pytest.mark.programs]
USER = [{"role": "user", "content": "Hello?"}]
PLAIN = "{{ range .Messages }}{{ .Content }}{{ end }}"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


def early(url: str, fields: dict[str, Any]) -> tuple[int, str]:
    answer = httpx.post(f"{url}/api/create", json=fields, trust_env=False, timeout=60)
    return answer.status_code, answer.json()["error"]


def late(url: str, fields: dict[str, Any]) -> str:
    """The error in the last line of a stream that began with 200."""
    answer = httpx.post(f"{url}/api/create", json=fields, trust_env=False, timeout=60)
    assert answer.status_code == 200
    return str(json.loads(answer.text.splitlines()[-1])["error"])


def test_blobs(ollama_url: str) -> None:
    content = b"GGUF" + secrets.token_bytes(16)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    route = f"{ollama_url}/api/blobs/{digest}"
    with httpx.Client(trust_env=False) as client:
        assert client.head(route).status_code == 404
        wrong = client.post(route, content=b"other")
        assert wrong.status_code == 400 and wrong.json()["error"].startswith("digest mismatch")
        assert client.post(route, content=content).status_code == 201
        assert client.head(route).status_code == 200
        assert client.post(route, content=content).status_code == 200


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "no good:name:here", "files": {"a": "b"}}, "invalid model name"),
        ({"model": "x", "files": {"/etc/a.gguf": "sha256:0"}}, "file path must be relative"),
        ({"model": "x", "files": {"../a.gguf": "sha256:0"}}, "file path must be relative"),
        ({"model": "x"}, "neither 'from' or 'files' was specified"),
    ],
)
def test_early_errors(ollama_url: str, fields: dict[str, Any], said: str) -> None:
    assert early(ollama_url, fields) == (400, said)


def test_late_errors_stand_in_a_stream_that_began_with_200(
    ollama_url: str, ollama_client: Ollama, tiny_gguf: Path
) -> None:
    fields = {
        "model": "forge-test-late",
        "files": {"m.gguf": ollama_client.push(tiny_gguf, "a blob")},
        "quantize": "Q3_K_X",
    }
    assert "Q3_K_X" in late(ollama_url, fields)
    assert ollama_client.digest("forge-test-late") is None


@pytest.mark.parametrize("quantize", ["F32", "F16", "BF16", "Q8_0", "Q4_K_S", "Q4_K_M"])
def test_what_it_quantizes_to(fake: FakeOllama, tiny_gguf: Path, quantize: str) -> None:
    with Ollama(fake.url) as server:
        make(server, "forge-test-quantize", tiny_gguf, quantize=quantize)


def test_a_gguf_is_written_anew_on_the_server(fake: FakeOllama, tiny_gguf: Path) -> None:
    with Ollama(fake.url) as server:
        make(server, "forge-test-anew", tiny_gguf)
        assert fake.models["forge-test-anew:latest"].blob != server.push(tiny_gguf, "a blob")


def test_what_is_quantized_already_is_not_quantized(
    ollama_url: str, ollama_client: Ollama, model_name: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    """From F16, BF16 and F32 only; the model is not made."""
    smaller = write_tiny_gguf(tmp_path / "q8.gguf", quantized=True)
    files = {"m.gguf": ollama_client.push(smaller, "a blob")}
    assert late(ollama_url, {"model": model_name, "files": files, "quantize": "Q4_K_M"})
    assert ollama_client.digest(model_name) is None
    make(ollama_client, model_name, smaller)
    assert ollama_client.digest(model_name) is not None


def test_one_adapter_and_no_more(
    ollama_url: str, ollama_client: Ollama, model_name: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    paths = [write_adapter(tmp_path / f"{says}.gguf", says=says) for says in "ab"]
    adapters = {path.name: ollama_client.push(path, "a blob") for path in paths}
    files = {"m.gguf": ollama_client.push(tiny_gguf, "a blob")}
    assert late(ollama_url, {"model": model_name, "files": files, "adapters": adapters})
    assert ollama_client.digest(model_name) is None
    make(ollama_client, model_name, tiny_gguf, adapters=dict([adapters.popitem()]))
    assert ollama_client.digest(model_name) is not None


def test_licences_accumulate(ollama_client: Ollama, model_name: str, tiny_gguf: Path) -> None:
    """Texts that no Modelfile could hold among them."""
    texts = ["Permission is granted.", 'A line that ends in """\nand goes on', "no\u00a0break"]
    make(ollama_client, model_name, tiny_gguf, license=texts)
    told = ollama_client.show(model_name)["license"]
    assert all(text in told for text in texts)


def test_an_adapter_of_another_architecture_fails_when_it_is_loaded(
    ollama_client: Ollama, model_name: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_gguf(tmp_path / "adapter.gguf", architecture="qwen2", kind="adapter")
    make(
        ollama_client,
        model_name,
        tiny_gguf,
        template=PLAIN,
        adapters={"a.gguf": ollama_client.push(adapter, "a blob")},
    )
    with pytest.raises(Exception, match=r"\(500\): llama-server process has terminated: exit status 1"):
        ollama_client.chat(model_name, USER)


def test_a_name_that_is_unknown_is_pulled_from_the_internet(fake: FakeOllama) -> None:
    """So forge never sends `from`; against a live server this is not tried."""
    with Ollama(fake.url) as server, pytest.raises(Exception, match="pull model manifest"):
        server.create("forge-test-pull", {"from": "no-such-model"})
    assert fake.pulled == ["no-such-model"]
