"""The guides of docs/guides: every command is run, in its order, as it stands there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, link_converters
from tests.fake_ollama import FakeOllama
from tests.guides import GUIDES, WrongGuideError, blocks, run_guide
from tests.shipping import Workshop, processes_of

# What a page shows of itself when its commands are run; `notebook` has none, its notebook a test of its own.
RUN = ("adapter", "batch", "is-my-gguf-right", "laptop", "one-gpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all guides: the small real model is made once."""
    home = link_converters(tmp_path_factory.mktemp("store") / "home")
    yield home
    assert processes_of(home) == [], "a guide leaves something running"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_these_are_the_guides() -> None:
    assert sorted(path.stem for path in GUIDES.glob("*.md")) == sorted((*RUN, "notebook"))
    assert blocks(GUIDES / "notebook.md") == []
    for name in RUN:
        made = blocks(GUIDES / f"{name}.md")
        assert sum(block.is_run for block in made) >= 5
        assert all(len(block.reason.split()) > 3 for block in made if block.reason)


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.network
@pytest.mark.programs
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", RUN)
def test_every_command_of_a_guide_runs(
    name: str, store: Path, tmp_path: Path, fake_ollama: FakeOllama
) -> None:
    """S1, T1: in a directory of its own, no hub asked; the stand-in for Ollama is real HTTP."""
    environment = {
        "FORGE_HOME": str(store),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OLLAMA_HOST": fake_ollama.url,
        "TERM": os.environ["TERM"],
    }
    try:
        said = run_guide(GUIDES / f"{name}.md", tmp_path, environment, port=free_port())
        assert "Traceback" not in said
    finally:
        Workshop(tmp_path, store).forge("stop")


@pytest.mark.programs
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\ntrue\nfalse\necho later\n```\n", "guide.md:1: ended with 1"),
        ("```console\n$ echo one\ntwo\n```\n", "guide.md:1: 'two' did not come out of it"),
        ("```console\n$ echo one; echo two\ntwo\none\n```\n", "'one' did not come out of it"),
        ('```console title="exit 5"\n$ true\n```\n', "guide.md:1: ended with 1"),
        ("```sh\nforge\n", "guide.md:1: a block that does not end"),
        ("```\nforge\n```\n", "guide.md:1: a block that is neither commands nor a file"),
        ('```sh title="later"\nforge\n```\n', "guide.md:1: a block that is neither"),
    ],
)
def test_a_guide_that_is_wrong_is_seen(text: str, message: str, tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text(text)
    with pytest.raises(WrongGuideError, match=message.replace("(", r"\(")):
        run_guide(guide, tmp_path, {}, port=1)


@pytest.mark.programs
def test_what_a_guide_writes_and_sets_stays(tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text(
        '```json title="row.json"\n{"a": "$b"}\n```\n```sh\nPORT=8080; printf "no line"\n```\n'
        '```sh title="not run: there is no such program"\nnone\n```\n'
        '```console title="exit 5"\n$ (exit 5)\n```\n'
        '```console\n$ cat row.json; echo $PORT\n{"a":   "$b"}\n17\n```\n'
    )
    assert run_guide(guide, tmp_path, {}, port=17).endswith('{"a": "$b"}\n17')
