"""How `forge serve` decides what it serves with, before any server starts."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.commands.serve import serve
from forge.errors import DataError, StageError
from forge.serve import ready
from forge.serve.endpoint import Endpoint
from forge.serve.runtime import ServerSettings
from forge.ship.serving import Wish, settings
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """What a runtime was started with; it starts nothing, and says that its server has ended."""
    found: list[ServerSettings] = []

    @contextlib.contextmanager
    def runtime(chosen: ServerSettings, *, log: Path | None = None) -> Iterator[Endpoint]:
        found.append(chosen)
        yield Endpoint("http://127.0.0.1:9", chosen.alias, why_gone=lambda: "it has ended")

    monkeypatch.setattr("forge.ship.serving.runtime_for", lambda name: runtime)
    return found


def _serve(wish: Wish, *, listed: bool = False) -> None:
    with pytest.raises(StageError, match="it has ended"):
        serve(wish, said=lambda fields: None, handed_over=settings(wish).to_json() if listed else None)


@pytest.mark.parametrize("listed", [False, True])
def test_a_key_may_come_out_of_a_pipe(
    started: list[ServerSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """`--api-key-file <(pass show key)`: what it gives can be read once."""
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    out, into = os.pipe()
    os.write(into, b"open-sesame\n")
    os.close(into)
    try:
        _serve(Wish(str(model), api_key_file=Path(f"/dev/fd/{out}")), listed=listed)
    finally:
        os.close(out)
    assert [one.api_key for one in started] == ["open-sesame"]


@pytest.mark.parametrize(
    ("asked", "slots"),
    [
        ({}, 8),
        ({"gpu_layers": 0}, 8),
        ({"gpu_layers": -1}, None),
        ({"gpu_layers": 5}, None),
        ({"parallel": 3}, 3),
        ({"runtime": "llama-server"}, None),
    ],
)
def test_slots_for_many_are_for_a_cpu_alone(
    started: list[ServerSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    slots: int | None,
) -> None:
    """The memory of a GPU is unknown here."""
    monkeypatch.setattr("forge.commands.serve.slots_for", lambda chosen: 8)
    _serve(Wish(str(write_tiny_gguf(tmp_path / "tiny.gguf")), **asked))
    assert [one.parallel for one in started] == [slots]


def test_threads_are_physical_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the export: of a container's share of the machine no more, nor of what OMP_NUM_THREADS says."""
    chosen = ServerSettings(Path("m"), "m", 512)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8 if logical else 4)
    for usable, threads in ((3, 3), (64, 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", str(usable))
        assert ready.threads_of(chosen) == threads
        assert ready.threads_of(replace(chosen, threads=7)) == 7


def test_a_torn_modelfile_is_ollamas_business_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_tiny_gguf(run / "run.gguf")
    (run / "manifest.json").write_text(json.dumps({"facts": {}}))
    (run / "Modelfile.jinja").write_text('FROM ./run.gguf\nTEMPLATE """never closed\n')
    assert settings(Wish(str(run))).modelfile is None
    with pytest.raises(DataError):
        settings(Wish(str(run), runtime="ollama"))
