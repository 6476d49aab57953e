"""What makes training faster: what `auto` means where, what is refused, and what a compiled run learns.

The choices for a GPU are asked of a machine that is described, not there; its packages are directories.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge import worker
from forge.commands.describe import describe_plan
from forge.errors import MissingToolError, OutOfMemoryError, StageError
from forge.model.config import Configuration, read_configuration
from forge.model.estimate import Estimate
from forge.recipe.load import load
from forge.recipe.schema import Train
from forge.resolve.recipe import resolve_recipe
from forge.ship.drive import plan
from forge.ship.preflight import require_tools
from forge.stages.train import TrainStage
from forge.store.artifacts import Store
from forge.train.arguments import arguments as trainer_arguments
from forge.train.arithmetic import Arithmetic
from forge.train.hardware import Hardware
from forge.train.memory import Device, Memory, job_of
from forge.train.request import Trained, TrainRequest
from forge.train.run import train
from forge.train.speed import choose_speed, liger_families, require_available
from tests.models import PEFT_WARNS
from tests.test_train import arguments

pytestmark = [
    PEFT_WARNS,
    # trl (github.com/huggingface/trl) still sets the old name.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]

CPU = Device("cpu", "main memory", 16 << 30, 12 << 30, has_bfloat16=True)
GPU = Device("cuda", "NVIDIA L4", 24 << 30, 23 << 30, has_bfloat16=True)
T4 = Device("cuda", "Tesla T4", 15 << 30, 14 << 30, has_bfloat16=False)
_TABLE = """
MODEL_TYPE_TO_APPLY_LIGER_FN = {
    "llama": apply_liger_kernel_to_llama,
    "qwen3": apply_liger_kernel_to_qwen3,
}
OTHERS = {
    "gpt2": None,
}
"""


def _package(directory: Path, name: str, **files: str) -> None:
    (directory / name / "transformers").mkdir(parents=True)
    (directory / name / "__init__.py").write_text(files.pop("init", ""), encoding="utf-8")
    for path, text in files.items():
        (directory / name / "transformers" / f"{path}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose packages are installed; it begins empty."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _memory(device: Device, needed: int, section: Train) -> Memory:
    return Memory(Estimate({"weights": needed}), device, job_of(section, 512, device), {})


def _chosen(
    device: Device, configuration: Configuration, *, needed: int = 1 << 30, **changes: Any
) -> Mapping[str, tuple[bool, str]]:
    section = Train.model_validate(changes)
    speed = choose_speed(section, configuration, _memory(device, needed, section))
    assert all(getattr(speed, choice.field[6:]) is choice.value for choice in speed.choices)
    return {choice.field[6:]: (choice.value, choice.reason) for choice in speed.choices}


@pytest.fixture(scope="module")
def llama(base: Path) -> Configuration:
    return read_configuration(base)


def test_auto_without_a_gpu(llama: Configuration) -> None:
    chosen = _chosen(CPU, llama)
    assert {field: value for field, (value, _) in chosen.items()} == {
        "liger": False, "compile": False, "offload_activations": False
    }  # fmt: skip
    assert "no NVIDIA GPU" in chosen["liger"][1]


def test_auto_on_a_gpu(llama: Configuration, packages: Path) -> None:
    assert _chosen(GPU, llama)["liger"] == (False, "liger-kernel is not installed")
    _package(packages, "liger_kernel", monkey_patch=_TABLE)
    assert _chosen(GPU, llama)["liger"][0] is True
    other = replace(llama, model_type="gpt2")
    assert _chosen(GPU, other)["liger"] == (False, "liger-kernel has no kernels for gpt2")
    assert _chosen(GPU, llama, compile=True)["liger"] == (False, "torch.compile joins the same layers")
    assert _chosen(GPU, llama)["compile"][0] is False
    assert _chosen(GPU, llama)["offload_activations"][0] is False
    assert _chosen(GPU, llama, needed=30 << 30)["offload_activations"][0] is True
    orpo = _chosen(GPU, llama, needed=30 << 30, objective="orpo")["offload_activations"]
    assert orpo == (False, "trl's trainer for ORPO has no such option")


def test_what_the_recipe_says_is_no_choice(llama: Configuration) -> None:
    section = Train.model_validate({"liger": False, "compile": True, "offload_activations": False})
    speed = choose_speed(section, llama, _memory(CPU, 1 << 30, section))
    assert (speed.liger, speed.compile, speed.offload_activations, speed.choices) == (False, True, False, ())


@pytest.mark.parametrize(
    ("device", "changes", "words"),
    [
        (CPU, {"liger": True}, "train.liger: its kernels run on a GPU"),
        (GPU, {"liger": True}, "pip install liger-kernel"),
        (CPU, {"offload_activations": True}, "train.offload_activations: moves what a GPU holds"),
        (CPU, {"backend": "unsloth"}, "train.backend: unsloth trains on a GPU"),
        (GPU, {"backend": "unsloth"}, "pip install unsloth"),
        (CPU, {"liger": True, "backend": "unsloth"}, "2 settings of train cannot be had"),
        (CPU, {"device": "cuda"}, "train.device: cuda is a GPU"),
        (CPU, {"attention": "flash_attention_2"}, "flash_attention_2 runs on a GPU"),
        (T4, {"attention": "flash_attention_2"}, "needs a GPU from Ampere on, not Tesla T4"),
        (GPU, {"attention": "flash_attention_2"}, "pip install flash-attn"),
        (GPU, {"attention": "flash_attention_3"}, "build hopper/"),
        (GPU, {"optimizer": "schedule_free_adamw"}, "pip install schedulefree"),
    ],
)
def test_what_cannot_be_had_is_refused(
    device: Device, changes: dict[str, Any], words: str, llama: Configuration
) -> None:
    with pytest.raises(MissingToolError, match=words):
        require_available(Train.model_validate(changes), llama, device)


def test_flash_attention_2_is_not_3(llama: Configuration, packages: Path) -> None:
    _package(packages, "flash_attn")
    require_available(Train.model_validate({"attention": "flash_attention_2"}), llama, GPU)
    with pytest.raises(MissingToolError, match="build hopper/"):
        require_available(Train.model_validate({"attention": "flash_attention_3"}), llama, GPU)


def test_a_family_without_kernels_is_refused(llama: Configuration, packages: Path) -> None:
    _package(packages, "liger_kernel", monkey_patch=_TABLE)
    assert list(liger_families()) == ["llama", "qwen3"]
    asks = Train.model_validate({"liger": True})
    require_available(asks, llama, GPU)
    with pytest.raises(MissingToolError, match="no kernels for gpt2"):
        require_available(asks, replace(llama, model_type="gpt2"), GPU)


@pytest.mark.training
def test_the_trainer_is_given_what_was_chosen(base: Path, data: Path, tmp_path: Path) -> None:
    """trl takes each under a name of its own."""
    fast = {"liger": True, "compile": True, "offload_activations": True}
    hardware = Hardware("cpu", "float32", "")
    for changes, expected in ((fast, True), ({}, False)):
        made = trainer_arguments(arguments(base, data, tmp_path / "out", **changes), hardware, False)
        assert (made.use_liger_kernel, made.torch_compile, made.activation_offloading) == (expected,) * 3


_UNSLOTH = """
import os
import peft, torch, transformers
ASKED = {}
class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, **options):
        ASKED["load"] = options
        assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
        model = transformers.AutoModelForCausalLM.from_pretrained(model_name, dtype=options["dtype"])
        return model, None
    @staticmethod
    def get_peft_model(model, target_modules, use_gradient_checkpointing, random_state, **options):
        ASKED["adapt"] = options
        if options["r"] == 13:
            raise NotImplementedError("no such rank")
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM", **options)
        )
