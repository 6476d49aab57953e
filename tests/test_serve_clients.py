"""Other people's libraries against a real server with a real model, each in its own words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge import process
from forge.model.smollm2 import packaged_gguf, write_tokenizer
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from tests.conftest import SESSION_HOME
from tests.servers import KEY

pytestmark = [pytest.mark.network, pytest.mark.programs, pytest.mark.slow]
ASK = Path(__file__).parent / "clients" / "ask.py"


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    settings = ServerSettings(packaged_gguf(), "smol", 2048, parallel=2, api_key=KEY, embeddings=True)
    with serve_embedded(settings) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's, for what counts tokens itself."""
    import gguf

    out = tmp_path_factory.mktemp("tokenizer")
    reader = gguf.GGUFReader(str(packaged_gguf()))
    write_tokenizer(out, {name: field.contents() for name, field in reader.fields.items()})
    return out


@pytest.mark.parametrize("library", ["instructor", "langchain", "litellm", "anthropic", "llm", "lm_eval"])
def test_library_is_answered(served: Endpoint, library: str, tokenizer: Path) -> None:
    python = SESSION_HOME / "clients" / "bin" / "python"
    assert python.is_file(), f"{python} is not there; run: make clients"
    finished = process.run(
        [str(python), str(ASK), library, served.url, KEY, "smol", str(tokenizer)],
        environment={"PYTHONPATH": ""},
    )
    assert finished.status == 0, finished.output[-2000:]
    told = json.loads(finished.output.splitlines()[-1])
    for field in ("city", "by_schema"):
        assert told.get(field, "Paris") == "Paris"
    for field in ("text", "streamed"):
        assert isinstance(told.get(field, "x"), str) and told.get(field, "x")
    assert told.get("embedding", 576) == 576
    assert told.get("tokens", 1) > 0
    assert told.get("accuracy", 1.0) == 1.0
    assert told
