"""`import forge`: the public names, and that they do what the commands of their names do."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest

import forge
from forge import api
from forge.model.base import BUILTIN
from forge.process import run

TINY = BUILTIN / "tiny"
RECIPE = {
    "name": "mini",
    "base": "builtin:tiny",
    "data": {"source": "builtin:yoda", "columns": {"prompt": "sentence", "completion": "translation_extra"}},
    "train": {"max_steps": 4},
}


def test_every_public_name_is_callable_and_described() -> None:
    assert forge.__all__ == api.__all__
    for name in forge.__all__:
        assert callable(getattr(forge, name)) and inspect.getdoc(getattr(api, name)), name


def test_a_function_stays_one_when_the_package_of_its_name_is_imported() -> None:
    import forge.export.run
    import forge.ship.drive

    with pytest.raises(forge.ForgeError) as caught:
        forge.ship({"name": "x"})
    assert "is required" in str(caught.value.problems[0])
    assert inspect.ismodule(sys.modules["forge.ship"])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="shipp"):
        _ = forge.shipp


@pytest.mark.programs
def test_importing_it_is_light() -> None:
    code = "import sys, forge; print({'pydantic', 'httpx', 'torch', 'numpy'} & set(sys.modules))"
    assert run([sys.executable, "-c", code]).output.strip() == "set()"


def test_a_recipe_is_a_file_a_mapping_or_one_that_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(RECIPE), encoding="utf-8")
    loaded = forge.load(RECIPE, {"train.max_steps": 2, "train.lora.targets": ["q_proj", "v_proj"]})
    assert forge.load(file, {"train.max_steps": 2, "train.lora.targets": ["q_proj", "v_proj"]}).recipe == (
        loaded.recipe
    )
    assert forge.load(loaded) is loaded
    with pytest.raises(TypeError, match="give them to load"):
        forge.load(loaded, {"train.max_steps": 1})


def test_every_problem_of_a_recipe_comes_at_once() -> None:
    wrong = RECIPE | {"name": "a/b", "train": {"epochs": 0, "lerning_rate": 1}}
    with pytest.raises(forge.ForgeError) as caught:
        forge.load(wrong)
    assert {problem.field for problem in caught.value.problems} == {
        "name", "train.epochs", "train.lerning_rate"
    }  # fmt: skip
    assert caught.value.code == 2


def test_a_plan_writes_nothing(forge_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(forge_home.rglob("*"))
    plan = forge.plan(RECIPE)
    assert [stage["name"] for stage in plan["stages"]][:2] == ["data", "train"]
    assert sorted(forge_home.rglob("*")) == before


def test_templates_and_modelfiles(tmp_path: Path) -> None:
    assert forge.template(TINY)["status"].startswith("exact")
    out = tmp_path / "Modelfile"
    told = forge.modelfile(TINY, out=out)
    assert (told["modelfile"], told["status"]) == (str(out), "exact")
    assert "TEMPLATE" in out.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.programs
@pytest.mark.network
def test_a_file_is_exported_proved_served_and_asked(forge_home: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    assert forge.export("builtin:tiny", gguf, quant="q8_0")["quant"] == "q8_0"
    assert forge.verify("builtin:tiny", gguf)["ok"] is True
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"id": 1, "prompt": "Repeat: the cat is here."}\n', encoding="utf-8")
    with forge.serve(gguf) as client:
        answer = client.chat("Repeat: the cat is here.", temperature=0, max_tokens=16)
        assert "".join(client.stream("Repeat: the cat is here.", temperature=0, max_tokens=16)) == answer
        done = forge.generate(prompts, answers, client.endpoint.url, temperature=0, max_tokens=16)
        with forge.Client(client.endpoint.url) as other:
            assert other.chat([{"role": "user", "content": "Hello!"}], max_tokens=4)
    assert (done["written"], done["failed"]) == (1, 0)
    assert json.loads(answers.read_text(encoding="utf-8"))["text"] == answer
