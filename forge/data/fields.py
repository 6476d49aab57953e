"""Every key of a row and of a message that forge knows: what it is for, or why it is refused.

A key in neither table plays no part and is listed as unused in the pre-flight. Names are compared
without case, spaces, `_` and `-`. Not covered: what a value must look like (`conversations`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
SYSTEM, INPUT, HISTORY, TOOLS = "system", "input", "history", "tools"
CHOSEN, REJECTED, REASONING, TEXT, TRAINED = "chosen", "rejected", "reasoning", "text", "trained"
WEIGHT, LABEL, MASKED, CALLS, VARIABLES = "weight", "label", "masked", "calls", "variables"
ENABLE_THINKING = "enable_thinking"


@functools.lru_cache(4096)
def plain(name: str) -> str:
    """A name as it is compared."""
    return "".join(letter for letter in name.lower() if letter not in " _-.")


def _names(words: str) -> tuple[str, ...]:
    return tuple(plain(word) for word in words.split())


# The part that a column plays -> its usual names, the most telling first.
ROW_FIELDS: Mapping[str, tuple[str, ...]] = {
    MESSAGES: _names("messages conversations conversation dialogue dialog chat turns contents"),
    PROMPT: _names(
        "prompt instruction instructions question query request problem user human message input_text"
    ),
    COMPLETION: _names(
        "completion response answer output reply assistant bot gpt target targets solution ground_truth "
        "generated_solution canonical_solution ideal output_text generation outputs expected expected_output"
    ),
    CALLS: _names("tool_calls function_calls answers"),
    INPUT: _names("input inputs context"),
    SYSTEM: _names("system system_prompt system_message system_instruction preamble"),
    HISTORY: _names("history chat_history"),
    TOOLS: _names("tools functions available_tools available_functions tool_definitions tool_config"),
    CHOSEN: _names("chosen preferred preferred_output chosen_response preferred_response"),
    REJECTED: _names("rejected dispreferred non_preferred_output rejected_response"),
    REASONING: _names(
        "reasoning_content reasoning thinking thinking_content thought thoughts think "
        "chain_of_thought complex_cot cot"
    ),
    TEXT: _names("text content document"),
    TRAINED: _names("train training trainable"),
    WEIGHT: _names("weight"),
    LABEL: _names("label kto_tag"),
    VARIABLES: _names(f"chat_template_kwargs {ENABLE_THINKING}"),
}  # fmt: skip
# What would change the prompt or the loss and is not supported: refused where it holds something.
ROW_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(_names("images image videos video audios audio"), "only text can be learned here"),
    **dict.fromkeys(
        _names("input_ids labels attention_mask token_ids tokens loss_mask completion_mask"),
        "the row is tokenized already; give its text or its messages",
    ),
    **dict.fromkeys(_names("train_on_input train_on_inputs train_on_prompt"), "prompts carry no loss here"),
    **dict.fromkeys(_names("chat_template"), "the template is the base's, the same for every row"),
    **dict.fromkeys(
        _names("roles_to_train train_on_eos train_on_eot"),
        "which turns carry loss is the same for every row; set train.supervise",
    ),
    **dict.fromkeys(_names("documents"), "documents beside a conversation are not shown to the model"),
    **dict.fromkeys(
        _names("speakers roles"), "who speaks stands in each turn; data.format: module:function puts it there"
    ),
    **dict.fromkeys(
        _names("segments"), "its texts carry their own template and loss; give the conversation as messages"
    ),
    **dict.fromkeys(_names("suffix"), "text that follows the answer is not shown to the model"),
    **dict.fromkeys(_names("builtin_tools"), "tools that a template knows by name are not given to it here"),
}
# What belongs to a prompt: refused where it plays no part and no turn has its words.
OF_PROMPT = _names(
    "context document passage article paragraph story table schema background persona definition instruction "
    "instructions input inputs history chat_history choices options answer_choices"
)
# What may be the answer to a text beside it: refused where the text would be learned whole without it.
OF_ANSWER = _names(
    "summary highlights abstract headline translation sentiment intent emotion code sql accept"
)

ROLE, CONTENT, NAME, TOOL_CALLS, FUNCTION_CALL, TOOL_CALL_ID, IS_USER = (
    "role", "content", "name", "tool_calls", "function_call", "tool_call_id", "is_user",
)  # fmt: skip
MESSAGE_FIELDS: Mapping[str, tuple[str, ...]] = {
    ROLE: _names("role from speaker sender author"),
    IS_USER: _names("is_user is_human"),
    CONTENT: _names("content value text parts message mes"),
    NAME: _names("name"),
    TOOL_CALLS: _names("tool_calls function_calls"),
    FUNCTION_CALL: _names("function_call tool_call"),
    TOOL_CALL_ID: _names("tool_call_id"),
    REASONING: _names("reasoning_content reasoning thinking thinking_content thought thoughts think"),
    WEIGHT: _names("weight loss_weight loss_scale"),
    TRAINED: _names(
        "train training trainable trained loss learn is_train is_trained is_trainable output_with_loss"
    ),
    MASKED: _names("masked ignore_loss no_loss"),
}
MESSAGE_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(_names("images image videos video audios audio"), "only text can be learned here"),
    **dict.fromkeys(_names("is_system"), "a message that the model was not shown; leave it out"),
    **dict.fromkeys(_names("refusal"), "a refusal beside the content is not shown; put it into content"),
    **dict.fromkeys(
        _names("train_detail training_detail loss_mask mask"), "loss is set for a whole turn (weight: 0)"
    ),
    **dict.fromkeys(
        _names("tools functions"), "tools belong to the whole row: a column of the row beside its messages"
    ),
    **dict.fromkeys(_names("train_on_input train_on_inputs train_on_prompt"), "prompts carry no loss here"),
    **dict.fromkeys(_names("documents"), "documents beside a conversation are not shown to the model"),
}  # fmt: skip
# Keys that say that the end of turn is not learned, where they are false.
MESSAGE_ENDS = _names("need_eos_token add_eos eot end_turn")

# What a chat template writes around a user's words: a prompt that has it is rendered already.
TEMPLATE_MARKS = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<｜User｜>",
    "<extra_id_1>",
)  # fmt: skip

# How Alpaca's prompts begin, which are its template.
ALPACA_MARKS = ("### Instruction:", "Below is an instruction that")

# Who speaks, under the names that people use. `data.roles` adds more.
CALL = "function_call"
"""Stands for an assistant's turn whose content is a call."""
ROLES: Mapping[str, str] = {
    **dict.fromkeys(_names("user human prompter person customer student instruction"), "user"),
    **dict.fromkeys(
        _names("assistant gpt chatgpt bing bard gemini claude model ai bot chatbot agent"),
        "assistant",
    ),
    **dict.fromkeys(_names("system developer"), "system"),
    **dict.fromkeys(
        _names("tool observation function function_response tool_response tool_result ipython environment"),
        "tool",
    ),
    **dict.fromkeys(_names("function_call tool_call"), CALL),
}  # fmt: skip


