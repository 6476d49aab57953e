"""How `forge serve` decides what it serves with, before any server starts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge import process, report
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
        serve(wish, on_ready=lambda fields: None, handed_over=settings(wish).to_json() if listed else None)


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


@pytest.mark.parametrize(
    ("usable", "load", "running", "shares", "threads"),
    [
        (3, 0.1, 1, [], 3),
        (64, 0.1, 1, [], 4),
        (64, 3.0, 1, [100.0, 100.0, 3.0, 0.0], 2),
        (64, 9.0, 1, [100.0] * 4, 1),
        (64, 9.0, 1, [2.0, 1.0, 0.0, 0.0], 4),  # it was busy, and is so no more
        (2, 3.0, 1, [100.0, 100.0, 0.0, 0.0], 2),  # there is room beside us
        (2, 4.0, 1, [100.0, 100.0, 100.0, 0.0], 1),
        (4, 0.2, 4, [100.0, 100.0, 100.0, 0.0], 1),  # they have only begun
    ],
)
def test_threads_are_the_cores_that_may_be_used_and_are_free(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    usable: int,
    load: float,
    running: int,
    shares: list[float],
    threads: int,
) -> None:
    """As for the export: of a container's share of the machine no more, nor of what OMP_NUM_THREADS says."""
    chosen, said = ServerSettings(Path("m"), "m", 512), io.StringIO()
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: shares)
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(ready, "_LOAD", tmp_path / "loadavg")
    (tmp_path / "loadavg").write_text(f"{load} {load} {load} {running}/99 1234\n")
    monkeypatch.setenv("OMP_NUM_THREADS", str(usable))
    with report.copied_to(said):
        assert ready.with_threads(chosen).threads == threads
    assert ("busy" in said.getvalue()) == (threads < min(usable, 4))
    assert ready.with_threads(replace(chosen, threads=7)).threads == 7


@pytest.mark.programs
@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "1000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_children_wait_without_turning_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str], expected: str
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    script = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    assert process.run([sys.executable, "-c", script]).output == expected


def test_children_in_a_container_get_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch and libgomp count the machine's cores, and a container of one core would be throttled."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for text, expected in {
        "150000 100000": {"OMP_NUM_THREADS": "2"},
        "max 100000": {},
        "900000 100000": {},
        "what": {},
    }.items():
        (tmp_path / "cpu.max").write_text(text)
        assert process.cpu_share({}, tmp_path) == expected
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert process.cpu_share({"OMP_NUM_THREADS": "8"}, tmp_path) == {}
    assert process.cpu_share({}, tmp_path / "none") == {}


def test_a_torn_modelfile_is_ollamas_business_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_tiny_gguf(run / "run.gguf")
    (run / "manifest.json").write_text(json.dumps({"facts": {}}))
    (run / "Modelfile.jinja").write_text('FROM ./run.gguf\nTEMPLATE """never closed\n')
    assert settings(Wish(str(run))).modelfile is None
    with pytest.raises(DataError):
        settings(Wish(str(run), runtime="ollama"))
