"""Token ids, prompt and stops of a GGUF against those of training. Runs in a worker.

The reference is tokenizer.json and the chat template with the variables of training; the other side is
llama.cpp with the file's own vocabulary and the file's own template, used as its server uses them.
Not covered: what a certain server does on top (deploy asks the real one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.chat.template import DAY_VARIABLE, ChatTemplate, Message
from forge.errors import CheckError, DataError, Problem
from forge.export import proof
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer
from forge.verify.measurement import PromptCheck, StopCheck, TokenCheck, UnlikeIds, Vocabulary
from forge.verify.token_table import other_entries

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ANOTHER_DAY = "2001-02-03"
_SHOWN = 5
_Prompt = tuple[Sequence[Message], Sequence[Mapping[str, Any]]]
_USER: Message = {"role": "user", "content": "Is it warm in Rome?"}
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "warmth", "description": "?", "parameters": _PARAMETERS}}
_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "warmth", "arguments": {"city": "Rome"}}}
_CALLED: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_TOOL_TURN: Message = {"role": "tool", "content": "31", "name": "warmth", "tool_call_id": "a1b2c3d4e"}
_ANSWER: Message = {"role": "assistant", "content": "Yes.", "reasoning_content": "It is."}
_SPACED: Sequence[Message] = [{"role": "system", "content": " A "}, {"role": "user", "content": "\n B \n"}]
_RARE: Sequence[_Prompt] = (
    (_SPACED, ()),
    ([*_SPACED, {"role": "assistant", "content": " C "}, _SPACED[1]], ()),
    ([{"role": "system", "content": "Be brief."}, _USER, _ANSWER, _USER, _ANSWER], ()),
    ([_USER], [_TOOL]),
    ([_USER, _CALLED, _TOOL_TURN], [_TOOL]),
    ([_USER, _CALLED, _TOOL_TURN, _ANSWER, _USER], [_TOOL]),
)
"""What no row may have: asked of a file's template only where its text is another than training's."""
_OTHER_TEXT = (
    "the file's chat template is another text: what no conversation here takes of it was not compared"
)
_ENDS = re.compile(r"end|eo[stm]|/s|return|call", re.IGNORECASE)
"""In the names of special tokens that end a text or a turn."""


def check_vocabulary(
    gguf: Path,
    tokenizer: Path,
    template: ChatTemplate | None,
    conversations: Sequence[Sequence[Message]],
    end_of_turn: int | None,
) -> Vocabulary:
    """The token ids, the prompts and the stop of the file, and what differs."""
    reference = open_tokenizer(tokenizer)
    header = read_gguf(gguf)
    tried = proof.cases(template, proof.test_strings(), conversations)
    served = proof.ServedVocabulary(gguf)
    try:
        ends = end_of_turn is None or served.ends_reply(end_of_turn)
        prompt = _prompts(header, reference, served, template, conversations)
        ending = served.ending()
    finally:
        served.close()
    token = reference.id_to_token(end_of_turn) if end_of_turn is not None else None
    files, other = read_tokenizer(tokenizer), list(other_entries(header, tokenizer))
    bos = files.tokens.get("bos")
    if template and bos and files.add_bos and not header.adds_bos and tried and tried[0].text.startswith(bos):
        other.append(Problem(f"is false, prompts begin with {bos}", "tokenizer.ggml.add_bos_token"))
    words = _words_that_end(ending, header, reference, {end_of_turn, *files.eos_ids})
    tokens = _with_entries(_tokens(gguf, tokenizer, tried), other)
    return Vocabulary(tokens, prompt, StopCheck(ends and not words, token, words))


def _words_that_end(
    ending: Mapping[int, bool], header: GgufHeader, reference: Tokenizer, ends: AbstractSet[int | None]
) -> tuple[str, ...]:
    """Tokens at which llama.cpp ends a reply and nobody else does: of plain text, or special ones of a turn.

    It ends replies at some tokens by their text, whatever the file says, and takes those for control tokens:
    special ones, and `</s>`, which Qwen's vocabulary has as a word.
    """
    named = {header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    special = reference.get_added_tokens_decoder()
    words = []
    for number in sorted(ending.keys() - ends):
        text = str(reference.id_to_token(number))
        is_turn = number in special and number in named and not _ENDS.search(text)
        if is_turn or (number not in special and not ending[number]):
            words.append(text)
    return tuple(words)


def _with_entries(compared: TokenCheck, other: Sequence[Problem]) -> TokenCheck:
    """What was compared of texts, and which entries of the file's table of tokens are not the tokenizer's."""
    if not other:
        return compared
    words = f"the file's table of tokens is not the tokenizer's: {'; '.join(map(str, other))}"
    message = f"{compared.message}; {words}" if compared.message else words
    return replace(compared, ok=False, message=message)


def added_tokens(base: Path, tokenizer: Path) -> list[str]:
    """What `tokenizer` knows and that of `base` does not: no other text may hold it, so it is asked for."""
    if tokenizer == base or not (base / "tokenizer.json").is_file():
        return []
    known, own = (open_tokenizer(directory).get_vocab() for directory in (base, tokenizer))
    return sorted(own.keys() - known.keys())


@dataclass(frozen=True)
class CountRequest:
    gguf: Path
    texts: tuple[str, ...]


@dataclass(frozen=True)
class TokenCounts:
    counts: tuple[int, ...]


def count(request: CountRequest) -> TokenCounts:
    """How many tokens each prompt has by the file's own vocabulary, as a server should count it.

    Raises `CheckError` for a vocabulary that llama.cpp cannot load.
    """
    served = proof.ServedVocabulary(request.gguf)
    try:
        return TokenCounts(tuple(len(served.ids(text)) for text in request.texts))
    finally:
        served.close()


def _tokens(gguf: Path, tokenizer: Path, tried: Sequence[proof.Case]) -> TokenCheck:
    try:
        compared = proof.compare_ids(tokenizer, gguf, tried)
    except CheckError as differ:
        examples = tuple(UnlikeIds(problem.field, problem.message) for problem in differ.problems)
        counted = {name: value for name, value in differ.fields.items() if isinstance(value, int)}
        texts, different = (counted.get(name, len(tried)) for name in ("compared", "different"))
        return TokenCheck(False, texts, different, differ.message, examples=examples)
    return TokenCheck(True, compared.texts, limits=tuple(compared.limits))


def _prompts(
    header: GgufHeader,
    reference: Tokenizer,
    served: proof.ServedVocabulary,
    template: ChatTemplate | None,
    conversations: Sequence[Sequence[Message]],
) -> PromptCheck:
    """The file's own template writes each prompt as training did, in text and in ids."""
    source = header.metadata.get("tokenizer.chat_template")
    if template is None:
        return PromptCheck(True, 0, reason="the base has no chat template")
    if not isinstance(source, str):
        return _unlike("the file carries no chat template, the base has one")
    tokens = _tokens_of(header, reference)
    try:
        own, later = ChatTemplate(source, tokens), ChatTemplate(source, tokens, {DAY_VARIABLE: _ANOTHER_DAY})
    except DataError as broken:
        return _unlike(f"the file's {broken.message.removeprefix('the ')}")
    examples: list[Mapping[str, object]] = []
    compared = twice = 0
    for messages in conversations:
        expected = _rendered(template, messages)
        if expected is None:
            continue
        compared += 1
        written = _rendered(own, messages)
        ids = served.ids(written) if written is not None else []
        wanted = _ids(reference, expected)
        if ids[:1] == ids[1:2] and wanted[:1] != wanted[1:2] and ids:
            twice += 1
        if written is None or written != expected:
            examples.append({"trained": expected, "file": written})
        elif own.source != template.source and _rendered(later, messages) != written:
            examples.append({"trained": expected, "file": "a text that depends on the day"})
        elif ids != wanted:
            examples.append({"trained": str(wanted[:24]), "file": str(ids[:24]), "ids": True})
    if not examples and own.source != template.source:
        for prompts in _RARE:
            expected, written = _text_of(template, prompts), _text_of(own, prompts)
            compared += expected is not None
            if expected is not None and written != expected:
                examples.append({"trained": expected, "file": written})
    if not examples:
        return PromptCheck(True, compared, reason="" if own.source == template.source else _OTHER_TEXT)
    first = examples[0]
    what = "their token ids differ" if "ids" in first else "their text differs"
    what = "BOS stands twice at their beginning" if twice else what
    message = f"{len(examples)} of {compared} prompts are not those of training: {what}"
    return PromptCheck(False, compared, message, examples=tuple(examples[:_SHOWN]))


def _unlike(message: str) -> PromptCheck:
    return PromptCheck(False, 0, message)


def _ids(reference: Tokenizer, text: str) -> list[int]:
    ids: list[int] = reference.encode(text, add_special_tokens=False).ids
    return ids


def _tokens_of(header: GgufHeader, reference: Tokenizer) -> Mapping[str, str]:
    """The special tokens' texts that the file gives to its template."""
    tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        text = reference.id_to_token(number) if isinstance(number, int) else None
        if text is not None:
            tokens[f"{name}_token"] = text
    return tokens


def _rendered(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    return _text_of(template, (messages, ()))


def _text_of(template: ChatTemplate, prompts: _Prompt) -> str | None:
    messages, tools = prompts
    asks = messages[-1]["role"] != "assistant"
    try:
        return template.render(messages, add_generation_prompt=asks, tools=tools)
    except DataError:
        return None
