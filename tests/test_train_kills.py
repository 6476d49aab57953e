"""What training survives: kill -9 at ten random steps, a damaged checkpoint, a full disk.

FORGE_KILL_SEED chooses other moments. Not covered: power cuts, and a GPU.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from forge import process
from forge.codec import to_plain
from forge.errors import InterruptedByUserError, StageError
from forge.train.checkpoints import MARKER
from forge.train.live import LivePage
from forge.train.log import Step, read_log
from forge.train.request import TrainRequest
from forge.train.run import train
from tests.models import PEFT_WARNS
from tests.test_train import arguments

pytestmark = [
    PEFT_WARNS,
    # trl (github.com/huggingface/trl) still sets the old name.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.training,
    pytest.mark.programs,
    pytest.mark.timeout(1500),
]

KILLS, STEPS = 10, 30


def killed_again_and_again(request: TrainRequest, chance: random.Random) -> list[int]:
    """The last step that each killed run had logged. A fork of this process trains: imports are paid once."""
    import peft  # noqa: F401
    import trl  # noqa: F401

    log, reached = request.out / "work" / "training.jsonl", []
    for number in range(KILLS):
        goal = STEPS * number // KILLS + chance.randint(1, STEPS // KILLS)
        child = os.fork()
        if not child:
            train(request)
            os._exit(0)
        while _last_step(log) < goal:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"it ended before step {goal}"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(_last_step(log))
    return reached


def _last_step(log: Path) -> int:
    return max((step.step for step in read_log(log, Step)), default=0)


PROGRAM = """
import json, random, sys
from forge.codec import from_plain
from forge.train.request import TrainRequest
from tests.test_train_kills import killed_again_and_again
request = from_plain(TrainRequest, json.loads(sys.argv[1]))
print(killed_again_and_again(request, random.Random(sys.argv[2])))
"""


def request(base: Path, data: Path, out: Path, **changes: Any) -> TrainRequest:
    """With a checkpoint after every step, nearly."""
    return arguments(base, data, out, checkpoint_minutes=0.0001, **changes)


def same(one: TrainRequest, other: TrainRequest) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return all((one.out / name).read_bytes() == (other.out / name).read_bytes() for name in names)


@pytest.mark.slow
def test_ten_kills_and_the_adapter_is_the_same(base: Path, data: Path, tmp_path: Path) -> None:
    whole, killed = (request(base, data, tmp_path / name, max_steps=STEPS) for name in ("whole", "killed"))
    train(whole)
    seed = os.environ.get("FORGE_KILL_SEED", "0")
    output = process.run([sys.executable, "-c", PROGRAM, json.dumps(to_plain(killed)), seed]).output
    reached = json.loads(output.splitlines()[-1])
    assert len(reached) == KILLS and reached[-1] > STEPS * (KILLS - 1) // KILLS
    assert str(train(killed).resumed_from).startswith("checkpoint-")
    assert same(killed, whole)


def test_a_wish_to_stop_while_all_are_asked_is_heard_a_step_later(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes = 0

    def agreed(device: object, *wishes: bool) -> tuple[bool, ...]:
        nonlocal votes
        votes += 1
        if votes == 3:
            signal.raise_signal(signal.SIGTERM)
        return wishes

    monkeypatch.setattr("forge.train.watch.agreed", agreed)
    with pytest.raises(InterruptedByUserError, match="training stopped at step 4 of 8"):
        train(arguments(base, data, tmp_path / "out", max_steps=8))


def test_a_damaged_checkpoint_is_left_out_for_the_one_before(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = (request(base, data, tmp_path / name, max_steps=8) for name in ("whole", "stopped"))
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedByUserError):
            train(stopped)
    *_, before, newest = checkpoints(stopped)
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert train(stopped).resumed_from == before.name
    damaged = f"{newest.name} is damaged (adapter_model.safetensors has other bytes than were written)"
    assert damaged in "".join(capsys.readouterr())
    assert same(stopped, whole)


def at_step(patch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Do something when the step has been logged, before its checkpoint."""
    add = LivePage.add

    def added(self: LivePage, state: Any, *values: Any) -> None:
        add(self, state, *values)
        if state.global_step == number:
            do()

    patch.setattr(LivePage, "add", added)


def checkpoints(request: TrainRequest) -> list[Path]:
    marked = (path.parent for path in (request.out / "work").glob(f"checkpoint-*/{MARKER}"))
    return sorted(marked, key=lambda path: int(path.name.rpartition("-")[2]))


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_full_disk_at_a_checkpoint(
    writer: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each library has its own error for it; with room made, training goes on from the checkpoint before."""
    given = request(base, data, tmp_path / "out", max_steps=6)
    optimizer = given.out / "work" / "checkpoint-4" / "optimizer.pt"
    with monkeypatch.context() as full:
        if writer == "torch":
            at_step(full, 4, partial(_write_nowhere, optimizer))
            full.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        else:
            full.setattr("peft.peft_model.safe_save_file", _full_at_the_fourth())
        with pytest.raises(StageError, match="the disk is full"):
            train(given)
    optimizer.unlink(missing_ok=True)
    assert checkpoints(given)[-1].name == "checkpoint-3"
    assert train(given).resumed_from == "checkpoint-3"


def _write_nowhere(path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to("/dev/full")


def _full_at_the_fourth() -> Callable[..., None]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def save(tensors: Any, path: str, **options: Any) -> None:
        if "checkpoint-4" in path:  # as it says on a file system of 600 kB
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **options)

    return save
