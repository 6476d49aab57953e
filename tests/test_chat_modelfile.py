"""Modelfiles, whole: the one with a proved Go TEMPLATE, and the one that uses the GGUF's own Jinja."""

from __future__ import annotations

from pathlib import Path

from forge.chat.modelfile import write_modelfiles
from forge.chat.template import ChatTemplate
from forge.model.builtin.tokenizer import CHATML

PARAMETERS = 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER num_ctx 512\n'


def test_chatml_gets_both(tmp_path: Path) -> None:
    """P1, P2, P3, pitfall 54: every stop is written, the context too (silent wrongs 4 and 14)."""
    told = write_modelfiles(
        tmp_path,
        file="yoda.gguf",
        template=ChatTemplate(CHATML),
        stops=["<|im_end|>", "</s>"],
        context_tokens=512,
    )
    files = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert files.keys() == {"Modelfile", "Modelfile.jinja"}
    assert files["Modelfile.jinja"] == f"REQUIRES 0.30\nFROM ./yoda.gguf\n{PARAMETERS}"
    head, _, rest = files["Modelfile"].partition('TEMPLATE """')
    go, closing, parameters = rest.partition('"""\n')
    assert (head, closing, parameters) == ("FROM ./yoda.gguf\n", '"""\n', PARAMETERS)
    assert go.startswith("{{") and go.endswith("}}")
    assert (told["modelfile"], told["reason"]) == ("Modelfile", None)
    assert told["stops"] == ["<|im_end|>", "</s>"]


def test_a_template_that_go_cannot_say(tmp_path: Path) -> None:
    """It is told why; the other file is written all the same."""
    upside_down = "{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}"
    told = write_modelfiles(
        tmp_path,
        file="yoda.gguf",
        template=ChatTemplate(upside_down),
        stops=["<|im_end|>"],
        context_tokens=64,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"Modelfile.jinja"}
    assert told["modelfile"] is None
    assert told["status"] == "refused"
    assert told["reason"]


def test_stops_are_quoted(tmp_path: Path) -> None:
    stops = ['say "stop"', "\n", "<|end|>"]
    write_modelfiles(tmp_path, file="m.gguf", template=ChatTemplate(CHATML), stops=stops, context_tokens=64)
    text = (tmp_path / "Modelfile.jinja").read_text(encoding="utf-8")
    assert text.splitlines()[2:-1] == [
        'PARAMETER stop """say "stop""""', 'PARAMETER stop """', '"""', 'PARAMETER stop "<|end|>"',
    ]  # fmt: skip
