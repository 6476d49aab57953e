"""Files of a base or an adapter that are broken: exit code 2 with the file and a hint, no bug in forge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from forge.adapter.read import read_adapter
from forge.chat.template import ChatTemplate
from forge.cli.main import run_command
from forge.errors import DataError, RecipeError
from forge.model.checkpoint import open_checkpoint
from forge.model.tokenizer_files import open_tokenizer
from forge.recipe.load import load
from forge.recipe.starters import write_kind
from tests.conftest import copy_of_tiny
from tests.test_cli_faults import RECIPE, ROWS, write_rows

CONFIGURATION = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
TOKENIZERS = {
    "other keys": {"a": 1},
    "nothing": {},
    "an unknown model": {"model": {"type": "Magic", "vocab": {"a": 0}}},
    "no model": {"version": "1.0", "added_tokens": []},
}


@pytest.fixture
def place(tmp_path: Path, forge_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    copy_of_tiny(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = run_command([*arguments, "--json"])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    error: dict[str, Any] = json.loads(shown.out.splitlines()[-1])["error"]
    assert (code, error["code"]) == (2, 2), error
    assert error["hint"]
    return error


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_json_that_is_no_tokenizer(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "base" / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZERS[case]), encoding="utf-8")
    error = failed(capsys, "plan", "recipe.yaml")
    assert str(path) in error["message"] and "bug" not in error["message"]
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer: "):
        open_tokenizer(path.parent)


def test_an_adapter_s_own_tokenizer_that_is_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = place / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(CONFIGURATION))
    shutil.copyfile(place / "base" / "chat_template.jinja", adapter / "chat_template.jinja")
    (adapter / "tokenizer.json").write_text("{}")
    factors: dict[str, Any] = {
        "lora_A": np.ones((8, 256), np.float32),
        "lora_B": np.ones((256, 8), np.float32),
    }
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    named = {f"{layer}.{part}.weight": values for part, values in factors.items()}
    safetensors.numpy.save_file(named, adapter / "adapter_model.safetensors")
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write("train: {from: ./adapter}\n")
    error = failed(capsys, "ship", "recipe.yaml")
    assert str(adapter / "tokenizer.json") in error["message"]


CONFIGURATIONS: dict[str, tuple[object, list[str]]] = {
    "a list": ([], []),
    "no alpha": (
        {**CONFIGURATION, "lora_alpha": None},
        ["lora_alpha: must be a number other than 0 (got null)"],
    ),
    "alpha a word": (
        {**CONFIGURATION, "lora_alpha": "x"},
        ['lora_alpha: must be a number other than 0 (got "x")'],
    ),
    "rank true": ({**CONFIGURATION, "r": True}, ["r: must be a whole number above 0 (got true)"]),
    "rank 0": ({**CONFIGURATION, "r": 0}, ["r: must be a whole number above 0 (got 0)"]),
    "patterns": (
        {**CONFIGURATION, "rank_pattern": [1], "alpha_pattern": {"q_proj": "2", "(": 1}},
        [
            "rank_pattern: must be an object (got [1])",
            'alpha_pattern: q_proj must be a number (got "2"); '
            "'(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ],
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_an_adapter_configuration_with_other_types(case: str, tmp_path: Path) -> None:
    content, problems = CONFIGURATIONS[case]
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_adapter(tmp_path)
    assert caught.value.message.startswith(str(path)) and caught.value.hint
    assert [str(problem) for problem in caught.value.problems] == [f"{path}: {one}" for one in problems]


def test_every_such_error_has_a_hint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON") as broken:
        read_adapter(tmp_path)
    with pytest.raises(DataError, match="refuses the conversation") as refused:
        ChatTemplate("{{ raise_exception('no system') }}", {}).render([{"role": "user", "content": "a"}])
    with pytest.raises(RecipeError) as closed:
        write_kind("x", "quickstart", Path("/proc"))
    assert all(one.value.hint for one in (broken, refused, closed))


REFUSED: dict[str, tuple[str, str, str]] = {
    "targets": (
        "train: {lora: {targets: [q_proj, nope]}}\n",
        "",
        "train.lora.targets: ./base has no module nope",
    ),
    "a regular expression": ("train: {lora: {targets: '.*nope'}}\n", "", ".*nope fits no module of ./base"),
    "experts": (
        "train: {method: lora, lora: {dropout: 0, experts: true}}\n",
        "",
        "train.lora.experts: ./base is no mixture of experts",
    ),
    "a norm": ("train: {lora: {targets: [norm]}}\n", "", "train.lora.targets: norm is no linear layer"),
    "layers": ("train: {lora: {layers: [0, 99]}}\n", "", "has no layer 99; its layers are 0 to"),
    "ranks": ("train: {lora: {rank_pattern: {nope: 4}}}\n", "", "rank_pattern: nope fits no module that"),
    "more than a matrix has": (
        "train: {method: lora, lora: {r: 300, init: pissa}}\n",
        "",
        "train.lora.init: pissa takes rank 300 out of a matrix that has ",
    ),
    "whole": ("train: {lora: {modules_to_save: [nope]}}\n", "", "modules_to_save: ./base has no module nope"),
    "whole and quantized": (
        "train: {lora: {targets: [q_proj], modules_to_save: [mlp]}}\n",
        "",
        "train.method: qlora quantizes mlp",
    ),
    "two of the embedding": (
        "train: {lora: {token_indices: [999999]}}\n",
        "",
        "train.lora.token_indices: the embedding has no row 999999, but 1456, and 1 more",
    ),
    "warm-up": ("train: {epochs: 0.01, warmup_steps: 7}\n", "", "train.warmup_steps: 7, and the run has"),
    "no adapter": ("train: {from: ./base}\n", "", "is not an adapter: it has no adapter_config.json"),
    "no rows": ("", "", "rows.jsonl has no rows"),
    "other columns": ("", '{"left": "a", "right": "b"}\n', "cannot tell the data's format"),
    "broken JSONL": ("", '{"prompt": "a", "completion"\n', "rows.jsonl:2: not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_refuses_what_a_ship_would(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, rows, message = REFUSED[case]
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write(train)
    if not train:
        (place / "rows.jsonl").write_text(rows)
    error = failed(capsys, "plan", "recipe.yaml")
    assert message in error["message"]
    if case == "targets":
        [problem] = error["problems"]
        assert (problem["file"], problem["line"]) == ("recipe.yaml", 4)
        assert "q_proj" in error["hint"]
    if case == "experts":
        assert error["hint"] == "leave train.lora.experts out for its default, or take another base"


DORA: dict[str, tuple[str, str]] = {
    "embedding": ("q_proj, embed_tokens", "embed_tokens is an embedding, not a linear layer"),
    "Conv1D": ("q_proj", "the layers of gpt2 are Conv1D, not linear"),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_that_no_merge_could_hold(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets, message = DORA[case]
    configuration = place / "base" / "config.json"
    if case == "Conv1D":
        text = configuration.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel")
        configuration.write_text(text.replace('"llama"', '"gpt2"'))
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write(f"train: {{lora: {{dora: true, targets: [{targets}]}}}}\n")
    error = failed(capsys, "plan", "recipe.yaml")
    assert error["message"] == "train.lora.dora: DoRA is only for linear layers"
    [problem] = error["problems"]
    assert (problem["file"], problem["line"], problem["message"]) == ("recipe.yaml", 4, message)


@pytest.mark.parametrize(
    ("targets", "inner"),
    [
        ("auto", ()),
        ("attention", ()),
        ("[q_proj, v_proj]", ()),
        (r"'.*self_attn\.[qv]_proj'", ()),
        ("[q_proj, w1x, gate]", ("w1x", "gate")),
        ("[experts.w1x, gate_up_proj]", ("experts.w1x", "gate_up_proj")),
        ("all-linear", ("all-linear",)),
        (r"'.*layers\.0\.experts\.w1x'", (r".*layers\.0\.experts\.w1x",)),
        (r"'.*\.gate'", (r".*\.gate",)),
        ("'.*'", (".*",)),
    ],
)
def test_experts_and_routers_are_not_adapted(
    targets: str, inner: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """peft adapts joined experts by another field, and a router that moves chooses other experts."""
    weights = place / "base" / "model.safetensors"
    renamed = weights.read_bytes().replace(b".mlp.gate_proj.", b".experts.0.w1x.")
    weights.write_bytes(renamed.replace(b".mlp.up_proj.", b".mlp.x1.gate."))
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write(f"train: {{lora: {{targets: {targets}}}}}\n")
    if inner:
        error = failed(capsys, "plan", "recipe.yaml")
        assert error["message"].startswith("train.lora.targets: experts and routers are not named here: a ")
        assert [problem["message"] for problem in error["problems"]] == [
            f"{target} takes in experts or the router" for target in inner
        ]
        assert {problem["line"] for problem in error["problems"]} == {4}
        return
    assert run_command(["plan", "recipe.yaml"]) == 0
    shown = "".join(capsys.readouterr())
    assert ("auto means attention beside experts: a router" in shown) == (targets == "auto")


def test_old_names_are_told_beside_what_is_wrong(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (place / "recipe.yaml").open("a") as recipe:
        recipe.write("train: {num_train_epochs: -1}\n")
    assert run_command(["plan", "recipe.yaml"]) == 2
    told = capsys.readouterr().err
    assert "train.num_train_epochs is now train.epochs" in told
    assert "must be greater than 0" in told


def test_a_fault_of_an_override_names_its_field(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [problem] = failed(capsys, "plan", "recipe.yaml", "-o", "train.lora.r=0")["problems"]
    assert (problem["field"], problem["file"], problem["line"]) == ("train.lora.r", "-o train.lora.r", 0)


def test_data_in_short(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.replace("{source: rows.jsonl}", "rows.jsonl"))
    loaded = load(recipe)
    assert loaded.recipe.data and loaded.recipe.data.source == "rows.jsonl"
    assert loaded.sources["data.source"].where == f"{recipe}:3"
    assert loaded.sources["data.eval"].kind == "default"
    recipe.write_text(RECIPE.replace("{source: rows.jsonl}", "row.jsonl"))
    [problem] = failed(capsys, "plan", "recipe.yaml")["problems"]
    assert (problem["line"], problem["message"]) == (3, "no such file: row.jsonl; did you mean rows.jsonl?")


def test_many_faults_of_a_checkpoint_are_told_in_short(tmp_path: Path) -> None:
    base = copy_of_tiny(tmp_path / "base")
    (base / "model.safetensors").rename(base / "one.safetensors")
    weights = {f"layer.{number}.weight": "one.safetensors" for number in range(9)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(DataError) as caught:
        open_checkpoint(base)
    assert len(caught.value.problems) == 6
    assert re.fullmatch(r"and \d+ more", caught.value.problems[-1].message)
