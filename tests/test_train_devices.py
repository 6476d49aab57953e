"""Several processes that train as one, over gloo on this machine's processor: for real.

GPUs are described, not there: what each process would be told is compared whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge import process, report, worker
from forge.commands.join import join
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import DataError, InterruptedByUserError, MissingToolError, RecipeError, StageError
from forge.model.checkpoint import open_checkpoint
from forge.model.config import read_configuration
from forge.recipe.schema import Train
from forge.train.arguments import arguments as trainer_arguments
from forge.train.checkpoints import MARKER
from forge.train.hardware import Hardware
from forge.train.join import Joining, invite
from forge.train.memory import Device, estimate_of, job_of, training_device
from forge.train.ranks import gpu_count, ranks_of
from forge.train.request import Trained
from forge.train.run import train
from forge.train.speed import require_available
from tests.models import PEFT_WARNS
from tests.test_train import arguments
from tests.test_train_pairs import PAIRS, prepared
from tests.told_sink import Told

pytestmark = [PEFT_WARNS, pytest.mark.programs, pytest.mark.network, pytest.mark.timeout(900)]

CPU = Device("cpu", "main memory", 16 << 30, 12 << 30, has_bfloat16=True)
GPU = Device("cuda", "NVIDIA L4", 24 << 30, 23 << 30, has_bfloat16=True)
ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # nvidia-smi's
SHAPE: Mapping[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def ragged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of 9 to 55 tokens: which of them share a step depends on every choice of the sampler."""
    directory = tmp_path_factory.mktemp("ragged")
    rows = [json.loads(line) for line in (data / TRAIN_FILE).read_text(encoding="utf-8").splitlines()]
    made = []
    for number in range(24):
        row, tokens = rows[number % len(rows)], 9 + 2 * (7 * number % 24)
        ids = (row["input_ids"] * 8)[number : number + tokens]
        made.append({**row, "input_ids": ids, "labels": [-100, *ids[1:]]})
    (directory / TRAIN_FILE).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    (directory / HELDOUT_FILE).write_bytes((data / HELDOUT_FILE).read_bytes())
    return directory


def _trained(base: Path, data: Path, out: Path, **changes: Any) -> Trained:
    request = arguments(base, data, out, **{"max_steps": 6, "lora": SHAPE, **changes})
    together = ranks_of(request.settings, CPU).environments()
    return worker.perform(train, request, log=out.with_suffix(".log"), together=together)


def _losses(out: Path) -> list[float]:
    lines = (out / "logs" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _largest_difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    first, second = (load_file(out / "adapter_model.safetensors") for out in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


WAYS: Mapping[str, dict[str, Any]] = {
    "at random": {},
    "of about one length": {"length_groups": True, "gradient_accumulation": 2},
    "packed": {"packing": True},
    "4 bits, evaluated": {"method": "qlora", "dtype": "fp32", "evaluation_steps": 3},
    "pairs": {"objective": "dpo"},
}


@pytest.mark.training
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_what_one_does(way: str, base: Path, ragged: Path, tmp_path: Path) -> None:
    """The same rows in each step: twice two are four."""
    data = ragged
    if WAYS[way].get("objective"):
        (tmp_path / "pairs").mkdir()
        data = prepared(base, tmp_path / "pairs", PAIRS * 6)
    evaluations: dict[str, list[float]] = {}
    for name, changes in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "devices": 2})):
        made = _trained(base, data, tmp_path / name, max_steps=8, **WAYS[way] | changes)
        assert made.processes == changes.get("devices", 1)
        evaluations[name] = [evaluation.loss for evaluation in made.evaluations]
    assert evaluations["two"] == pytest.approx(evaluations["one"], rel=1e-2)  # means of other batches
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=1e-4)
    # A tenth of one step: Adam divides a gradient that is all rounding by itself.
    assert _largest_difference(tmp_path / "one", tmp_path / "two") < 5e-4


@contextlib.contextmanager
def _when_under_way(out: Path, act: Any) -> Iterator[None]:
    """Do something to the run in `out` when it has made two steps."""
    log = out / "work" / "training.jsonl"

    def watch() -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if log.exists() and len(log.read_text(encoding="utf-8").splitlines()) >= 2:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(10)


