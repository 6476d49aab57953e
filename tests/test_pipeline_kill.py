"""kill -9 in the middle of each stage, then the same ship again; two ships at once. Style row 8.

The killed ships run as `python -m tests.test_pipeline_kill STORE JOURNAL STAGE`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from forge import report
from forge.codec import Json
from forge.pipeline.run import run_stages
from forge.pipeline.stage import Stage
from forge.process import Child
from forge.store.artifacts import Artifact, Facts, Store

STAGES = ("train", "validate", "export")


@dataclass(frozen=True)
class Slow(Stage):
    """Writes a checkpoint and half of its output, then waits if it is the one to be killed."""

    journal: Path
    name: str
    needs: tuple[str, ...]
    waits: bool = False
    version = 1

    def params(self) -> Mapping[str, Json]:
        return {}

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> Facts:
        with self.journal.open("a") as stream:
            stream.write(self.name + "\n")
        half = out / "output"
        resumed = (out / "work" / "checkpoint").exists()
        assert not half.exists(), "an output of the killed run is still there"
        half.write_text("half")
        (out / "work").mkdir(exist_ok=True)
        (out / "work" / "checkpoint").write_text("1")
        if self.waits:
            report.output("building")
            time.sleep(60)
        half.write_text("whole")
        return {"resumed": resumed}


def pipeline(journal: Path, waits: str = "") -> tuple[Slow, ...]:
    return tuple(
        Slow(journal, name, STAGES[:number], waits=name == waits) for number, name in enumerate(STAGES)
    )


def start(store: Store, journal: Path, stage: str) -> Child:
    """A ship in a process of its own; returns when `stage` is half built."""
    command = [sys.executable, "-m", "tests.test_pipeline_kill", str(store.root), str(journal), stage]
    child = Child(command, directory=Path(__file__).parent.parent)
    lines = []
    for line in child.lines():
        lines.append(line)
        if line == "building":
            return child
    raise AssertionError(f"the ship ended early: {lines}")


@pytest.mark.programs
@pytest.mark.parametrize("stage", STAGES)
def test_after_kill_9_only_that_stage_repeats_and_goes_on_from_its_work(tmp_path: Path, stage: str) -> None:
    store, journal = Store(tmp_path / "store"), tmp_path / "journal"
    with start(store, journal, stage) as child:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    position = STAGES.index(stage)
    assert journal.read_text().split() == list(STAGES[: position + 1])
    journal.unlink()
    results = run_stages(pipeline(journal), store)
    assert journal.read_text().split() == list(STAGES[position:])
    assert [result.cached for result in results.values()] == [name in STAGES[:position] for name in STAGES]
    assert results[stage].facts == {"resumed": True}
    kept = (path for path in store.root.rglob("*") if path.is_file() and path.parent.name != "runs")
    left = {path.relative_to(store.root).as_posix() for path in kept}
    keys = {name: result.artifact.key for name, result in results.items() if result.artifact}
    expected = {"FORMAT"}
    for name, key in keys.items():
        expected |= {f"artifacts/{name}/{key}/output", f"artifacts/{name}/{key}/artifact.json"}
        expected |= {f"locks/{name}-{key}.lock"}
    assert left == expected
    assert all((store.path(name, key) / "output").read_text() == "whole" for name, key in keys.items())


@pytest.mark.programs
def test_the_second_of_two_ships_says_for_whom_it_waits_and_takes_over_when_that_one_dies(
    tmp_path: Path,
) -> None:
    store, journal = Store(tmp_path / "store"), tmp_path / "journal"
    with start(store, journal, "train") as first:
        command = [sys.executable, "-m", "tests.test_pipeline_kill", str(store.root), str(journal), ""]
        with Child(command, directory=Path(__file__).parent.parent) as second:
            lines = second.lines()
            assert next(lines) == "[1/3] train: goes on from where it was stopped"
            waiting = next(lines)
            assert re.fullmatch(
                rf"train: waiting for process {first.pid} \(run half, since \d{{4}}-\d\d-\d\d [\d:]{{8}}\)",
                waiting,
            )
            os.kill(first.pid, signal.SIGKILL)  # its lock is free at once: the second takes over
            assert [line.partition(":")[0] for line in lines] == [
                "[1/3] train",
                "[2/3] validate",
                "[2/3] validate",
                "[3/3] export",
                "[3/3] export",
            ]
            assert second.wait() == 0
    assert journal.read_text().split() == ["train", "train", "validate", "export"]


@pytest.mark.programs
def test_a_ship_that_waited_finds_it_made(tmp_path: Path) -> None:
    store, journal = Store(tmp_path / "store"), tmp_path / "journal"
    command = [sys.executable, "-m", "tests.test_pipeline_kill", str(store.root), str(journal), ""]
    directory = Path(__file__).parent.parent
    with Child(command, directory=directory) as first, Child(command, directory=directory) as second:
        said = [*first.lines(), *second.lines()]
        assert (first.wait(), second.wait()) == (0, 0), said
    assert sorted(journal.read_text().split()) == sorted(STAGES), "each stage once, whoever came first"


@pytest.mark.programs
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_started_by_a_stage_inherits_no_lock(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    seen: list[str] = []

    @dataclass(frozen=True)
    class Starts(Stage):
        name = "train"
        version = 1

        def params(self) -> Mapping[str, Json]:
            return {}

        def build(self, inputs: Mapping[str, Artifact], out: Path) -> Facts:
            ours = [path.readlink().suffix for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            assert ".lock" in ours
            with Child([sys.executable, "-c", "print('up', flush=True); input()"]) as child:
                next(child.lines())
                seen.extend(path.readlink().suffix for path in Path(f"/proc/{child.pid}/fd").iterdir())
            return {}

    run_stages([Starts()], store)
    assert seen and ".lock" not in seen


def main(root: str, journal: str, stage: str) -> None:
    """Ship, and stop for ever in the middle of `stage`."""
    directory = Path(root).parent / "half"
    directory.mkdir(exist_ok=True)
    run_stages(pipeline(Path(journal), waits=stage), Store(Path(root)), run_directory=directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
