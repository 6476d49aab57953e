"""Kill -9 at random moments of two ships, and what is there in the end is the same.

Three moments each in `make test-all`; 20 in `make campaign`, so that every stage is met twice
(FORGE_KILLS). FORGE_KILL_SEED chooses other moments. Not covered: power cuts.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import link_converters
from tests.shipping import PURE, STAGES, Workshop, family, processes_of, wait_for
from tests.test_process import wait_until_gone

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs, pytest.mark.slow]
KILLS = int(os.environ.get("FORGE_KILLS", "3"))
SETTINGS: dict[str, dict[str, Any]] = {
    "merged": {},
    "adapter": {"export": {"mode": "adapter", "quant": "f16"}, "train": {"method": "lora"}},
}


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Workshop]]:
    """Two places with a store each, and a directory for temporary files that both have to leave empty."""
    made = []
    for name in ("whole", "killed"):
        home = link_converters(tmp_path / f"{name}-home")
        (tmp_path / name).mkdir()
        made.append(Workshop(tmp_path / name, home))
    yield made
    assert [processes_of(one.home) for one in made] == [[], []], "something of the ships is still running"


def digests(workshop: Workshop) -> dict[str, str]:
    """Of what every pure stage has made; a measurement's seconds are no bytes of it."""
    found = {}
    for path in (workshop.home / "artifacts").glob("*/*/artifact.json"):
        assert path.parent.suffix not in (".partial", ".replaced")
        stage = path.parent.parent.name
        assert stage not in found, f"{stage} was made twice"
        found[stage] = json.loads(path.read_text())["digest"]
    return found


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_is_there_in_the_end(
    setting: str, places: list[Workshop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(f"{setting} {os.environ.get('FORGE_KILL_SEED', '0')}")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    whole, killed = places
    for place in places:
        place.recipe(**SETTINGS[setting])
    whole.ship()
    took = _seconds(whole)
    for number in range(KILLS):
        # Spread over the stages; those before it are in the store by then.
        stage = STAGES[number * len(STAGES) // KILLS]
        with killed.start("ship", "recipe.yaml") as child:
            wait_for(stage, partial(_has_begun, killed, stage), child, seconds=20 * took.get("train", 30))
            moment = time.monotonic() + chance.uniform(0, took.get(stage, 6.0))
            while time.monotonic() < moment and child.status is None:
                time.sleep(0.005)
            pids = family(child) if child.status is None else []
            if pids:
                os.kill(child.pid, signal.SIGKILL)
            wait_until_gone(pids)
    killed.ship()
    assert digests(killed) == digests(whole) and set(digests(whole)) >= set(PURE)
    _nothing_is_left(killed, temporary)
    assert killed.ship().cached == {name: name in PURE for name in STAGES}


def _seconds(workshop: Workshop) -> dict[str, float]:
    """What each pure stage took."""
    made = (workshop.home / "artifacts").glob("*/*/artifact.json")
    return {path.parent.parent.name: json.loads(path.read_text())["seconds"] for path in made}


def _has_begun(workshop: Workshop, stage: str) -> bool:
    """Whether it is being made, or is; what acts on the world begins when the last pure one is there."""
    return any(workshop.stage_directories(stage if stage in PURE else PURE[-1]))


def _nothing_is_left(workshop: Workshop, temporary: Path) -> None:
    """No scratch, no process, no port, no lock."""
    scratch = [path for path in workshop.home.rglob("*") if path.name.endswith((".partial", ".replaced"))]
    assert scratch == []
    assert sorted(path.name for path in temporary.iterdir() if path.name.startswith("forge-")) == []
    assert [path.name for path in workshop.run.iterdir() if path.name.startswith(".")] == []
    assert processes_of(workshop.home) == []
    listening = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    ours = {one.pid for one in psutil.Process().children(recursive=True)}
    assert [one for one in listening if one.pid in ours] == []
    # The next takes every lock at once.
    with workshop.start("ship", "recipe.yaml", "--until", "modelfile", "--json") as child:
        assert not any("waits for" in line for line in workshop.heard(child).said.splitlines())
