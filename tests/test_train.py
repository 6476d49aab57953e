"""Real training of a tiny model in its worker: it learns, and resumes bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from forge import process, worker
from forge.codec import to_plain
from forge.data.prepare import TRAIN_FILE
from forge.errors import DataError, StageError
from forge.model.safetensors_header import read_header
from forge.recipe.schema import Train
from forge.train.checkpoints import MARKER, last_checkpoint, seal
from forge.train.evaluate import evaluate
from forge.train.log import Answers, append, read_log
from forge.train.request import Trained, TrainRequest
from forge.train.run import train
from forge.train.watch import refuse_not_finite
from tests.models import PEFT_WARNS, ROWS, evaluation

pytestmark = [PEFT_WARNS, pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(2400)]

STEPS = 60


def settings(**changes: Any) -> Train:
    chosen: dict[str, Any] = {
        "method": "lora", "max_steps": STEPS, "learning_rate": 5e-3, "batch_size": 4, "device": "cpu",
        "dtype": "bf16" if changes.get("method") == "qlora" else "fp32",
        "lora": {"r": 16, "alpha": 32, "dropout": 0.05},
    }  # fmt: skip
    return Train.model_validate({**chosen, **changes})


def arguments(base: Path, data: Path, out: Path, **changes: Any) -> TrainRequest:
    """As the stage asks for it."""
    out.mkdir(exist_ok=True)
    section = settings(**changes)
    assert section.batch_size != "auto"
    return TrainRequest(
        base=base,
        base_name="someone/base",
        base_revision="a1b2",
        tokenizer=base,
        pad_token="<|pad|>",
        data=data,
        out=out,
        settings=section,
        batch_size=section.batch_size,
        max_length=64,
        trackers=Path("unset"),
        continue_from=Path(section.continue_from) if section.continue_from else None,
    )


Run = tuple[Path, Trained]
METHODS = ("lora", "qlora")
BOTH = {"r": 16, "alpha": 32, "dropout": 0.05, "modules_to_save": ("embed_tokens", "lm_head")}
RUNS: Mapping[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "tied": {"method": "lora", "lora": BOTH},
}
COMPUTE = {"lora": "float32", "qlora": "bfloat16"}


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    """Every run, uninterrupted."""
    root = tmp_path_factory.mktemp("trained")
    made = {}
    for name, changes in RUNS.items():
        out = root / name
        told = worker.perform(train, arguments(base, data, out, **changes), log=root / "log.txt")
        made[name] = (out, told)
    return made


def losses(out: Path) -> list[float]:
    lines = (out / "logs" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert all(line.keys() >= {"loss", "learning_rate", "gradient_norm", "time", "epoch"} for line in logged)
    return [line["loss"] for line in logged]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method: str, trained: Mapping[str, Run]) -> None:
    out, told = trained[method]
    curve = losses(out)
    assert curve[0] > 3
    assert curve[-1] < 0.2
    assert told.steps == STEPS
    assert told.mean_loss == pytest.approx(sum(curve) / STEPS, rel=1e-3)
    assert (told.device, told.compute, told.resumed_from) == ("cpu", COMPUTE[method], None)
    modules = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 512), (256, 512), (512, 256)]
    assert told.trainable_parameters == 2 * sum(16 * (a + b) for a, b in modules)


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_s_files(method: str, base: Path, trained: Mapping[str, Run]) -> None:
    """J1, D12; readable for a container's user; nothing of this machine inside."""
    out, _ = trained[method]
    files = {path.name: path for path in out.iterdir() if path.is_file()}
    assert files.keys() == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    for name, path in files.items():
        assert path.stat().st_mode & 0o044 == 0o044, name
        content = path.read_bytes()
        assert not any(str(place).encode() in content for place in (base, out, Path.cwd(), Path.home()))
        if name not in ("adapter_config.json", "adapter_model.safetensors"):
            assert content == (base / name).read_bytes()
    configuration = json.loads(files["adapter_config.json"].read_text(encoding="utf-8"))
    assert configuration["base_model_name_or_path"] == "someone/base"
    assert configuration["revision"] == "a1b2"
    assert configuration["target_modules"] == sorted(configuration["target_modules"])
    assert {spec.dtype for spec in read_header(files["adapter_model.safetensors"]).values()} == {"F32"}


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learned_is_measured(
    method: str, base: Path, data: Path, trained: Mapping[str, Run], tmp_path: Path
) -> None:
    """I2, M2, M3: greedy answers of the base and of the tuned model, stopped at their end of turn."""
    out, _ = trained[method]
    told = worker.perform(
        evaluate, evaluation(base, out, data, quantize=method == "qlora"), log=tmp_path / "log"
    )
    assert told.rows == 4
    assert told.loss.after < 0.1 < 3 < told.loss.before
    exact = told.exact
    assert exact
    assert (exact.rows, exact.before, exact.after) == (4, 0, 4)
    assert {answer.after for answer in exact.answers} == set(ROWS.values())


