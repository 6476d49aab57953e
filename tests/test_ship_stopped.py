"""kill -9, Ctrl-C and SIGTERM in the middle of real stages: what is left, and how the next ship goes on.

The stages that take milliseconds (*modelfile*) are killed in `test_pipeline_kill`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.process import Child
from tests.conftest import link_converters, tree
from tests.shipping import PURE, STAGES, Workshop, family, processes_of, wait_for
from tests.test_process import wait_until_gone

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs]


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    home = link_converters(tmp_path / "home")
    (tmp_path / "work").mkdir()
    made = Workshop(tmp_path / "work", home)
    yield made
    assert processes_of(home) == [], "something of the ships is still running"


def in_stage(workshop: Workshop, stage: str, child: Child) -> None:
    """Wait until `stage` is being built by a worker (the *data* stage has none)."""

    def is_building() -> bool:
        partial = any(path.name.endswith(".partial") for path in workshop.stage_directories(stage))
        return partial and (stage == "data" or len(family(child)) > 1)

    wait_for(stage, is_building, child)


def finished_only(workshop: Workshop) -> bool:
    """Nothing half-made has a final name; each artifact's manifest is there."""
    artifacts = [path for path in (workshop.home / "artifacts").glob("*/*") if path.suffix != ".partial"]
    return all((path / "artifact.json").is_file() for path in artifacts)


@pytest.mark.timeout(1200)
def test_kill_9_in_each_stage_and_only_that_stage_repeats(workshop: Workshop) -> None:
    """Style row 8, with the real stages one after the other in one store."""
    sentences = "".join(
        json.dumps({"sentence": f"There are {n} birds in tree {n}.", "translation_extra": f"Birds {n}."})
        + "\n"
        for n in range(4000)
    )
    (workshop.directory / "rows.jsonl").write_text(sentences)
    workshop.recipe(data={"source": "rows.jsonl", "limit": None}, verify={"learned": "off"})
    for number, stage in enumerate(PURE):
        if stage == "modelfile":
            continue  # too quick to be met
        with workshop.start("ship", "recipe.yaml", "--until", stage) as child:
            in_stage(workshop, stage, child)
            pids = family(child)
            os.kill(child.pid, signal.SIGKILL)
            wait_until_gone(pids)
        assert finished_only(workshop)
        again = workshop.ship("--until", stage)
        assert again.cached == {name: name != stage for name in PURE[: number + 1]}
        assert not list((workshop.home / "artifacts" / stage).glob("*.partial"))
    assert workshop.ship("--until", "verify").cached == dict.fromkeys(PURE, True)

    # *deploy* and *smoke*, while a server runs: it goes too, and nothing is made again.
    with workshop.start("ship", "recipe.yaml") as child:
        wait_for("the server", lambda: any(map(is_server, family(child))), child)
        pids = family(child)
        os.kill(child.pid, signal.SIGKILL)
        wait_until_gone(pids)
    assert processes_of(workshop.home) == []
    assert workshop.ship().cached == {name: name in PURE for name in STAGES}


def is_server(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return "forge.serve.embedded_server" in psutil.Process(pid).cmdline()
    return False


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_verify_goes_on_with_what_is_finished(workshop: Workshop) -> None:
    """On machines that are taken away again it comes to an end; each kill left a whole F16 file."""
    workshop.recipe()
    workshop.ship("--until", "modelfile")

    def finished(start: str = "") -> list[Path]:
        found = (workshop.home / "artifacts" / "verify").glob(f"*.partial/work/kept/{start}*")
        return [path for path in found if not path.name.endswith(".partial")]

    def goes_on() -> bool:
        [verify] = [one for one in planned(workshop) if one["name"] == "verify"]
        return "goes on from where it was stopped" in verify["reasons"]

    met: dict[str, int] = {}
    for wanted in ("f16", "reference"):
        with workshop.start("ship", "recipe.yaml", "--until", "verify") as child:
            in_stage(workshop, "verify", child)
            wait_for(wanted, partial(finished, wanted), child)
            pids = family(child)
            os.kill(child.pid, signal.SIGKILL)
            wait_until_gone(pids)
        times = {path.name: path.stat().st_mtime_ns for path in finished()}
        assert {name: times[name] for name in met} == met, "something finished was made again"
        met = times
        assert goes_on()
        [work] = {path.parent.parent for path in finished()}
        assert {path.name for path in work.iterdir()} <= {"kept", "rows.jsonl"}
    assert workshop.ship("--until", "verify").cached["export"]
    assert not list((workshop.home / "artifacts" / "verify").glob("*.partial"))


def planned(workshop: Workshop) -> list[dict[str, Any]]:
    """What `forge plan` says of each stage."""
    stages: list[dict[str, Any]] = workshop.forge("plan", "recipe.yaml").fields["stages"]
    return stages


def steps_done(workshop: Workshop) -> int:
    """Steps that the training log of an unfinished run tells."""
    logs = list((workshop.home / "artifacts" / "train").glob("*.partial/work/training.jsonl"))
    return len(logs[0].read_text().splitlines()) if logs else 0


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_stopped_training_goes_on_from_its_checkpoint(workshop: Workshop, number: int) -> None:
    workshop.recipe(train={"max_steps": 60, "batch_size": 1, "method": "lora"})
    with workshop.start("ship", "recipe.yaml", "--until", "train", "--json") as child:
        wait_for("three steps", lambda: steps_done(workshop) >= 3, child)
        pids = family(child)
        os.kill(child.pid, number)
        stopped = workshop.heard(child)
        assert stopped.code == 130
        wait_until_gone(pids)
    error = stopped.fields["error"]
    assert error["message"].startswith("training stopped at step ")
    assert error["message"].endswith(" of 60; the checkpoint is kept")
    step = int(error["message"].split()[4])
    assert "stopping train" in stopped.said
    assert workshop.manifest()["outcome"] == error["message"]
    [partial] = workshop.stage_directories("train")
    assert {path.name for path in partial.iterdir()} == {"work"}
    again = workshop.ship("--until", "train")
    assert again.cached == {"data": True, "train": False}
    facts = workshop.manifest()["facts"]["train"]
    assert (facts["steps"], facts["resumed_from"]) == (60, f"checkpoint-{step}")
    assert f"train: going on from checkpoint-{step}" in again.said


def test_ctrl_c_in_another_stage_leaves_nothing(workshop: Workshop) -> None:
    workshop.recipe(train="none", data=None)
    with workshop.start("ship", "recipe.yaml", "--json") as child:
        in_stage(workshop, "export", child)
        pids = family(child)
        os.kill(child.pid, signal.SIGINT)
        stopped = workshop.heard(child)
        wait_until_gone(pids)
    assert stopped.code == 130
    assert stopped.fields["error"]["hint"] == "run the same command again to go on"
    assert tree(workshop.home / "artifacts") == {"export": None}
    assert not list(workshop.run.glob("*.gguf"))
