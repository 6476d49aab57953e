"""Tools and thinking: each answer is learned after what serving sends, or its row is refused by name.

Templates are those of the models, as trl carries them; the tokenizer is home-made, with their special tokens.
Inputs that people reported in public are in `cases/data`. Not covered: the models' own vocabularies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from forge.chat.template import ChatTemplate
from forge.data.account import Prepared
from forge.data.prepare import TRAIN_FILE, Settings, prepare
from forge.data.prompt_format import PromptFormat, prompt_format
from forge.data.reading import Source
from forge.data.tokens import IGNORED
from forge.errors import DataError
from tests.makers.tokenizer import CHATML
from tests.vocabularies import home_made_tokenizer, trl_template

pytestmark = pytest.mark.training
CASES = Path(__file__).parent / "cases" / "data"
R1, GPT_OSS, QWEN3, QWEN35 = "deepseek_r1_distill", "gptoss", "qwen3", "qwen3_5_think"
EOS = {R1: "<｜end▁of▁sentence｜>", GPT_OSS: "<|return|>"}
_SPECIAL = re.compile(r"<[|｜][^|｜\s'\"]+[|｜]>")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
THOUGHT = "<think>\nhmm\n</think>\n\nYes."


def form_of(name: str, **variables: Any) -> PromptFormat:
    source = CHATML if name == "chatml" else trl_template(name)
    tokenizer = Tokenizer.from_str(json.dumps(home_made_tokenizer()))
    special = {*_SPECIAL.findall(source), "<think>", "</think>", EOS.get(name, "<|im_end|>")}
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in sorted(special)])
    return prompt_format(ChatTemplate(source, {"bos_token": ""}, variables), tokenizer)


Shown = tuple[Prepared, list[str], list[dict[str, Any]]]


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Shown]:
    """The facts, each row's text with what is learned in brackets, and the rows."""

    def prepared(form: PromptFormat, rows: Path | Sequence[Mapping[str, Any]], **settings: Any) -> Shown:
        if not isinstance(rows, Path):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            rows = tmp_path / "rows.jsonl"
            rows.write_text(lines, encoding="utf-8")
        facts = prepare(Settings([Source((rows,))], 0, **settings), form, None, tmp_path)
        made = [json.loads(line) for line in (tmp_path / TRAIN_FILE).read_text().splitlines()]
        return facts, [masked(row, form) for row in made], made

    return prepared


def masked(row: Mapping[str, Any], form: PromptFormat) -> str:
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    pieces = ""
    for learned, run in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [number for number, label in run if label in (IGNORED, number)]
        pieces += f"⟦{text(ids, form)}⟧" if learned else text(ids, form)
    return pieces


def text(ids: Sequence[int], form: PromptFormat) -> str:
    decoded: str = form.tokenizer.decode(list(ids), skip_special_tokens=False)
    return decoded


def chat(*contents: str | Mapping[str, Any]) -> dict[str, Any]:
    """Texts are the user's and the assistant's in turn; a mapping is a message."""
    return {
        "messages": [
            dict(one) if isinstance(one, Mapping) else {"role": ("user", "assistant")[at % 2], "content": one}
            for at, one in enumerate(contents)
        ]
    }


