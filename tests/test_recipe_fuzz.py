"""Whatever a recipe holds, the answer is a recipe or lines in plain words."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.errors import RecipeError
from forge.recipe.fields import all_names
from forge.recipe.load import load
from forge.recipe.starters import directory_of_starters

GOOD = "name: small\nbase: builtin:tiny\ndata: {source: builtin:yoda, limit: 5}\n"
JARGON = ("Input should", "pydantic", "is not valid (got", "Traceback", "NoneType")


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def in_plain_words(overrides: list[str]) -> None:
    try:
        load(Path("recipe.yaml"), overrides)
    except RecipeError as failure:
        assert failure.problems
        for problem in failure.problems:
            assert str(problem).isprintable()
            assert not [word for word in JARGON if word in problem.message]


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["none", "auto", "x@y", "builtin:", "a/b", "(", "~x", "Q4_K_M"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([name for name in all_names() if "*" not in name]) | st.text(max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(written=st.dictionaries(keys, anything, min_size=1, max_size=4))
def test_no_recipe_makes_it_stumble(written: dict[str, object]) -> None:
    Path("recipe.yaml").write_text(GOOD)
    in_plain_words([f"{key}={_as_yaml(value)}" for key, value in written.items()])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(
    cut=st.integers(0, 2000), dropped=st.integers(0, 9), put=st.text("{}[]:-#'\"&*!|> \n\tnx1.", max_size=4)
)
def test_a_torn_recipe_is_told(cut: int, dropped: int, put: str) -> None:
    text = (directory_of_starters() / "chat-messages.yaml").read_text()
    Path("recipe.yaml").write_text(text[:cut] + put + text[cut + dropped :])
    in_plain_words([])


def test_aliases_of_aliases_are_refused_at_once() -> None:
    """A billion laughs in 0.4 kB: as a section, and in an override."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for above, name in pairwise("abcdefghij"):
        bomb += f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]\n"
    Path("recipe.yaml").write_text(GOOD + bomb)
    began = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load(Path("recipe.yaml"), [])
    assert "more than 50,000 values" in caught.value.problems[0].message
    Path("recipe.yaml").write_text(GOOD)
    flow = "{" + bomb.strip().replace("\n", ", ") + "}"
    with pytest.raises(RecipeError) as caught:
        load(Path("recipe.yaml"), [f"train={flow}"])
    assert "more than 50,000 values" in caught.value.problems[0].message
    assert time.monotonic() - began < 20


def _as_yaml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_yaml(key)}: {_as_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, float) and value - value != 0:
        return ".nan" if value != value else ".inf"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    return {None: "null", True: "true", False: "false"}.get(value) or repr(value)  # type: ignore[call-overload]
