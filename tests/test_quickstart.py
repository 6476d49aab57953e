"""The quickstart whole: what a person sees who types `make ship`, and the figures of the README."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import link_converters
from tests.shipping import PURE, STAGES, Workshop, processes_of

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
QUICKSTART = Path(__file__).parent.parent / "templates" / "recipes" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.timeout(2400)
def test_the_shipped_file_behind_its_server_speaks_yoda(tmp_path: Path) -> None:
    """It learned: at least 54 of 60 held-out sentences exactly, where the base answers under 5 %."""
    home = link_converters(tmp_path / "home")
    (tmp_path / "work").mkdir()
    workshop = Workshop(tmp_path / "work", home)
    shutil.copy(QUICKSTART, workshop.directory / "recipe.yaml")
    answer = workshop.ship()
    learned = answer.fields["learned"]
    assert (learned["metric"], learned["rows"]) == ("exact_match", 60)
    assert learned["before"] < 0.05
    assert learned["served"] is True, "the figure is the shipped file's"
    assert learned["after"] >= 0.9
    assert answer.fields["certificate"]["ok"] is True
    assert "learned: 60 held-out rows, exact answers: base 0%" in answer.said
    [smoke] = answer.fields["smoke"]
    assert smoke["ok"] and smoke["answer"].startswith("In this sandwich, there is bacon.")
    assert list(answer.cached) == [*STAGES] and not any(answer.cached.values())

    again = workshop.ship()
    assert {name for name, cached in again.cached.items() if cached} == {*PURE}
    assert again.fields["learned"] == learned and again.fields["smoke"] == answer.fields["smoke"]

    the_notebook_does_the_same(workshop)

    endpoint = workshop.forge("serve", "quickstart", "--port", "0", "--detach").fields["endpoint"]
    try:
        answers_as_llama_server_does(endpoint)
    finally:
        assert workshop.forge("stop", "quickstart").code == 0
    assert processes_of(home) == []


def the_notebook_does_the_same(workshop: Workshop) -> None:
    """docs/quickstart.ipynb runs whole, in the same place and store: nothing is trained again."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    environment = os.environ | {"FORGE_HOME": str(workshop.home), "PYTHONPATH": str(NOTEBOOK.parent.parent)}
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(workshop.directory)}},
    )
    client.execute(env=environment)
    outputs = ["".join(str(output) for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert "'verify': True" in outputs[4], "the plan knows that it is in the store"
    assert "'metric': 'exact_match'" in outputs[6] and "True" in outputs[6]
    assert "Rich, that strange queen is." in outputs[8]
    assert "train.lora.r" in outputs[10] and "data" in outputs[10]


def answers_as_llama_server_does(endpoint: str) -> None:
    """Chat, streamed and not, raw completion, health and the list of models."""
    asked = {"messages": [{"role": "user", "content": "There is bacon in this sandwich."}], "temperature": 0}
    with httpx.Client(base_url=endpoint, timeout=60) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["quickstart"]
        whole = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
        assert whole.startswith("In this sandwich, there is bacon.")
        # llama-server closes the connection after a stream, and does not say so.
        closing: dict[str, Any] = {"headers": {"Connection": "close"}, "json": {**asked, "stream": True}}
        with client.stream("POST", "/v1/chat/completions", **closing) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
        assert "".join(pieces) == whole
        prompt = "<|im_start|>user\nThere is bacon in this sandwich.<|im_end|>\n<|im_start|>assistant\n"
        raw = client.post("/completion", json={"prompt": prompt, "temperature": 0, "n_predict": 64}).json()
        assert raw["content"].strip() == whole.strip()