def _process(number: int) -> psutil.Process:
    """The process of that rank among the children of this one."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(number):
                return child
    raise AssertionError(f"there is no process {number}")


def _processes_left() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "forge.worker" in " ".join(child.cmdline())]


@pytest.mark.training
def test_a_process_that_dies_ends_the_run_with_its_own_error(base: Path, data: Path, tmp_path: Path) -> None:
    """Within seconds, and no process is left."""
    out, killed = tmp_path / "out", []

    def kill() -> None:
        _process(1).kill()
        killed.append(time.monotonic())

    with _when_under_way(out, kill), pytest.raises(StageError) as caught:
        _trained(base, data, out, batch_size=2, devices=2, max_steps=4000)
    assert time.monotonic() - killed[0] < 15
    assert "ended with status -9" in caught.value.message
    assert caught.value.message.endswith("(process 2 of 2)")
    assert _processes_left() == []


@pytest.mark.training
def test_two_processes_stop_at_one_step_and_go_on_bit_for_bit(base: Path, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "batch_size": 2,
        "devices": 2,
        "max_steps": 12,
        "lora": {**SHAPE, "dropout": 0.1},
    }
    _trained(base, data, tmp_path / "whole", **changes)
    out = tmp_path / "stopped"
    with (
        _when_under_way(out, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises((InterruptedByUserError, KeyboardInterrupt)),
    ):
        _trained(base, data, out, **changes)
    assert _processes_left() == []
    (sealed,) = [path for path in (out / "work").glob("checkpoint-*") if (path / MARKER).exists()]
    assert {path.name for path in sealed.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    made = _trained(base, data, out, **changes)
    assert made.resumed_from == sealed.name
    assert _largest_difference(tmp_path / "whole", out) == 0
    assert _losses(out) == _losses(tmp_path / "whole")


@pytest.mark.training
def test_two_machines(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that is shown for the second is run, here on the same machine."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    _trained(base, data, tmp_path / "one", batch_size=4)
    request = arguments(base, data, tmp_path / "two", max_steps=6, lora=SHAPE, batch_size=2, nodes=2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    ranks = ranks_of(request.settings, CPU)
    told = Told()
    report.configure(sink=told)
    invite(Joining(request, ranks))
    (command,) = [text.strip() for _, text in told.texts if "forge join" in text]
    with process.Child([sys.executable, "-m", *command.split()]) as joined:
        made = worker.perform(train, request, together=ranks.environments())
        words = list(joined.lines())
        assert joined.wait() == 0, words
    assert made.processes == 2
    assert any("6 steps" in line for line in words)
    assert _largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4
    with pytest.raises(RecipeError, match="the other machines are 1 to 1"):
        join(tmp_path / "two" / "work" / "join.json", 2)
    with pytest.raises(DataError, match="no training to join"):
        join(tmp_path / "none.json", 1)


def _told(environments: Any) -> list[dict[str, str]]:
    return [dict(environment) for environment in environments]


def test_what_each_gpu_s_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.train.ranks.gpu_count", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    one = ranks_of(Train(), GPU)
    assert _told(one.environments()) == [
        {**ORDER, "CUDA_VISIBLE_DEVICES": "0"}
    ]  # else transformers wants them all
    assert _told(ranks_of(Train(devices=(2,)), GPU).environments()) == [
        {**ORDER, "CUDA_VISIBLE_DEVICES": "2"}
    ]
    assert ranks_of(Train(devices="auto"), GPU).gpus == (0, 1, 2, 3)
    two = replace(ranks_of(Train(devices=(1, 3)), GPU), port=4711)
    common = {
        **ORDER, "CUDA_VISIBLE_DEVICES": "1,3",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    assert _told(two.environments()) == [
        {**common, "RANK": "0", "LOCAL_RANK": "0"}, {**common, "RANK": "1", "LOCAL_RANK": "1"}
    ]  # fmt: skip
    with pytest.raises(MissingToolError, match="there is no GPU 4 here, only GPUs 0 to 3"):
        ranks_of(Train(devices=(4,)), GPU)
    with pytest.raises(MissingToolError, match="there is no GPU 4, 5 here"):
        ranks_of(Train(devices=6), GPU)
    assert ranks_of(Train(devices="auto"), CPU).count == 1


def test_gpus_that_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert gpu_count() == 2
    assert _told(ranks_of(Train(devices=(1,)), GPU).environments()) == [
        {**ORDER, "CUDA_VISIBLE_DEVICES": "7"}
    ]


@pytest.mark.parametrize(("named", "count"), [("", 0), ("-1", 0), ("-1,0", 0), ("0,-1,1", 1)])
def test_hidden_gpus_are_none(
    named: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA reads them: -1 ends the list. nvidia-smi shows every GPU all the same."""
    shown = tmp_path / "nvidia-smi"
    shown.write_text("#!/bin/sh\necho NVIDIA L4, 24000, 23000, 8.9\n", encoding="utf-8")
    shown.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("forge.train.memory.is_torch_built_for", lambda platform: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert training_device("auto").kind == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu_count() == count
    assert training_device("auto").kind == ("cuda" if count else "cpu")


def test_processes_share_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    told = ranks_of(Train(devices=2), CPU).environments()
    assert [each["OMP_NUM_THREADS"] for each in told] == ["1", "1"]


def test_a_strategy_needs_more_than_the_one_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.train.ranks.gpu_count", lambda: 1)
    with pytest.raises(MissingToolError, match="fsdp shares a model among devices, and there"):
        ranks_of(Train(strategy="fsdp", devices="auto"), GPU)


def test_the_second_machine_s_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "4711")
    ranks = ranks_of(Train(devices=2, nodes=3), CPU)
    assert (ranks.count, ranks.address, ranks.port) == (6, "first", 4711)
    told = ranks.environments(1)
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in told] == [
        ("2", "0", "6"), ("3", "1", "6")
    ]  # fmt: skip


