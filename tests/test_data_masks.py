"""The masks of rows against trl's own, on every training template that trl ships.

trl marks an answer in its templates; forge learns what follows the prompt of serving, up to the end of turn.
So the two are equal but for what no server lets a model generate: what the prompt has begun already (an empty
thinking), and what the template writes after the end of turn. The tokenizer is home-made, with the special
tokens of the templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from forge.chat.template import ChatTemplate
from forge.data.conversation import Conversation, Place, Turn
from forge.data.prompt_format import PromptFormat, prompt_format
from forge.data.tokens import IGNORED, Encoded, encode_all
from forge.errors import DataError
from forge.model.tokenizer_files import read_tokenizer
from tests.vocabularies import home_made_tokenizer, trl_template, trl_templates, write_tokenizer

pytestmark = [pytest.mark.training, pytest.mark.timeout(600)]

NAMES = sorted(path.stem for path in trl_templates().glob("*_training.jinja"))
# Their templates take content as a list of parts and no text: those of vision models.
OF_PARTS = {"idefics3_training", "llava_next_training", "smolvlm_training"}
EOS = {
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
}
# They leave out the thinking of every answer, so trl would train what no server prompts for.
CUT_THINKING = {"deepseek_r1_distill_training", "deepseekv3_training"}
# Each family's template once more, with its own vocabulary.
OWN = {
    "qwen3_training": "qwen3", "gemma3_training": "gemma-3", "llama3_training": "llama-3.1",
    "deepseekv3_training": "deepseek-v3", "gptoss_training": "gpt-oss",
}  # fmt: skip
_SPECIAL = re.compile(r"<[|｜][^|｜\s'\"]+[|｜]>|</?[a-z_]+>|\[/?[A-Z_]+\]|<turn\|>|<\|turn>")
USER, AGAIN = Turn("user", "Is it?"), Turn("user", "And now?")
FIRST, SECOND = "It is.", "No, it\nis not."
CONVERSATIONS = {
    "one": (USER, Turn("assistant", SECOND)),
    "several": (USER, Turn("assistant", FIRST), AGAIN, Turn("assistant", SECOND)),
    "system": (Turn("system", "Be short."), USER, Turn("assistant", FIRST), AGAIN, Turn("assistant", SECOND)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def directory(vocabulary: str) -> Path:
        made = tmp_path_factory.mktemp(vocabulary)
        write_tokenizer(made, vocabulary)
        return made

    return directory


@cache
def form_of(name: str, directory: Path | None = None) -> PromptFormat:
    """`name`'s template over the vocabulary in `directory`, or over a home-made one."""
    source = trl_template(name)
    if directory is None:
        tokenizer = Tokenizer.from_str(json.dumps(home_made_tokenizer()))
        special = {*_SPECIAL.findall(source), "</s>", "<bos>"}
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in sorted(special)])
        tokens = {"bos_token": "<bos>", "eos_token": EOS.get(name.removesuffix("_training"), "</s>")}
    else:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokens = read_tokenizer(directory).template_tokens
    return prompt_format(ChatTemplate(source, tokens, {"today": date.today().isoformat()}), tokenizer)


def spoken(turns: Sequence[Turn], form: PromptFormat) -> tuple[Turn, ...]:
    """The turns, with thinking where the template's prompt opens it."""
    prompt = form.template.render([USER.as_message()], add_generation_prompt=True)
    if not prompt.rstrip().endswith("<think>"):
        return tuple(turns)
    return tuple(
        Turn("assistant", f"<think>\nhmm\n</think>\n\n{turn.content}") if turn.role == "assistant" else turn
        for turn in turns
    )


def reference(form: PromptFormat) -> Any:
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=form.tokenizer, chat_template=form.template.source, **form.template.special_tokens
    )


def encode(turns: Sequence[Turn], form: PromptFormat, supervise: str = "all") -> list[Encoded]:
    return encode_all([Conversation(tuple(turns), Place("rows.jsonl", 1))], form, supervise=supervise)