CALL = """
import json, sys
from forge import process, worker
with process.signals_as_interrupt():
    worker.call("train", json.loads(sys.argv[1]))
"""


@pytest.fixture
def start() -> Iterator[Callable[[TrainRequest], process.Child]]:
    """Starts a parent that calls the worker, as `forge ship` does; stops it afterwards."""
    children: list[process.Child] = []

    def started(request: TrainRequest) -> process.Child:
        children.append(process.Child([sys.executable, "-c", CALL, json.dumps(to_plain(request))]))
        return children[-1]

    yield started
    for child in children:
        child.stop(1.0)


def wait_for_checkpoints(out: Path, count: int, child: process.Child) -> None:
    deadline = time.monotonic() + 1200
    while len(list((out / "work").glob(f"checkpoint-*/{MARKER}"))) < count:
        assert child.status is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Often enough that there is one whenever it is killed.
OFTEN = 0.0001
STOPS = {"lora": signal.SIGKILL, "qlora": signal.SIGTERM, "tied": signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_stopped_run_resumes_bit_for_bit(
    run: str,
    base: Path,
    data: Path,
    trained: Mapping[str, Run],
    start: Callable[[TrainRequest], process.Child],
    tmp_path: Path,
) -> None:
    """kill -9 of the parent, and SIGTERM: the adapter is that of the run which nobody disturbed."""
    out = tmp_path / "out"
    given = arguments(base, data, out, checkpoint_minutes=OFTEN, **RUNS[run])
    child = start(given)
    wait_for_checkpoints(out, 2, child)
    os.kill(child.pid, STOPS[run])
    assert child.wait(600) != 0
    assert not (out / "adapter_model.safetensors").exists()
    checkpoint = last_checkpoint(out / "work")
    assert checkpoint is not None
    told = worker.perform(train, given, log=tmp_path / "log.txt")
    assert str(told.resumed_from).startswith("checkpoint-")
    whole, _ = trained[run]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert losses(out) == pytest.approx(losses(whole), abs=1e-6)


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path: Path) -> None:
    for number, is_whole in ((5, True), (20, True), (100, False)):
        directory = tmp_path / f"checkpoint-{number}"
        directory.mkdir()
        if is_whole:
            seal(directory)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert last_checkpoint(tmp_path / "absent") is None
    for damage in (b"[1]", b"", b"\xff"):
        (tmp_path / "checkpoint-20" / MARKER).write_bytes(damage)
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
        (tmp_path / "checkpoint-20").mkdir()


def test_a_damaged_line_of_a_log_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append(log, Answers(3, ("yes",)))
    with log.open("ab") as stream:
        stream.write(b'{}\n[1]\n\xff\n{"step": 4, "texts"')
    assert read_log(log, Answers) == [Answers(3, ("yes",))]
    assert read_log(tmp_path, Answers) == []


def test_a_run_that_diverges_is_stopped(base: Path, data: Path, tmp_path: Path) -> None:
    """Pitfall 26."""
    given = arguments(base, data, tmp_path / "out", learning_rate=1e30, max_gradient_norm=0, max_steps=20)
    with pytest.raises(StageError, match=r"train: step \d+: loss .*: the training has diverged"):
        worker.perform(train, given, log=tmp_path / "log.txt")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, None)])
def test_numbers_that_are_not_finite(loss: float, norm: float | None) -> None:
    refuse_not_finite(1, 2.0, 1.0)
    refuse_not_finite(1, 2.0, None)
    with pytest.raises(StageError, match="step 7"):
        refuse_not_finite(7, loss, norm)


def test_targets_that_match_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    """Pitfall 13, Style row 11: what there is, is listed."""
    lora = {"targets": ["qkv_proj", "no_proj"]}
    with pytest.raises(DataError, match=r"train\.lora\.targets") as caught:
        train(arguments(base, data, tmp_path / "out", lora=lora))
    assert caught.value.hint == (
        "the linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    )


def test_tied_embeddings_get_no_factors_of_their_own(base: Path, data: Path, tmp_path: Path) -> None:
    """D7, pitfall 23; silent wrong 6, told before anything is trained."""
    lora = {"targets": ("q_proj", "embed_tokens")}
    with pytest.raises(DataError, match=r"train\.lora\.targets: embed_tokens: the base ties") as refused:
        train(arguments(base, data, tmp_path / "out", lora=lora))
    assert "modules_to_save" in refused.value.hint


def test_ids_that_the_base_has_no_row_for(base: Path, data: Path, tmp_path: Path) -> None:
    """Pitfall 4."""
    row = {"input_ids": [1, 5000], "labels": [-100, 5000], "messages": []}
    (tmp_path / TRAIN_FILE).write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="the rows hold token 5000, the base's embedding has"):
        train(arguments(base, tmp_path, tmp_path / "out"))