def test_a_row_s_own_variables(prepared: Callable[..., Shown]) -> None:
    """Pitfall 17: learned where they write the prompt that serving sends, refused with the setting else."""
    off = {**chat("Hi", "Hello."), "chat_template_kwargs": {"enable_thinking": False, "tools_in": None}}
    on = {
        **chat("Hi", "<think>\nhm\n</think>\n\nHello."),
        "chat_template_kwargs": '{"enable_thinking": true}',
    }
    facts, (shown,), _ = prepared(form_of(QWEN3, enable_thinking=False), [off])
    assert "<think>\n\n</think>" in shown
    assert facts.notes["have variables of the chat template, which write what the model is served with"] == 1
    assert facts.unused == {}
    prepared(form_of(QWEN3), [on])
    error = refused(prepared, form_of(QWEN3), on, off)
    assert error.problems[0].line == 2
    assert error.problems[0].message == (
        "chat_template_kwargs (enable_thinking: false) prompts otherwise than the model is served"
    )
    assert error.hint.startswith("train.template_variables: {enable_thinking: false} trains and serves")
    assert "data.ignore: [chat_template_kwargs]" in error.hint
    alone = {**chat("Hi", "Hello."), "enable_thinking": False}
    refused(prepared, form_of(QWEN3), alone)
    prepared(form_of("chatml"), [alone])  # its template has no thinking to switch
    words = {**chat("Hi", "Hello."), "chat_template_kwargs": {"custom_instructions": "Be kind."}}
    error = refused(prepared, form_of(QWEN3), words)
    assert error.problems[0].message == (
        "chat_template_kwargs has custom_instructions, which the chat template does not read"
    )


def test_two_answers_in_a_row(prepared: Callable[..., Shown]) -> None:
    """Pitfall 50: the template does not begin the second one as it prompts for it."""
    error = refused(prepared, form_of(QWEN3), chat("Hi", "Hello.", {"role": "assistant", "content": "Yes?"}))
    assert error.problems[0].message == (
        "message 2 (assistant) follows another answer: no server is asked for a second"
    )
    assert error.hint.startswith("join the answers, or leave these rows out")


def refused(prepared: Callable[..., Shown], form: PromptFormat, *rows: Mapping[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        prepared(form, rows)
    assert caught.value.code == 2
    assert len(caught.value.problems) == 1
    return caught.value


def test_thinking_inside_the_answer(prepared: Callable[..., Shown]) -> None:
    """hiyouga/LlamaFactory 9092, modelscope/ms-swift 4939: as the template writes it."""
    facts, shown, _ = prepared(form_of(QWEN3), CASES / "qwen3_think_inline" / "d.jsonl")
    assert facts.rows == 20
    assert shown[0] == (
        "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhmm 0\n</think>\n\na 0<|im_end|>⟧"
    )


def test_the_last_answer_with_its_thinking(prepared: Callable[..., Shown]) -> None:
    """ms-swift 4939, 9829, OpenRLHF 1080, LlamaFactory 8634: earlier thinking is left out, as when served."""
    facts, shown, _ = prepared(
        form_of(QWEN3), CASES / "qwen3_think_multiturn_last" / "d.jsonl", supervise="last"
    )
    assert shown[0] == (
        "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na 0<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhmm 0\n</think>\n\nb 0<|im_end|>⟧"
    )
    assert list(facts.notes.values()) == [20]
    assert "leaves out the thinking of earlier answers" in next(iter(facts.notes))


def test_thinking_after_a_tag_that_the_prompt_opens(prepared: Callable[..., Shown]) -> None:
    """trl 2919 and PR 6766, LlamaFactory 6987, 7027, ms-swift 3996."""
    _, shown, _ = prepared(form_of(R1), CASES / "r1_distill" / "d.jsonl")
    assert shown[0] == "<｜User｜>q0<｜Assistant｜><think>\n⟦hmm 0\n</think>\n\na 0<｜end▁of▁sentence｜>⟧"


def test_a_template_that_ends_earlier_turns_otherwise(prepared: Callable[..., Shown]) -> None:
    """gpt-oss ends the last answer with <|return|>, earlier ones with <|end|>: a row for each answer."""
    facts, shown, rows = prepared(form_of(GPT_OSS), CASES / "gpt_oss_several_turns" / "d.jsonl")
    assert facts.rows == 40
    assert {name.partition(":")[0]: number for name, number in facts.notes.items()} == {
        "made of the answers of rows with several": 40
    }
    assert shown[0].endswith("<|start|>assistant⟦<|channel|>final<|message|>a 0<|return|>⟧")
    assert shown[1].endswith(
        "final<|message|>a 0<|end|><|start|>user<|message|>more<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>b 0<|return|>⟧"
    )
    assert [row.get("answers", 1) for row in rows[:2]] == [1, 1]


def test_tools_that_the_template_has_no_place_for(prepared: Callable[..., Shown]) -> None:
    """hiyouga/LlamaFactory 4187, 4152: tools reach the prompt, or the rows are refused."""
    source = CASES / "tools_column" / "d.jsonl"
    with pytest.raises(DataError, match="20 of 20 rows") as caught:
        prepared(form_of("chatml"), source)
    assert "has tools, and the chat template has no place for them (20 times" in str(caught.value.problems[0])
    _, shown, rows = prepared(form_of(QWEN3), source)
    assert "# Tools" in shown[0]
    assert json.dumps(TOOL) in shown[0]
    assert rows[0]["tools"] == [TOOL]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_each_answer_has_the_prompt_of_serving(
    variables: Mapping[str, Any], prepared: Callable[..., Shown]
) -> None:
    """Qwen3 with `supervise: all`: the ids of every prompt are those that a server is sent."""
    form = form_of(QWEN3, **variables)
    answers = ("Yes.", "No.", "Hmm.") if variables else (THOUGHT, "No.", THOUGHT)
    messages = chat("a", answers[0], "b", answers[1], "c", answers[2])["messages"]
    _, shown, rows = prepared(form, [{"messages": messages}])
    assert len(rows) == 3
    for number, row in enumerate(rows):
        before = messages[: 2 * number + 1]
        prompt = form.ids(form.template.render(before, add_generation_prompt=True))
        assert row["input_ids"][: len(prompt)] == prompt
        assert all(label == IGNORED for label in row["labels"][: len(prompt)])
        assert row["labels"][len(prompt)] != IGNORED
        assert row["messages"] == messages[: 2 * number + 2]
        assert shown[number].count("<think>") == 1


def test_one_row_where_earlier_turns_stay_as_they_are(prepared: Callable[..., Shown]) -> None:
    _, shown, _ = prepared(form_of("chatml"), [chat("a", "Yes.", "b", "No.")])
    assert [re.findall("⟦.*?⟧", one) for one in shown] == [["⟦Yes.<|im_end|>⟧", "⟦No.<|im_end|>⟧"]]


def call(**arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}],
    }