"""


@pytest.fixture
def unsloth(packages: Path) -> Iterator[None]:
    _package(packages, "unsloth", init=_UNSLOTH)
    yield
    del sys.modules["unsloth"]


@pytest.mark.training
def test_unsloth_s_model_is_what_trl_trains(base: Path, data: Path, tmp_path: Path, unsloth: None) -> None:
    """With a package in its place that makes the model by peft: what it is asked, and that it is trained."""
    shape = {"r": 4, "alpha": 8, "dropout": 0.0, "rslora": True, "targets": "attention"}
    changes = {"backend": "unsloth", "max_steps": 3, "lora": shape}
    made = train(arguments(base, data, tmp_path / "out", **changes))
    asked = sys.modules["unsloth"].ASKED
    assert asked["load"] | {"dtype": None} == {
        "max_seq_length": 64, "dtype": None, "load_in_4bit": False, "trust_remote_code": False,
        "use_exact_model_name": True, "use_gradient_checkpointing": False, "random_state": 42,
    }  # fmt: skip
    assert (asked["adapt"]["lora_alpha"], asked["adapt"]["use_rslora"]) == (8, True)
    assert set(made.modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(StageError, match="does not take this base: no such rank"):
        train(arguments(base, data, tmp_path / "bad", **changes | {"lora": shape | {"r": 13}}))


@pytest.mark.training
def test_an_unsloth_that_is_not_there(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match="cannot be imported") as caught:
        train(arguments(base, data, tmp_path / "out", backend="unsloth"))
    assert "pip install unsloth" in caught.value.hint


TRAINED = Trained(
    steps=1, epochs=1.0, mean_loss=1.0, trainable_parameters=1, total_parameters=1, modules={}, method="lora",
    device="cpu", compute="float32", arithmetic=Arithmetic("float32", "float32"), attention="sdpa", threads=1,
    processor="AVX2", evaluations=(), best_step=None, stopped_early=False, resumed_from=None,
)  # fmt: skip
RECIPE = (
    "name: mini\nbase: builtin:tiny\n"
    "data: {source: builtin:yoda, columns: {prompt: sentence, completion: translation_extra}}\n"
    "train: {method: lora, batch_size: 8}\n"
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "home"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_a_plan_says_what_auto_means_and_refuses_what_cannot_be_had(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = describe_plan(*plan(recipe))
    fields = [choice["field"] for choice in planned["choices"]]  # type: ignore[attr-defined]
    assert fields == ["train.liger", "train.compile", "train.offload_activations"]
    assert "train.liger: auto means false here: no NVIDIA GPU" in capsys.readouterr().out
    with pytest.raises(MissingToolError, match="unsloth trains on a GPU"):
        plan(recipe, ["train.backend=unsloth"])


def test_a_plan_counts_the_steps_of_several_devices(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for devices, words in (("1", "270 steps of 8 rows"), ("2", "135 steps of 16 rows")):
        plan(recipe, [f"train.devices={devices}", "data.eval=0"])
        assert words in capsys.readouterr().out


def _stage(recipe: Path, *overrides: str) -> TrainStage:
    store = Store(recipe.parent / "home")
    return TrainStage(resolve_recipe(load(recipe, overrides), store, recipe.parent / "runs" / "mini"))


def test_a_ship_refuses_it_too(recipe: Path) -> None:
    _stage(recipe).require_tools()
    with pytest.raises(MissingToolError, match="its kernels run on a GPU"):
        _stage(recipe, "train.liger=true").require_tools()


def test_a_ship_names_all_that_is_missing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two settings need, a GPU's number and a tracker, each with its hint."""
    monkeypatch.setattr("forge.stages.train.training_device", lambda asked: GPU)
    monkeypatch.setattr("forge.train.ranks.gpu_count", lambda: 1)
    asks = ["liger=true", "strategy=deepspeed", "devices=[0, 4]", "report_to=[dvclive]"]
    with pytest.raises(MissingToolError, match="4 tools are missing") as caught:
        require_tools([_stage(recipe, *(f"train.{field}" for field in asks))])
    assert [problem.message for problem in caught.value.problems] == [
        "train.liger: the package is not installed: pip install liger-kernel",
        "train.strategy: the package is not installed: pip install deepspeed",
        "train.devices: there is no GPU 4 here, only GPU 0",
        "train.report_to: dvclive is not installed",
    ]
    assert "name fewer, or auto" in caught.value.hint and "pip install dvclive" in caught.value.hint


