"""GGUF files of others: a copy whose template is pinned, and what the Modelfile says of either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.chat.hand_over import hand_over_of
from forge.chat.modelfile import parse_modelfile
from forge.cli.main import run_command
from forge.errors import CheckError
from forge.model.gguf_copy import require_same_but
from forge.model.gguf_header import read_gguf
from forge.serve.ollama import import_model
from forge.tools.ollama import Ollama
from tests.fake_ollama import FakeOllama
from tests.makers.tokenizer import CHATML
from tests.ollama_servers import make
from tests.tiny_gguf import write_tiny_gguf

USER = [{"role": "user", "content": "Hello?"}]
RENAMED = CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|end|>")
# As Llama 3.1 and later: a date of its own where the server gives none, and tools.
DATED = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% if tools is defined and tools %}{{ tools }}{% endif %}Today Date: {{ date_string }}\n" + CHATML
)


def guarded(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[Path, dict[str, object]]:
    out = path.with_name("guarded.gguf")
    capsys.readouterr()
    assert run_command(["modelfile", str(path), "--guard", str(out), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return out, found


@pytest.mark.parametrize("quantized", [False, True])
def test_only_the_template_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantized: bool
) -> None:
    """P2: metadata only; the tensors are the same bytes, wherever they come to lie."""
    path = write_tiny_gguf(tmp_path / "m.gguf", template=DATED, quantized=quantized)
    before = path.read_bytes()
    out, found = guarded(path, capsys)
    one, other = read_gguf(path), read_gguf(out)
    assert path.read_bytes() == before and found["guarded_compared"] == 200
    assert other.chat_template == hand_over_of(path).template.pinned_source()
    assert {**one.metadata, "tokenizer.chat_template": ""}.keys() == other.metadata.keys()
    assert out.read_bytes()[other.data :] == before[one.data :]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guarded.gguf", "m.gguf"]
    require_same_but(one, out, "tokenizer.chat_template", other.chat_template or "")
    spoiled = bytearray(out.read_bytes())
    spoiled[-1] ^= 1
    out.write_bytes(spoiled)
    with pytest.raises(CheckError, match="the bytes of its tensors"):
        require_same_but(one, out, "tokenizer.chat_template", other.chat_template or "")


def test_the_modelfile_says_for_whom_its_template_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A claim holds on the server that reads it (0.30 ignores a TEMPLATE where the Jinja knows tools)."""
    path = write_tiny_gguf(tmp_path / "m.gguf", template=DATED)
    assert run_command(["modelfile", str(path)]) == 0
    remarks = capsys.readouterr().out
    assert "TEMPLATE holds for older servers, and with OLLAMA_GO_TEMPLATE=1" in remarks
    assert run_command(["modelfile", str(path), "--jinja"]) == 0
    said = capsys.readouterr()
    assert "not pinned: Ollama puts a template of its own" in said.out and "--guard OUT.gguf" in said.err
    out, found = guarded(path, capsys)
    text = str(found["modelfile"])
    assert parse_modelfile(text).base == str(out)
    assert "pinned, it writes the same" in text and "OLLAMA_GO_TEMPLATE" not in text


def test_what_no_copy_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", template=DATED)
    out, _ = guarded(path, capsys)
    bare = write_tiny_gguf(tmp_path / "bare.gguf", template=None)
    computed = "{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML
    clock = write_tiny_gguf(tmp_path / "clock.gguf", template=computed)
    for source, target, reason in (
        (path, path, "names the file itself"),
        (out, tmp_path / "x.gguf", "has a pinned template already"),
        (tmp_path, tmp_path / "x.gguf", "takes a GGUF file"),
        (bare, tmp_path / "x.gguf", "no chat template"),
        (clock, tmp_path / "x.gguf", "computed format"),
    ):
        assert run_command(["modelfile", str(source), "--guard", str(target)]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.network
@pytest.mark.programs
def test_a_date_is_pinned_for_the_import(
    fake_ollama: FakeOllama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 3.1 and later: the server's today, and a TEMPLATE that it ignores; the copy goes in."""
    path = write_tiny_gguf(tmp_path / "m.gguf", template=DATED)
    with Ollama(fake_ollama.url) as server:
        with pytest.raises(CheckError) as caught:
            import_model(server, "yoda", path, hand_over_of(path))
        assert f"forge modelfile {path} --guard OUT.gguf" in caught.value.hint
        out, _ = guarded(path, capsys)
        assert import_model(server, "yoda", out, hand_over_of(out)).way == "jinja"
        assert server.prompt("yoda", USER).startswith("Today Date: 26 Jul 2024\n")


@pytest.mark.network
@pytest.mark.programs
def test_by_hand_the_copy_is_taken_for_no_other(
    fake_ollama: FakeOllama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ollama create -f Modelfile`: what the file says goes to the server, nothing of forge's own."""
    path = write_tiny_gguf(tmp_path / "m.gguf", template=RENAMED)
    expected = hand_over_of(path).template.render(USER, add_generation_prompt=True)
    out, found = guarded(path, capsys, "--jinja")
    read = parse_modelfile(str(found["modelfile"]))
    with Ollama(fake_ollama.url) as server:
        parameters = {"stop": list(read.stops), "num_ctx": 512}
        make(server, "bare", path, parameters=parameters)
        make(server, "yoda", out, parameters=parameters)
        assert server.prompt("bare", USER) != expected
        assert server.prompt("yoda", USER) == expected
