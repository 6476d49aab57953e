"""The Modelfile's grammar, by the rules of Ollama's parser; and the files that forge writes."""

# ruff: noqa: E501 - one case a line
from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.chat.hand_over import (
    HandOver,
    LeftOut,
    hand_over,
    licences_of,
    prefers_jinja,
    sampling_of,
    write_modelfiles,
)
from forge.chat.modelfile import Modelfile, ModelfileError, modelfile_text, parse_modelfile
from forge.chat.template import ChatTemplate
from tests.makers.tokenizer import CHATML
from tests.models import change_json

PARAMETERS = 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\nPARAMETER num_ctx 512\n'
WHOLE = Modelfile(
    base="./yoda.gguf",
    adapter="./lora.gguf",
    draft="./draft.gguf",
    template='{{- range .Messages }}{{ "<|user|>\\n" }}{{ .Content }}\n{{- end }}',
    system='You are "Yoda".\nShort you speak.',
    parameters={
        "stop": ("<|end|>", "</s>", "\n", " Human:", 'say "stop"'),
        "num_ctx": 4096, "num_batch": 512, "num_gpu": 0, "main_gpu": 1, "num_thread": 4,
        "draft_num_predict": 3, "num_keep": -1, "seed": 42, "num_predict": -2, "top_k": 40,
        "repeat_last_n": 64, "top_p": 0.9, "min_p": 0.05, "typical_p": 1.0, "temperature": 0.7,
        "repeat_penalty": 1.1, "presence_penalty": 1.5, "frequency_penalty": 1e-05, "use_mmap": False,
    },
    messages=(("system", "Short."), ("user", "Who?\nYou?"), ("assistant", "Yoda: a master, I am.")),
    licences=("Apache-2.0", "Permission is hereby granted,\n  free of charge\n"),
    requires="0.30",
    renderer="qwen3-coder",
    parser="qwen3-coder",
)  # fmt: skip


def test_the_whole_grammar_is_written_and_read() -> None:
    """P1."""
    text = modelfile_text(WHOLE)
    assert parse_modelfile(text) == WHOLE
    assert text.splitlines()[:7] == [
        "REQUIRES 0.30", "FROM ./yoda.gguf", "ADAPTER ./lora.gguf", "DRAFT ./draft.gguf",
        'TEMPLATE """{{- range .Messages }}{{ "<|user|>\\n" }}{{ .Content }}', '{{- end }}"""',
        'SYSTEM """You are "Yoda".',
    ]  # fmt: skip
    assert "PARAMETER use_mmap false\n" in text and "MESSAGE assistant Yoda: a master, I am.\n" in text


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("from x", Modelfile("x")),
        ("\ufeff# a comment\r\n\r\n  FROM   x y  \r\n", Modelfile("x y")),
        ('FROM x\nSYSTEM "one\ntwo"', Modelfile("x", system="one\ntwo")),
        ('FROM x\nSYSTEM """one "two" three"""', Modelfile("x", system='one "two" three')),
        ('FROM x\nSYSTEM "say "this" twice"', Modelfile("x", system='say "this" twice')),
        ('FROM x\nSYSTEM """ends with "quotes""""', Modelfile("x", system='ends with "quotes"')),
        ('FROM x\nSYSTEM "a # b"  \n# c', Modelfile("x", system="a # b")),
        ("FROM x\nSYSTEM a\\nb", Modelfile("x", system="a\\nb")),
        ("FROM x\nSYSTEM a\u00a0b\u200bc\u2003d\te漢🙂｜▁", Modelfile("x", system="abcd\te漢🙂｜▁")),
        ("FROM x\nMESSAGE user hi", Modelfile("x", messages=(("user", "hi"),))),
        ("FROM x\nPARAMETER use_mmap T\nPARAMETER temperature 1", Modelfile("x", parameters={"use_mmap": True, "temperature": 1.0})),
        ("FROM x\nPARAMETER stop a\nPARAMETER stop b\nLICENSE a\nLICENSE b", Modelfile("x", parameters={"stop": ("a", "b")}, licences=("a", "b"))),
    ],
)  # fmt: skip
def test_what_the_server_reads(text: str, read: Modelfile) -> None:
    assert parse_modelfile(text) == read


def test_what_the_server_does_in_silence_is_told() -> None:
    read = parse_modelfile(
        "FROM x\nSYSTEM a\nSYSTEM b\nPARAMETER mirostat 1\nPARAMETER seed 1\nPARAMETER seed 2\n"
    )
    assert (read.system, read.parameters) == ("b", {"seed": 2})
    assert read.notes == (
        "line 3: this SYSTEM replaces an earlier one",
        "line 4: the server ignores PARAMETER mirostat",
        "line 6: this PARAMETER seed replaces an earlier one",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no FROM"),
        ("SYSTEM x", "has no FROM"),
        ("FROM x\nPARAMETER num_predict 5 # x", r"line 2: PARAMETER num_predict: invalid int value \[5 # x\]"),
        ("FROM x\nPARAMETER temperature warm", "invalid float value"),
        ("FROM x\nPARAMETER use_mmap maybe", "invalid bool value"),
        ("FROM x\nPARAMETER Temperature 1", "unknown parameter Temperature"),
        ("FROM x\nPARAMETER", "line 2: an instruction and its value were expected"),
        ("FROM x\nMESSAGE tool hi", "a MESSAGE is of system, user, assistant, not of tool"),
        ("FROM x\nTEMPLATEX y", "TEMPLATEX is no instruction"),
        ('FROM x\nSYSTEM """a\nb', "line 2: the quotes of this value are not closed"),
        ('FROM x\nSYSTEM "a"b', "line 2: the quotes of this value are not closed"),
        ("FROM x\nconvert this", "CONVERT is no instruction"),
    ],
)  # fmt: skip
def test_what_is_no_modelfile(text: str, said: str) -> None:
    with pytest.raises(ModelfileError, match=said):
        parse_modelfile(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\u00a0b", r"Ollama drops U\+00A0 from it"),
        ("zero\u200bwidth", r"U\+200B"),
        ('a line that ends in """\nand goes on', 'a line of it ends in """'),
        ('"""\n"', "a line of it ends"),
    ],
)  # fmt: skip
def test_what_no_modelfile_can_hold_is_refused(text: str, said: str) -> None:
    with pytest.raises(ModelfileError, match=said) as caught:
        modelfile_text(Modelfile("x", system=text))
    assert "HTTP" in caught.value.hint


