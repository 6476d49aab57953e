"""`forge repair`: GGUFs broken by hand; their metadata is mended in a verified copy, or refused (O1, N3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.cli.main import run_command
from forge.model.gguf_header import GgufHeader, read_gguf
from tests.conftest import copy_of_tiny, link_converters
from tests.models import PEFT_WARNS, make_adapter
from tests.specimens import rewrite

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(900), PEFT_WARNS]

Repair = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in base with sampling and a licence of its own, and its q8_0 GGUF."""
    root = tmp_path_factory.mktemp("repair")
    link_converters(root / "home")
    base = copy_of_tiny(root / "base")
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1455, "pad_token_id": 1453}
    (base / "generation_config.json").write_text(json.dumps(asked))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORGE_HOME", str(root / "home"))
        options = ["--base", str(base), "--quant", "q8_0", "--out", str(root / "sound.gguf")]
        assert run_command(["export", *options]) == 0
    return root


@pytest.fixture
def repair(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Repair:
    monkeypatch.setenv("FORGE_HOME", str(place / "home"))

    def called(gguf: Path, *more: object) -> tuple[int, dict[str, Any]]:
        code = run_command(["repair", *map(str, [gguf, "--base", place / "base", *more]), "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return called


def _without_control(header: GgufHeader) -> list[int]:
    """The tokens' types as a tool leaves them that takes control tokens for words."""
    return [1 if kind == 3 else int(kind) for kind in header.array("tokenizer.ggml.token_type")]


_BROKEN: dict[str, dict[str, Any]] = {
    "template": {"tokenizer.chat_template": "{{ messages[0]['content'] }}"},
    "no template": {"tokenizer.chat_template": None},
    "bos flag": {"tokenizer.ggml.add_bos_token": True},
    "eos flag": {"tokenizer.ggml.add_eos_token": True},
    "end ids": {"tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.eot_token_id": 9},
    "bos id": {"tokenizer.ggml.bos_token_id": 5},
    "pre-tokenizer": {"tokenizer.ggml.pre": "llama-bpe"},
    "added tokens' types": {"tokenizer.ggml.token_type": _without_control},
    "kind of tokenizer": {"tokenizer.ggml.model": "llama"},
    "a merge": {"tokenizer.ggml.merges": lambda sound: list(sound.array("tokenizer.ggml.merges")[1:])},
    "norms": {"llama.attention.layer_norm_rms_epsilon": 0.5},
    "context": {"llama.context_length": 64},
    "sampling": {"general.sampling.temp": None, "general.sampling.top_p": 0.1},
    "licence": {"general.license": "mit"},
    "rotation": {"llama.rope.freq_base": 500.0},
}
"""What each file says wrong: the value, None for a key that is missing, or a function of the sound file."""
_EVERY_TIME = ("template", "end ids", "pre-tokenizer", "added tokens' types")
"""One of each way of mending; each takes two certificates."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [one if one in _EVERY_TIME else pytest.param(one, marks=pytest.mark.campaign) for one in _BROKEN],
)
def test_metadata_is_mended_and_the_copy_verified(
    repair: Repair, place: Path, tmp_path: Path, what: str
) -> None:
    sound = read_gguf(place / "sound.gguf")
    changes = {key: value(sound) if callable(value) else value for key, value in _BROKEN[what].items()}
    broken = rewrite(sound.path, tmp_path / "theirs.gguf", **changes)
    before = broken.read_bytes()
    code, fields = repair(broken)
    assert code == 0 and fields["left"] == [], fields
    copy = tmp_path / "theirs-repaired.gguf"
    assert fields["gguf"] == str(copy) and fields["certificate"]["ok"] is True
    repaired = {change["key"]: change for change in fields["repaired"]}
    assert repaired.keys() == _BROKEN[what].keys()
    assert all(change["was"] != change["now"] for change in repaired.values())
    made = read_gguf(copy)
    assert made.metadata.keys() == sound.metadata.keys()
    assert {key: made.array(key) for key in made.metadata} == {key: sound.array(key) for key in made.metadata}
    assert {name: _bytes(made, name) for name in made.tensors} == {
        name: _bytes(sound, name) for name in sound.tensors
    }
    assert broken.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs-repaired.gguf", "theirs.gguf"]


def _bytes(header: GgufHeader, name: str) -> bytes:
    tensor = header.tensors[name]
    return header.path.read_bytes()[tensor.start : tensor.end]


def test_a_template_that_is_none_is_named(
    repair: Repair, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pitfall 30: verify says what is wrong with it instead of failing on it."""
    changes = {"tokenizer.chat_template": "{% for m in messages %}{{ m.content "}
    broken = rewrite(place / "sound.gguf", tmp_path / "theirs.gguf", None, **changes)
    assert run_command(["verify", "--base", str(place / "base"), "--gguf", str(broken)]) == 5
    assert "the file's chat template is not valid Jinja: line 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_value_of_another_type_is_mended(
    repair: Repair, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp does not load a flag that stands there as a number, and says which."""
    key = "tokenizer.ggml.add_bos_token"
    without, number = ({key: value} for value in (None, 0))
    broken = rewrite(place / "sound.gguf", tmp_path / "without.gguf", None, **without)
    broken = rewrite(broken, tmp_path / "theirs.gguf", None, **number)
    assert run_command(["verify", "--base", str(place / "base"), "--gguf", str(broken)]) == 5
    said = capsys.readouterr().err
    assert f"{key} has wrong type" in said and "forge repair" in said
    code, fields = repair(broken)
    assert code == 0 and fields["certificate"]["ok"] is True
    assert fields["repaired"] == [{"key": key, "was": "of type INT32", "now": "of type BOOL"}]


@pytest.mark.slow
def test_a_sound_file_is_left_alone(repair: Repair, place: Path, tmp_path: Path) -> None:
    code, fields = repair(place / "sound.gguf", "--out", tmp_path / "out.gguf")
    assert code == 0 and (fields["repaired"], fields["left"]) == ([], [])
    assert fields["gguf"] == str(place / "sound.gguf") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_weight_needs_new_weights(repair: Repair, place: Path, tmp_path: Path) -> None:
    """Its template is wrong too: a copy with the right one is not verified, and not written."""
    import gguf
    import numpy as np

    name = "blk.1.attn_output.weight"
    [data] = [one.data for one in gguf.GGUFReader(place / "sound.gguf").tensors if one.name == name]
    changes = {"tokenizer.chat_template": "no"}
    wrong = {name: np.roll(np.array(data), 1, axis=0)}
    broken = rewrite(place / "sound.gguf", tmp_path / "theirs.gguf", wrong, **changes)
    code, fields = repair(broken)
    error = fields["error"]
    assert code == 5 and "cannot be repaired without new weights" in error["message"]
    assert (
        fields["repaired"] == [] and fields["left"] == [item["message"] for item in error["problems"]] != []
    )
    assert fields["certificate"]["prompt"]["ok"] and not fields["certificate"]["ok"]
    assert error["hint"] == (
        f"make them: forge export --base {place / 'base'} --quant q8_0 --out theirs-new.gguf"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.gguf"]


@pytest.mark.slow
def test_an_adapter_that_is_not_in_the_weights(repair: Repair, place: Path, tmp_path: Path) -> None:
    adapter = make_adapter(place / "base", tmp_path / "adapter")
    code, fields = repair(place / "sound.gguf", "--adapter", adapter, "--out", tmp_path / "out.gguf")
    assert code == 5 and "not applied" in fields["error"]["message"]
    assert f"--adapter {adapter}" in fields["error"]["hint"]
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_another_size_of_vocabulary_needs_new_weights(repair: Repair, place: Path, tmp_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(place / "sound.gguf")
    [table] = [one.data for one in reader.tensors if one.name == "token_embd.weight"]
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    cut = {"tokenizer.ggml.tokens": tokens[:-8], "llama.vocab_size": len(tokens) - 8}
    broken = rewrite(place / "sound.gguf", tmp_path / "theirs.gguf", {"token_embd.weight": table[:-8]}, **cut)
    code, fields = repair(broken)
    assert code == 5 and "cannot be repaired without new weights" in fields["error"]["message"]
    [problem] = fields["error"]["problems"]
    assert "another size of the vocabulary" in problem["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.gguf"]


def test_bad_input(repair: Repair, place: Path, tmp_path: Path) -> None:
    sound = place / "sound.gguf"
    text = tmp_path / "text.gguf"
    text.write_text("this is not a model at all, and never was")
    for gguf, more, words in [
        (tmp_path / "none.gguf", [], "no such file"),
        (text, [], "not a GGUF file"),
        (sound, ["--out", sound], "is the file that is repaired"),
        (sound, ["--out", tmp_path], "is a directory"),
    ]:
        code, fields = repair(gguf, *more)
        assert code == 2 and words in fields["error"]["message"]
    assert run_command(["repair", str(sound)]) == 2