ASKED = ("How is it?", call(city="Rome"), {"role": "tool", "content": '{"degrees": 22}'}, "It is 22.")
WITH_TOOLS = {**chat(*ASKED), "tools": [TOOL]}
WITH_TOOLS["messages"][3]["role"] = "assistant"


def test_calls_and_what_tools_answer(prepared: Callable[..., Shown]) -> None:
    """The call is learned, what the tool answers is not."""
    _, shown, _ = prepared(form_of(QWEN3), [WITH_TOOLS])
    learned = [one.partition("⟦")[2] for one in shown]
    assert learned == [
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>⟧",
        "<think>\n\n</think>\n\nIt is 22.<|im_end|>⟧",
    ]
    assert '<tool_response>\n{"degrees": 22}\n</tool_response>' in shown[1]


def test_calls_after_an_empty_thinking(prepared: Callable[..., Shown]) -> None:
    """Qwen3.5 writes a call as XML, here without thinking: one row, whose earlier turns stay as they are."""
    _, (shown,), _ = prepared(form_of(QWEN35, enable_thinking=False), [WITH_TOOLS])
    assert re.findall("⟦.*?⟧", shown, re.DOTALL) == [
        "⟦<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>⟧",
        "⟦It is 22.<|im_end|>⟧",
    ]


def test_thinking_of_gpt_oss(prepared: Callable[..., Shown]) -> None:
    """Its template reads `thinking`: a channel before the final one."""
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "hmm"}
    _, (shown,), rows = prepared(form_of(GPT_OSS), [chat("Is it?", answer)])
    assert shown.endswith(
        "<|start|>assistant⟦<|channel|>analysis<|message|>hmm<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>⟧"
    )
    assert rows[0]["messages"][1] == answer