_TEXTS = st.text(st.sampled_from('ab "\n\r\t#\\{}<|>漢\u00a0\u200b🙂'), max_size=12)


@given(system=_TEXTS, stops=st.lists(_TEXTS, min_size=1, max_size=3), licence=_TEXTS)
def test_what_is_written_is_read_back(system: str, stops: list[str], licence: str) -> None:
    """Or it is refused; nothing changes on the way."""
    said = Modelfile("x", system=system, parameters={"stop": tuple(stops)}, licences=(licence,))
    try:
        text = modelfile_text(said)
    except ModelfileError:
        lost = any(
            unicodedata.category(one) in ("Cf", "Zs", "Cc") and one not in " \t\n\r" for one in repr(said)
        )
        assert lost or '"' in system + licence + "".join(stops) or "\\u" in repr(said) or "\\x" in repr(said)
        return
    assert parse_modelfile(text) == said


def told(template: str, stops: list[str], context: int) -> HandOver:
    return hand_over(ChatTemplate(template), add_bos=True, stops=stops, context_tokens=context)


def test_chatml_gets_both(tmp_path: Path) -> None:
    """P1, P2, P3, pitfall 54: every stop is written, the context too (silent wrongs 4 and 14)."""
    facts = write_modelfiles(tmp_path, file="yoda.gguf", handed=told(CHATML, ["<|im_end|>", "</s>"], 512))
    files = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert files.keys() == {"Modelfile", "Modelfile.jinja"}
    assert files["Modelfile.jinja"] == f"REQUIRES 0.30\nFROM ./yoda.gguf\n{PARAMETERS}"
    head, _, rest = files["Modelfile"].partition('TEMPLATE """')
    go, closing, parameters = rest.partition('"""\n')
    assert (head, closing, parameters) == ("FROM ./yoda.gguf\n", '"""\n', PARAMETERS)
    assert go.startswith("{{") and go.endswith("}}")
    assert (facts.modelfile, facts.reason) == ("Modelfile", None)
    assert facts.stops == ("<|im_end|>", "</s>")
    assert facts.not_claimed[:2] == ("tools", "thinking")


def test_a_template_that_go_cannot_say(tmp_path: Path) -> None:
    """It is told why; the other file is written all the same."""
    upside_down = "{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}"
    facts = write_modelfiles(tmp_path, file="yoda.gguf", handed=told(upside_down, ["<|im_end|>"], 64))
    assert {path.name for path in tmp_path.iterdir()} == {"Modelfile.jinja"}
    assert facts.modelfile is None
    assert facts.status == "refused"
    assert facts.reason


def test_sampling_and_licence_are_the_bases(tmp_path: Path) -> None:
    """A11, silent wrong 15: generation_config.json's values where it samples, else none."""
    config = tmp_path / "generation_config.json"
    assert sampling_of(tmp_path) == {}
    config.write_text('{"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "top_k": 20}')
    assert sampling_of(tmp_path) == {}
    change_json(config, do_sample=True)
    assert sampling_of(tmp_path) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repeat_penalty": 1.05}
    (tmp_path / "LICENSE").write_text("Permission is granted.\nTo all.\n")
    given = replace(
        told(CHATML, ["<|im_end|>"], 64), sampling=sampling_of(tmp_path), licences=licences_of(tmp_path)
    )
    (tmp_path / "out").mkdir()
    facts = write_modelfiles(tmp_path / "out", file="m.gguf", handed=given)
    text = (tmp_path / "out" / "Modelfile.jinja").read_text()
    assert text.endswith(
        "PARAMETER temperature 0.7\nPARAMETER top_p 0.8\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.05\n"
        'LICENSE """Permission is granted.\nTo all."""\n'
    )
    assert facts.left_out == LeftOut()
    hard = replace(given, licences=("a\u00a0b",))
    assert write_modelfiles(tmp_path / "out", file="m.gguf", handed=hard).left_out.licences == ("a\u00a0b",)


@pytest.mark.parametrize(
    ("source", "wins"),
    [
        ("{{ messages }}", False),
        ("{% if enable_thinking %}<think>{% endif %}", False),
        ("<think></think>", True),
        ("{# tools #}", True),
        ("{% if message.tool_calls %}", True),
        ("{{ content.split('</think>')[-1] }}", True),
        ("{{ content.split('</think>')[-1] }}{{ reasoning_content }}", False),
    ],
)
def test_whether_a_servers_rule_prefers_the_jinja(source: str, wins: bool) -> None:
    """As server/images.go of Ollama 0.33 reads it."""
    assert prefers_jinja(source) is wins
