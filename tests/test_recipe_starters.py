"""The starter recipes and the field table."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from forge.data.conversations import to_conversations
from forge.data.files import read_rows
from forge.data.sources import locate
from forge.errors import RecipeError
from forge.recipe import starters
from forge.recipe.fields import all_names
from forge.recipe.load import load
from tests.makers.make_synthetic import SETS
from tests.recipe_tables import describe_recipe

DATA = {
    "adopt-adapter": "data/heldout.jsonl",
    "chat-messages": "data/conversations.jsonl",
    "sft-prompts": "data/train.jsonl",
}


def test_the_starters_are_the_files_of_the_templates() -> None:
    assert starters.kinds() == (
        "adopt-adapter", "alpaca", "chat-messages", "code", "falcon", "gpt2", "guanaco", "llama-2", "medical",
        "mistral", "opt", "overview", "plain-base", "preference", "quickstart", "rtx3090", "sentiment",
        "sft-prompts", "smollm2", "yoda",
    )  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_synthetic_rows_are_their_maker_s(name: str, tmp_path: Path) -> None:
    """E10: 18 positive, 18 negative and 14 neutral reviews, code and questions, each read as it is."""
    path = locate(f"builtin:{name}", tmp_path)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == SETS[name]()
    conversations = to_conversations(read_rows(path)).conversations
    assert len({one.fingerprint for one in conversations}) == len(SETS[name]())
    labels = Counter(one.turns[-1].content for one in conversations)
    if name == "sentiment":
        assert labels == {"positive": 18, "negative": 18, "neutral": 14}


@pytest.mark.parametrize("kind", starters.kinds())
def test_every_starter_loads_once_its_data_is_there(tmp_path: Path, kind: str) -> None:
    path = starters.write_kind("mine", kind, tmp_path / "new")
    assert path == tmp_path / "new" / "mine.yaml"
    if kind in DATA:
        with pytest.raises(RecipeError) as refused:
            load(path)
        assert [problem.field for problem in refused.value.problems] == ["data.source"]
        file = path.parent / DATA[kind]
        file.parent.mkdir()
        file.touch()
    found = load(path)
    assert found.recipe.name == "mine"
    assert found.warnings == ()
    assert path.read_text().count("#") > 3


@pytest.mark.parametrize("kind", starters.kinds())
def test_a_starter_differs_from_its_template_in_the_name_alone(tmp_path: Path, kind: str) -> None:
    template = (starters.directory_of_starters() / f"{kind}.yaml").read_text()
    assert starters.write_kind("mine", kind, tmp_path).read_text() == template.replace(
        f"name: {kind}", "name: mine"
    )


@pytest.mark.parametrize("name", ["123", "1e5", "true", "null", "a.b-c_d"])
def test_a_name_stays_text(tmp_path: Path, name: str) -> None:
    assert load(starters.write_kind(name, "quickstart", tmp_path)).recipe.name == name


def test_starters_refuse(tmp_path: Path) -> None:
    starters.write_kind("mine", "quickstart", tmp_path)
    before = (tmp_path / "mine.yaml").read_text()
    with pytest.raises(RecipeError, match=r"mine\.yaml exists already"):
        starters.write_kind("mine", "plain-base", tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == before
    with pytest.raises(RecipeError, match="no starter recipe quikstart; did you mean quickstart"):
        starters.write_kind("other", "quikstart", tmp_path)
    for name in ("../up", "", ".hidden", "a b"):
        with pytest.raises(RecipeError, match="cannot name a recipe"):
            starters.write_kind(name, "quickstart", tmp_path)
    with pytest.raises(RecipeError, match=r"mine\.yaml is not a directory"):
        starters.write_kind("other", "quickstart", tmp_path / "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_the_field_table_has_every_field() -> None:
    found = []
    title = ""
    for line in describe_recipe().splitlines():
        if heading := re.fullmatch(r"### (.*)", line):
            title = heading[1].strip("`").replace("[]", ".*").replace("train: {from: ADAPTER}", "train")
        elif row := re.fullmatch(r"\| `(\w+)` \| (.+) \| (.+) \|", line):
            found.append(f"{title}.{row[1]}".removeprefix("The recipe."))
    assert sorted(found) == sorted(all_names())
    assert "| `r` | `16` | rank |" in describe_recipe()
    assert "| `base` | required | the model to start from |" in describe_recipe()