def test_a_plan_refuses_gpus_that_are_not_there(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.stages.train.training_device", lambda asked: GPU)
    monkeypatch.setattr("forge.train.ranks.gpu_count", lambda: 1)
    with pytest.raises(MissingToolError, match="there is no GPU 4 here, only GPU 0"):
        plan(recipe, ["train.devices=[4]"])


@pytest.mark.network
def test_the_stage_asks_for_what_was_chosen(
    recipe: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """B6: whatever ended the worker for memory, the next has fewer rows at once; and several processes."""
    asked: list[TrainRequest] = []
    processes: list[int] = []
    monkeypatch.setenv("MASTER_PORT", "4711")

    def perform(
        task: object, request: TrainRequest, log: Path, together: Sequence[Mapping[str, str]]
    ) -> Trained:
        asked.append(request)
        processes.append(len(together))
        if request.batch_size > 2:
            raise OutOfMemoryError("killed")
        return TRAINED

    monkeypatch.setattr("forge.stages.train.worker.perform", perform)
    monkeypatch.setattr("forge.stages.train.rehearse", lambda ship, log: None)
    facts = SimpleNamespace(max_length=64, longest_tokens=60, rows=90)
    prepared: Any = SimpleNamespace(path=data, read=lambda kind: facts)
    with pytest.raises(OutOfMemoryError):
        _stage(recipe).build({"data": prepared}, tmp_path)
    made = _stage(recipe, "train.retry_smaller=true", "train.compile=true").build(
        {"data": prepared}, tmp_path
    )
    assert [request.batch_size for request in asked] == [8, 8, 4, 2]
    assert asked[-1].settings.gradient_accumulation == 4
    assert (asked[-1].settings.liger, asked[-1].settings.compile) == (False, True)
    assert [choice.field for choice in made.choices] == ["train.liger", "train.offload_activations"]
    assert capsys.readouterr().out == ""
    several = ["train.devices=2", "train.nodes=2", "train.batch_size=2", "train.gradient_accumulation=4"]
    _stage(recipe, *several).build({"data": prepared}, tmp_path)
    assert processes == [1, 1, 1, 1, 2]
    words = capsys.readouterr().out
    assert "a step has 32 rows" in words
    assert "sees 6 rows again" in words
    assert f"forge join {tmp_path}/work/join.json --node 1" in words.replace("\n", "")


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.programs
@pytest.mark.timeout(1500)
def test_a_compiled_run_learns_the_same(base: Path, data: Path, tmp_path: Path) -> None:
    """Within rounding, which shows that it was compiled; the names are those of any other adapter."""
    from safetensors.torch import load_file

    weights, losses = [], []
    for compiled in (False, True):
        shape = {"r": 4, "alpha": 8, "dropout": 0.0}
        out = tmp_path / str(compiled)
        asked = arguments(base, data, out, compile=compiled, max_steps=4, lora=shape)
        losses.append(worker.perform(train, asked, log=tmp_path / "log.txt").mean_loss)
        weights.append(load_file(out / "adapter_model.safetensors"))
    plain, compiled_ones = weights
    assert plain.keys() == compiled_ones.keys()
    assert not [name for name in plain if "_orig_mod" in name]
    assert 0 < max(float((plain[name] - compiled_ones[name]).abs().max()) for name in plain) < 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
