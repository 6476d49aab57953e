"""Where a base is, what is no base, and the licence it comes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.errors import DataError
from forge.model.base import resolve
from forge.model.hub_repository import wanted
from forge.model.licence import licence_warning, read_licence


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlanguage: en\nlicense: mit\n---\ntext"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: qwen-research\n---\n"}, "qwen-research"),
        ({"README.md": "---\nlicense:\n- apache-2.0\n---\n"}, "apache-2.0"),
        ({"README.md": "no front matter\nlicense: mit\n"}, None),
        ({"LICENSE": "\n                 Apache License\n   Version 2.0"}, "apache-2.0"),
        ({"README.md": "# x", "LICENSE.txt": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n"}, "llama3.2"),
        ({"LICENSE": "\nTerms of Somebody\n"}, "Terms of Somebody"),
        ({}, None),
    ],
)
def test_a11_the_licence_is_found(tmp_path: Path, files: dict[str, str], licence: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_licence(tmp_path) == licence


@pytest.mark.parametrize(
    ("licence", "warning"),
    [
        ("apache-2.0", None),
        ("mit", None),
        ("cc-by-nc-4.0", "licence cc-by-nc-4.0: commercial use is not allowed"),
        ("qwen-research", "licence qwen-research: commercial use is not allowed"),
        ("llama3.2", "licence llama3.2: it sets conditions of its own"),
        ("cc-by-nd-4.0", "licence cc-by-nd-4.0: nothing that is made from this base may be published"),
        (None, "the base names no licence"),
    ],
)
def test_a11_a_licence_without_commercial_use_is_warned_about(
    licence: str | None, warning: str | None
) -> None:
    found = licence_warning(licence)
    assert found is None if warning is None else str(found).startswith(warning)


def test_a_directory_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    base = resolve("org/model", relative_to=tmp_path, fetch=False)
    assert (base.directory, base.revision) == (tmp_path / "org" / "model", None)
    assert [str(problem) for problem in base.problems] == [
        "base: the base names no licence: check that you may use it; forge push asks you for one"
    ]
    with pytest.raises(DataError, match="a directory has no revision"):
        resolve("org/model", relative_to=tmp_path, revision="v1")


def test_what_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for spec, message in (
        ("./nowhere", f"{tmp_path / 'nowhere'}: no such directory"),
        ("/no/such/place", "/no/such/place: no such directory"),
        ("a/b/c", f"{tmp_path / 'a/b/c'}: no such directory"),
        ("model.gguf", f"{tmp_path / 'model.gguf'}: a file, not a base"),
        ("builtin:huge", "builtin:huge: no such built-in base"),
        ("builtin:../builtin", "builtin:../builtin: no such built-in base"),
        ("org/model@v1", "org/model@v1: two revisions: 'v1' and 'v2'"),
    ):
        revision = "v2" if spec.startswith("org") else None
        with pytest.raises(DataError) as caught:
            resolve(spec, relative_to=tmp_path, revision=revision, offline=True)
        assert caught.value.message == message


def test_shards_of_every_naming_are_wanted() -> None:
    shards = [
        "model-00001-of-00002.safetensors",
        "model-1-of-2.safetensors",
        "model.safetensors-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
    ]
    refused = [
        "model.bf16.safetensors",
        "checkpoint-5/model.safetensors",
        "trainer_state.json",
        "rng_state.pth",
    ]
    assert wanted([*shards, *refused]) == shards