def learned(row: Encoded) -> list[bool]:
    return [label != IGNORED for label in row.labels]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [
        *((name, "") for name in NAMES if name not in OF_PARTS),
        *(pytest.param(name, own, marks=pytest.mark.slow) for name, own in OWN.items()),
    ],
)
def test_masks_are_those_of_trl(
    name: str, vocabulary: str, kind: str, directories: Callable[[str], Path]
) -> None:
    """F1, F3, F4, F7, F9; per turn, assistant-only, completion-only."""
    from trl.data_utils import common_prefix_length
    from trl.trainer.sft_trainer import _tokenize

    form = form_of(name, directories(vocabulary) if vocabulary else None)
    turns, tokenizer = spoken(CONVERSATIONS[kind], form), reference(form)
    if name == "gemma_training" and kind == "system":
        with pytest.raises(DataError, match="1 of 1 rows cannot be encoded") as caught:
            encode(turns, form)
        assert "System role not supported" in caught.value.problems[0].message
        return
    messages = [turn.as_message() for turn in turns]
    prompts = {
        at: _tokenize(tokenizer, messages[:at], add_generation_prompt=True)["input_ids"]
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    for row in encode(turns, form):
        answers = [at for at, turn in enumerate(row.conversation.turns) if turn.role == "assistant"]
        own = [at for at in answers if row.conversation.turns[at].trained is not False]
        text = _tokenize(
            tokenizer, messages[: len(row.conversation.turns)], return_assistant_tokens_mask=True
        )
        ids, marks = list(row.input_ids), text["assistant_masks"]
        expected = [False] * len(ids)
        for at in own:
            start = len(prompts[at])
            end = ids.index(form.end_of_turn_id, start) + 1
            expected[start:end] = [True] * (end - start)
            assert ids[:start] == prompts[at]
        assert learned(row) == expected
        if name in CUT_THINKING:
            continue
        # Completion-only: trl's completion begins where ours does, and goes on to the end of its text.
        assert ids == text["input_ids"][: len(ids)]
        assert all(common_prefix_length(prompts[at], ids) == len(prompts[at]) for at in own)
        # Assistant-only: trl marks all that is learned, and else what a prompt begins or nobody reads.
        begun = {number for at in answers for number in range(_opening(prompts[at], form), len(prompts[at]))}
        after = {number for number in range(1, len(ids)) if ids[number - 1] == form.end_of_turn_id}
        for number, mark in enumerate(marks[: len(ids)]):
            assert mark or not expected[number]
            assert not mark or expected[number] or number in begun | after or len(own) < len(answers)
    # Per turn: only the last answer.
    (last,) = encode(turns, form, supervise="last")
    start = len(prompts[len(messages) - 1])
    assert learned(last) == [number >= start for number in range(len(last.input_ids))]


def _opening(prompt: Sequence[int], form: PromptFormat) -> int:
    """Where a prompt begins the answer: at its last special token but those of thinking."""
    special = form.tokenizer.get_added_tokens_decoder()
    opens = [at for at, number in enumerate(prompt) if number in special]
    while "think" in special[prompt[opens[-1]]].content:
        opens.pop()
    return opens[-1]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_PARTS])
def test_whole_texts_are_those_of_trl(name: str) -> None:
    """F2: `format: text` is every token of the text and the EOS, as trl's language modelling has it."""
    from trl.trainer.sft_trainer import _tokenize

    form = form_of(name)
    tokenizer = reference(form)
    (row,) = encode_all([Conversation((), Place("a", 1), text="In this sandwich,\nbacon there is.")], form)
    text = "In this sandwich,\nbacon there is." + form.template.special_tokens["eos_token"]
    assert list(row.input_ids) == list(row.labels) == _tokenize(tokenizer, text)["input_ids"]


@pytest.mark.parametrize("name", sorted(OF_PARTS))
def test_templates_of_vision_models_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        form_of(name)