def role_of(name: str, more: Mapping[str, str]) -> str | None:
    """What `name` stands for: system, user, assistant, tool or `CALL`; None where nothing says."""
    own = {plain(key): role for key, role in more.items()} if more else {}
    return own.get(plain(name)) or ROLES.get(plain(name))


_ON, _OFF = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


def switch(value: object) -> bool | None:
    """What a value says that stands for yes or no, as a word in a table may; None where it is neither."""
    word = str(value).strip().lower() if isinstance(value, (bool, int, float, str)) else ""
    return True if word in _ON else False if word in _OFF else None


_OF_LOSS = re.compile("loss|mask|train|learn|weight|advantage|supervis|^ignored?$|^skip(ped)?$")


@functools.lru_cache(4096)
def _sounds_of_loss(name: str) -> bool:
    if name.lower().startswith("in_") and name.lower().endswith("_train"):  # of which other data it is a part
        return False
    return bool(_OF_LOSS.search(plain(name)))


def sets_loss(name: str, value: object) -> bool:
    """Whether a key that no table has looks as if it said what carries loss: by its name and its switch."""
    items = value if isinstance(value, list) else [value]
    return (
        bool(items) and all(isinstance(item, (bool, int, float)) for item in items) and _sounds_of_loss(name)
    )


# A column of thinking by its name, which may say whose: `deepseek_reasoning`, `thinking_trajectories`.
_OF_THINKING = re.compile(
    "(.*?)_?(internal_)?(reasoning|thinking|thoughts?|think|cot|chain_of_thoughts?|rationales?)"
    "(_(content|text|traces?|trajector(y|ies)|process|steps|chain))?"
)
_OF_ANSWER = re.compile("(.*?)_(answer|response|solution|attempt|output|completion|final)")


def thinker(name: str) -> str | None:
    """Whose thinking a column of this name holds: "" where it does not say; None for any other column."""
    match = _OF_THINKING.fullmatch(_words(name))
    return match[1] if match else None


def answerer(name: str) -> str | None:
    """Whose answer a column of this name holds; None where it does not say, as `answer` alone does not."""
    match = _OF_ANSWER.fullmatch(_words(name))
    return match[1] if match else None


def _words(name: str) -> str:
    return re.sub(r"[ .-]", "_", name.lower())


@functools.lru_cache(4096)
def message_part(key: str) -> str | None:
    """The part that a message's key of this name plays."""
    wanted = plain(key)
    return next((part for part, names in MESSAGE_FIELDS.items() if wanted in names), None)
