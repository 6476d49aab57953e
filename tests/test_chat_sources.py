"""Where templates come from: directories, GGUF and .jinja files; and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.chat.format_check import NOT_CLAIMED
from forge.chat.hand_over import hand_over_of
from forge.chat.modelfile import parse_modelfile
from forge.cli.main import run_command
from tests.conftest import copy_of_tiny
from tests.makers.tokenizer import CHATML
from tests.models import change_json
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return copy_of_tiny(tmp_path / "tiny")


def told(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert run_command([*command, "--json"]) == code
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def without_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    change_json(directory / "tokenizer_config.json", chat_template=None)


def test_a_directory_a_gguf_and_a_jinja_file_say_the_same(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D9: the model's own template, wherever it lies."""
    gguf = write_tiny_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.jinja").write_text(CHATML, encoding="utf-8")
    found = [told(capsys, "template", str(path)) for path in (tiny, gguf, tmp_path / "m.jinja")]
    assert {str(one["go"]) for one in found} == {found[0]["go"]}
    assert [one["status"] for one in found] == ["exact"] * 3


def test_no_template_offers_chatml_and_assumes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_template(tiny)
    bare = write_tiny_gguf(tmp_path / "m.gguf", template=None)
    for path in (tiny, bare):
        for command in ("template", "modelfile"):
            error = told(capsys, command, str(path), code=2)["error"]
            assert isinstance(error, dict)
            assert "no chat template" in error["message"] and "ChatML" in error["hint"]


