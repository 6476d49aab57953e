"""The loss mask is the answer and its end of turn, for real tokenizers and templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from forge.chat.template import ChatTemplate
from forge.data.conversation import Conversation, Place, Turn
from forge.data.prompt_format import PromptFormat, prompt_format
from forge.data.tokens import IGNORED, Encoded, encode_all
from forge.errors import DataError
from forge.model.tokenizer_files import read_tokenizer
from tests.vocabularies import HUB, write_tokenizer

pytestmark = [pytest.mark.training, pytest.mark.timeout(1500)]

USER = Turn("user", "There is bacon in this sandwich.")
ANSWER = Turn("assistant", "In this sandwich, bacon there is.")
AGAIN = Turn("user", "  Ünïcode, tabs\tand\nlines 123?")
SECOND = Turn("assistant", "Hmm.\n\n1. Yes!\n2. No 🙂")
SYSTEM = Turn("system", "Speak like Yoda.")
ENDS = {
    "home-made": "<|im_end|>", "llama-bpe": "<|eot_id|>", "phi-3": "<|end|>", "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>", "gemma-3": "<end_of_turn>", "llama-3.1": "<|eot_id|>", "llama-2": "</s>",
    "deepseek-v3": "<｜end▁of▁sentence｜>", "gpt-oss": "<|return|>",
}  # fmt: skip
# What the prompt leaves to the answer, and the template's end of it.
AROUND = {
    "qwen3": ("<think>\n\n</think>\n\n", ""), "gpt-oss": ("<|channel|>final<|message|>", ""),
    "llama-2": ("", " "),
}  # fmt: skip
# Their templates write an earlier answer otherwise, so each answer is a row.
ROW_EACH = {"qwen3", "gpt-oss"}
VOCABULARIES = [pytest.param(name, marks=[pytest.mark.slow] if name in HUB else []) for name in ENDS]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")

    class Directories(dict[str, Path]):
        def __missing__(self, vocabulary: str) -> Path:
            write_tokenizer(root / vocabulary, vocabulary)
            return self.setdefault(vocabulary, root / vocabulary)

    return Directories()


@cache
def own_format_of(directory: Path) -> PromptFormat:
    """With the vocabulary's own template; the hub's take a second or two to read."""
    return format_of(directory)


def format_of(directory: Path, template: str | None = None) -> PromptFormat:
    files = read_tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return prompt_format(
        ChatTemplate(template or files.chat_template or "", files.template_tokens), tokenizer
    )


def encode(form: PromptFormat, *turns: Turn, supervise: str = "all") -> Encoded:
    (encoded,) = encode_all([Conversation(turns, Place("rows.jsonl", 1))], form, supervise=supervise)
    return encoded


def supervised_runs(encoded: Encoded) -> list[list[int]]:
    runs: list[list[int]] = []
    before = IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("turns", [[USER, ANSWER], [USER, ANSWER, AGAIN, SECOND], [SYSTEM, AGAIN, SECOND]])
def test_the_mask_is_the_answer_and_its_end(
    vocabulary: str, turns: Sequence[Turn], directories: Mapping[str, Path]
) -> None:
    """F3, F4, F9, F10; pitfalls 16, 27, 28, 46, 50; silent wrong 5: every answer whole, nothing else."""
    form = own_format_of(directories[vocabulary])
    assert form.end_of_turn == ENDS[vocabulary]
    assert form.end_of_turn_id == form.tokenizer.token_to_id(ENDS[vocabulary])
    rows = encode_all([Conversation(tuple(turns), Place("rows.jsonl", 1))], form)
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    assert len(rows) == (len(answers) if vocabulary in ROW_EACH else 1)
    said = [
        form.tokenizer.decode(run, skip_special_tokens=False).strip()
        for row in rows
        for run in supervised_runs(row)
    ]
    before, after = AROUND.get(vocabulary, ("", ""))
    assert said == [f"{before}{answer}{after}{ENDS[vocabulary]}" for answer in answers]
    encoded = rows[-1]
    assert all(
        label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True)
    )
    assert encoded.input_ids[-1] == form.end_of_turn_id
    whole = form.ids(form.template.render([turn.as_message() for turn in turns]))
    assert list(encoded.input_ids) == whole[: len(encoded.input_ids)]
    prompt = form.ids(
        form.template.render([turn.as_message() for turn in turns[:-1]], add_generation_prompt=True)
    )
    assert list(encoded.input_ids[: len(prompt)]) == prompt


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_only_the_last_answer_when_asked(vocabulary: str, directories: Mapping[str, Path]) -> None:
    form = own_format_of(directories[vocabulary])
    encoded = encode(form, USER, ANSWER, AGAIN, SECOND, supervise="last")
    (run,) = supervised_runs(encoded)
    before, after = AROUND.get(vocabulary, ("", ""))
    said = form.tokenizer.decode(run, skip_special_tokens=False).strip()
    assert said == f"{before}{SECOND.content}{after}{ENDS[vocabulary]}"
    assert encoded.supervised == len(run)


# What begins a prompt, where something does.
BEGINNINGS = {
    "llama-bpe": 128000, "gemma-3": 2, "llama-3.1": 128000, "llama-2": 1, "deepseek-v3": 0,
}  # fmt: skip


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_are_those_of_transformers(vocabulary: str, directories: Mapping[str, Path]) -> None:
    """One BOS from the template, none from the tokenizer (pitfall 48), which by itself may add one."""
    import transformers

    directory = directories[vocabulary]
    # Of `AutoTokenizer` Llama's class takes no more than the vocabulary from tokenizer.json.
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    messages = [turn.as_message() for turn in (SYSTEM, USER, ANSWER)]
    form = own_format_of(directory)
    template = form.template.pinned_source()
    expected = reference.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
    encoded = encode(form, SYSTEM, USER, ANSWER)
    assert list(encoded.input_ids) == expected[: len(encoded.input_ids)]
    if beginning := BEGINNINGS.get(vocabulary):
        assert list(encoded.input_ids).count(beginning) == 1
        assert reference("x")["input_ids"][0] == beginning


def refusal(form: PromptFormat, *turns: Turn) -> str:
    with pytest.raises(DataError, match="1 of 1 rows cannot be encoded") as caught:
        encode(form, *turns)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == ("rows.jsonl", 1)
    return problem.message


CHATML_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGING = CHATML_TURNS.replace("{{ m.content }}", "{{ ' ' + m.content }}").replace(
    "assistant\n{%", "assistant\n{{ ' ' }}{%"
)


@pytest.mark.parametrize("vocabulary", VOCABULARIES[:2] + VOCABULARIES[3:5])
def test_an_answer_that_merges_with_its_prompt(vocabulary: str, directories: Mapping[str, Path]) -> None:
    """Pitfall 50: in two pieces, as a server has them, and each answer after the prompt that it is sent."""
    template = MERGING.replace("<|im_end|>", ENDS[vocabulary])
    form = format_of(directories[vocabulary], template)
    turns = [Turn("user", "a"), Turn("assistant", "The dog"), Turn("user", "b"), Turn("assistant", "The cat")]
    rows = encode_all([Conversation(tuple(turns), Place("rows.jsonl", 1))], form)
    for row, length in zip(rows, (1, 3), strict=True):
        messages = [turn.as_message() for turn in turns[:length]]
        prompt = form.ids(form.template.render(messages, add_generation_prompt=True))
        answer = form.ids(f"{turns[length].content}{ENDS[vocabulary]}")
        assert list(row.input_ids) == prompt + answer
        assert list(row.labels) == [IGNORED] * len(prompt) + answer
        assert "encoded in two pieces" in row.notes[-1]


BROKEN: Mapping[str, tuple[str, str]] = {
    "the prompt is written otherwise": (
        CHATML_TURNS.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant:{%"),
        "the prompt is not a prefix of the conversation: the template begins an answer otherwise than "
        "its generation prompt",
    ),
    "a message is dropped": (
        CHATML_TURNS.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"),
        "message 0 (user) is dropped or changed by the template",
    ),
    "an answer is changed": (
        CHATML_TURNS.replace("{{ m.content }}", "{{ m.content | replace('dog', 'cat') }}"),
        "message 1 (assistant) is dropped or changed by the template",
    ),
    "BOS twice": (
        "<|pad|><|pad|>" + CHATML_TURNS,
        "the row begins with BOS twice: the template writes one that is there already",
    ),
    "it refuses": (
        "{% if messages[0].content[:5] == 'There' %}{{ raise_exception('no bacon') }}{% endif %}"
        + CHATML_TURNS,
        "the chat template refuses the conversation: no bacon",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_of_a_template(fault: str, directories: Mapping[str, Path]) -> None:
    """Pitfalls 48, 50 and 51, each with the row."""
    template, message = BROKEN[fault]
    form = format_of(directories["home-made"], template)
    form = PromptFormat(
        ChatTemplate(template, {"bos_token": "<|pad|>"}),
        form.tokenizer,
        form.end_of_turn,
        form.end_of_turn_id,
    )
    answer = Turn("assistant", "The red dog")
    assert refusal(form, USER, answer) == message


def test_control_tokens_that_end_or_part_turns(directories: Mapping[str, Path]) -> None:
    """Servers stop at the one, and read the other as the token that it is, wherever it stands in a prompt."""
    form = format_of(directories["qwen2"])
    number = form.tokenizer.token_to_id("<|endoftext|>")
    assert number is not None
    form = replace(form, eos_ids=[number])
    assert refusal(form, USER, Turn("assistant", "a<|endoftext|>")) == (
        "the answer contains <|endoftext|>, which ends a turn"
    )
    form = format_of(directories["home-made"])
    message = refusal(form, USER, Turn("assistant", "a<|im_end|>b"))
    assert message == "the answer contains <|im_end|>, which ends a turn"
    message = refusal(form, Turn("user", "What is <|im_end|> for?"), ANSWER)
    assert message.startswith("message 0 (user) holds <|im_end|>, which the chat template uses")
    message = refusal(form, SYSTEM, Turn("user", "<|im_start|>user\nHi<|im_end|>"), ANSWER)
    assert message == "message 1 (user) begins with <|im_start|>: it is written in a chat template already"


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_control_tokens_as_words(supervise: str, directories: Mapping[str, Path]) -> None:
    """In a prompt as servers read them, in the answer as the text that a model can generate (D10)."""
    form = format_of(directories["qwen2"])
    form.tokenizer.add_special_tokens(["<|fim_middle|>"])
    turns = [Turn("user", "Fill <|fim_middle|>?"), Turn("assistant", "Yes, <|fim_middle|>."), AGAIN, SECOND]
    rows = encode_all([Conversation(tuple(turns), Place("rows.jsonl", 1))], form, supervise=supervise)
    token = form.tokenizer.token_to_id("<|fim_middle|>")
    assert token is not None
    for row, length in zip(rows, (1, 3)[-len(rows) :], strict=True):
        messages = [turn.as_message() for turn in turns[:length]]
        prompt = form.ids(form.template.render(messages, add_generation_prompt=True))
        assert list(row.input_ids[: len(prompt)]) == prompt
        assert prompt.count(token) == (length + 1) // 2
        answer = [label for label in row.labels if label != IGNORED]
        assert list(row.input_ids[len(prompt) :]) == answer
        assert (
            form.tokenizer.decode(answer, skip_special_tokens=False) == turns[length].content + "<|im_end|>"
        )
        assert token not in answer
        assert any("in their prompt" in note for note in row.notes)
    assert len(rows) == (2 if supervise == "all" else 1)


@pytest.mark.parametrize(
    ("text", "tokens", "note"),
    [
        ("What <|im_start|> is<|im_end|>", 1, "as words"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n", 5, "already"),
        ("A text.<|im_end|>", 1, ""),
        ("[INST] Hi [/INST] Yes", 1, "another chat template"),
        ("### Instruction:\nHi\n\n### Response:\nYes", 1, "another chat template"),
        ("USER: Hi ASSISTANT: Yes", 1, "another chat template"),
    ],
)
def test_control_tokens_of_a_text(text: str, tokens: int, note: str, directories: Mapping[str, Path]) -> None:
    """What is rendered already is recognised; words are words; EOS at the end is EOS."""
    form = format_of(directories["qwen2"])
    (row,) = encode_all([Conversation((), Place("rows.jsonl", 1), text=text)], form)
    assert sum(token in form.control for token in row.input_ids) == tokens
    assert len(row.notes) == bool(note)
    assert all(note in text for text in row.notes)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "would not learn to stop"),
        ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "does not show the assistant's answer"),
    ],
)
def test_a_template_without_end_of_turn(template: str, message: str, directories: Mapping[str, Path]) -> None:
    """Pitfall 28, as in an Alpaca template without EOS."""
    with pytest.raises(DataError, match=message):
        format_of(directories["home-made"], template)


def test_every_row_is_told_at_once(directories: Mapping[str, Path]) -> None:
    form = format_of(directories["home-made"])
    bad = Turn("assistant", "<|im_end|>")
    rows = [
        Conversation((USER, bad if number % 2 else ANSWER), Place("rows.jsonl", number))
        for number in range(6)
    ]
    with pytest.raises(DataError, match="3 of 6 rows cannot be encoded") as caught:
        encode_all(rows, form)
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.jsonl:1: the answer contains <|im_end|>, which ends a turn (3 times; also 3, 5)"
    ]