@pytest.mark.parametrize(
    "answer",
    [THOUGHT, {"role": "assistant", "content": "Yes.", "reasoning_content": "hmm"}, "hmm</think>Yes."],
)
@pytest.mark.parametrize("name", [R1, QWEN35])
def test_the_tag_is_there_once(
    name: str, answer: str | Mapping[str, Any], prepared: Callable[..., Shown]
) -> None:
    _, shown, _ = prepared(form_of(name), [chat("Is it?", answer)])
    prompt, _, learned = shown[0].partition("⟦")
    assert prompt.endswith("<think>\n")
    assert "<think>" not in learned
    assert re.fullmatch(r"hmm\n?</think>\s*Yes\.<.*>⟧", learned)


OPENED = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
OPENS_ALWAYS = OPENED.replace(
    "+ '\\n' + message", "+ '\\n' + ('<think>\\n' if message.role == 'assistant' else '') + message"
)


@pytest.mark.parametrize("source", [OPENED, OPENS_ALWAYS])
@pytest.mark.parametrize("answer", [THOUGHT, "<think>hmm</think>Yes."])
def test_a_template_that_would_double_the_tag(
    source: str, answer: str, prepared: Callable[..., Shown]
) -> None:
    form = prompt_format(ChatTemplate(source, {}), form_of(QWEN3).tokenizer)
    _, (shown,), _ = prepared(form, [chat("Is it?", answer)])
    assert shown.count("<think>") == 1
    assert re.search(r"<think>\n⟦hmm\n?</think>\s*Yes\.<\|im_end\|>⟧", shown)


NO_CALL = {"role": "assistant", "content": "", "tool_calls": call(city="Rome")["tool_calls"]}


@pytest.mark.parametrize(
    ("name", "answer", "message", "hint"),
    [
        (R1, "Yes.", "has no thinking, and the template's prompt opens <think>", "begin these answers with"),
        (R1, "a <think>hmm</think> Yes.", "holds <think> again", "one <think>...</think>"),
        (QWEN35, NO_CALL | {"content": "<think>a<think>b</think>"}, "thinking is dropped", "take it out"),
        ("chatml", NO_CALL, "calls a tool, and the template drops or changes the call", "takes tool_calls"),
        (
            "chatml",
            {"role": "assistant", "content": "Yes.", "reasoning_content": "hmm"},
            "its thinking is dropped",
            "shows the thinking",
        ),
        (GPT_OSS, NO_CALL, "<|call|>', not with <|return|>: a server would not stop there", "leave these"),
    ],
)
def test_what_a_template_cannot_show(
    name: str, answer: str | Mapping[str, Any], message: str, hint: str, prepared: Callable[..., Shown]
) -> None:
    error = refused(prepared, form_of(name), chat("Is it?", answer))
    assert message in error.problems[0].message
    assert hint in error.hint


def test_arguments_that_are_not_json(prepared: Callable[..., Shown]) -> None:
    calls = (
        "{% for c in message.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}"
    )
    source = CHATML.replace(" + '<|im_end|>' + '\\n'}}", "}}" + calls + "{{ '<|im_end|>\\n' }}")
    form = prompt_format(ChatTemplate(source, {}), form_of("chatml").tokenizer)
    error = refused(prepared, form, chat("Is it?", NO_CALL))
    assert "arguments as Python has them" in error.problems[0].message


def test_a_tool_turn_that_the_template_drops(prepared: Callable[..., Shown]) -> None:
    """`22` stands in the answer too, which does not make up for it."""
    dropped = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages if m.role != 'tool' %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    form = prompt_format(ChatTemplate(dropped, {}), form_of("chatml").tokenizer)
    row = json.loads(json.dumps(WITH_TOOLS))
    row["messages"][2]["content"] = "22"
    assert "is dropped" in refused(prepared, form, row).problems[0].message