def test_several_named_templates(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default one is taken, the others are named; without a default they are asked for."""
    without_template(tiny)
    named = [
        {"name": "default", "template": CHATML},
        {"name": "rag", "template": "{{ messages[0].content }}"},
    ]
    change_json(tiny / "tokenizer_config.json", chat_template=named)
    capsys.readouterr()
    assert run_command(["template", str(tiny)]) == 0
    assert "also has the templates rag" in capsys.readouterr().out
    change_json(tiny / "tokenizer_config.json", chat_template=[{**named[0], "name": "chat"}, named[1]])
    error = told(capsys, "template", str(tiny), code=2)["error"]
    assert isinstance(error, dict)
    assert "none of its templates is the default: chat, rag" in error["message"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}", "not valid Jinja: line 1"),
        ("{{ strftime_now(x) }}", "computed format"),
    ],
)
def test_templates_that_cannot_be_read(
    tiny: Path, source: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "chat_template.jinja").write_text(source, encoding="utf-8")
    if "strftime" in source:
        assert told(capsys, "template", str(tiny), code=5)["status"] == "refused"
        return
    error = told(capsys, "template", str(tiny), code=2)["error"]
    assert isinstance(error, dict) and said in error["message"]


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\x00")
    for name in ("m.gguf", "bytes.jinja", "nowhere.jinja", "nowhere"):
        error = told(capsys, "template", str(tmp_path / name), code=2)["error"]
        assert isinstance(error, dict) and name in error["message"]


def split(text: str) -> tuple[list[str], list[str]]:
    """The remarks and the rest of what is a whole Modelfile."""
    parse_modelfile(text)
    lines = text.splitlines()
    return [line for line in lines if line.startswith("#")], [
        line for line in lines if not line.startswith("#")
    ]


def test_modelfile_of_a_directory(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """P1, P3, P4 without any recipe: FROM, TEMPLATE, stops, num_ctx, sampling, licence, ADAPTER."""
    change_json(tiny / "generation_config.json", do_sample=True, temperature=0.6)
    (tiny / "LICENSE").write_text("Apache License\n", encoding="utf-8")
    out = tmp_path / "out.Modelfile"
    found = told(capsys, "modelfile", str(tiny), "--adapter", "./lora.gguf", "--out", str(out))
    remarks, lines = split(out.read_text(encoding="utf-8"))
    not_claimed = f"# not claimed: {', '.join(NOT_CLAIMED)}"
    assert remarks[2:] == [not_claimed, "# sampling: of generation_config.json"]
    assert remarks[0].startswith("# TEMPLATE: exact, ")
    assert (found["modelfile"], found["status"], found["way"]) == (str(out), "exact", "go")
    assert lines[:2] == [f"FROM {tiny}.gguf", "ADAPTER ./lora.gguf"]
    assert lines[2].startswith('TEMPLATE """')
    assert lines[-4:] == [
        'PARAMETER stop "<|im_end|>"', "PARAMETER num_ctx 1024", "PARAMETER temperature 0.6",
        "LICENSE Apache License",
    ]  # fmt: skip
    write_tiny_gguf(tiny / "own.gguf")
    capsys.readouterr()
    assert run_command(["modelfile", str(tiny), "--jinja"]) == 0
    remarks, lines = split(capsys.readouterr().out)
    assert remarks[0].startswith("# the GGUF's own template, not pinned: ")
    assert lines[:3] == ["REQUIRES 0.30", f"FROM {tiny / 'own.gguf'}", 'PARAMETER stop "<|im_end|>"']


@pytest.mark.network
def test_a_model_of_ollamas_library_under_an_adapter(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4, pitfall 54: what the library's file is cannot be proved, and the Modelfile says so."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    library = ("modelfile", str(tiny), "--from", "phi3:mini")
    text = str(told(capsys, *library, "--adapter", "./lora.gguf")["modelfile"])
    remarks, lines = split(text)
    assert lines[:2] == ["FROM phi3:mini", "ADAPTER ./lora.gguf"] and lines[2].startswith('TEMPLATE """')
    assert remarks[-1].startswith("# not proved: what phi3:mini is: no Ollama server answers at ")
    assert f"forge verify --ollama phi3:mini --base {tiny}" in remarks[-1] and "pinned" not in text
    for more in ([], ["--adapter", "x.gguf", "--jinja"]):
        error = told(capsys, *library, *more, code=2)["error"]
        assert isinstance(error, dict) and "give --adapter" in error["message"]


def test_a_licence_that_no_modelfile_can_hold_is_left_out_and_said(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny / "LICENSE").write_text('A line that ends in """\nand goes on', encoding="utf-8")
    assert run_command(["modelfile", str(tiny)]) == 0
    said = capsys.readouterr()
    remarks, lines = split(said.out)
    assert remarks[-1].startswith("# left out, since no Modelfile can hold it: LICENSE ")
    assert "left out" in said.err and not any(line.startswith("LICENSE") for line in lines)


def test_the_context_is_not_more_than_the_models_positions(tiny: Path) -> None:
    """The tokenizer's own limit is often a placeholder."""
    change_json(tiny / "tokenizer_config.json", model_max_length=10**30)
    change_json(tiny / "config.json", max_position_embeddings=640)
    assert hand_over_of(tiny).context_tokens == 640


def test_modelfile_of_a_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    found = told(capsys, "modelfile", str(path))
    _, lines = split(str(found["modelfile"]))
    assert lines[0] == f"FROM {path}" and lines[1].startswith('TEMPLATE """')
    assert parse_modelfile(str(found["modelfile"])).base == str(path)
    assert found["stops"] == ["<|im_end|>"]
    sampling = {"temp": 0.6, "top_k": 20, "penalty_repeat": 1.05, "xtc_threshold": 0.1}
    sampled = write_tiny_gguf(tmp_path / "s.gguf", sampling=sampling)
    remarks, lines = split(str(told(capsys, "modelfile", str(sampled))["modelfile"]))
    assert remarks[-1] == "# sampling: of the GGUF's general.sampling keys"
    assert lines[-3:] == [
        "PARAMETER temperature 0.6", "PARAMETER top_k 20", "PARAMETER repeat_penalty 1.05",
    ]  # fmt: skip
    upside_down = write_tiny_gguf(
        tmp_path / "n.gguf", template="{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    )
    capsys.readouterr()
    assert run_command(["modelfile", str(upside_down)]) == 0
    said = capsys.readouterr()
    assert f"REQUIRES 0.30\nFROM {upside_down}\nPARAMETER stop" in said.out
    assert "no Go TEMPLATE: it leaves out" in said.err
    assert hand_over_of(upside_down).stops == ("<|im_end|>",)