@pytest.mark.training
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_how_a_model_is_shared(
    strategy: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trl's configuration and each process are told; neither can run without GPUs."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("trl.SFTConfig", lambda **options: given.update(options))
    request = arguments(
        base, data, tmp_path / "out", strategy=strategy, devices=2, gradient_checkpointing=True
    )
    trainer_arguments(request, Hardware("cuda", "bfloat16", "bf16"), True)
    assert request.loading.is_shared
    monkeypatch.setattr("forge.train.ranks.gpu_count", lambda: 2)
    told = ranks_of(request.settings, GPU).environments()[1]
    if strategy == "fsdp":
        assert given["fsdp"] is True
        assert given["fsdp_config"] == {
            "version": 2, "cpu_ram_efficient_loading": True, "activation_checkpointing": True
        }  # fmt: skip
        assert not given["gradient_checkpointing"]  # FSDP's own takes its place
        assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2"
    else:
        assert given["deepspeed"]["zero_optimization"]["stage"] == 3
        assert given["deepspeed"]["train_micro_batch_size_per_gpu"] == "auto"
        assert given["gradient_checkpointing"] and "ACCELERATE_USE_FSDP" not in told


def test_sharing_needs_gpus_and_its_package(base: Path) -> None:
    shares = Train(strategy="deepspeed", devices=2, method="lora")
    for device, words in ((CPU, "deepspeed is for GPUs"), (GPU, "pip install deepspeed")):
        with pytest.raises(MissingToolError, match=words):
            require_available(shares, read_configuration(base), device)


def test_each_gpu_holds_its_share(base: Path) -> None:
    """B3: FSDP cuts weights and optimizer, not activations; DDP cuts nothing."""
    configuration, tensors = read_configuration(base), open_checkpoint(base).tensors

    def parts(**changes: Any) -> Mapping[str, int]:
        job = job_of(Train.model_validate({"method": "lora", **changes}), 512, GPU)
        return estimate_of(job, tensors, configuration, GPU).parts

    whole, cut = parts(), parts(strategy="fsdp", devices=(0, 1), nodes=2)
    assert parts(devices=2) == whole
    assert (cut["base"], cut["optimizer"]) == (whole["base"] // 4, whole["optimizer"] // 4)
    assert cut["activations"] == whole["activations"]
