"""The prompts of a batch, one JSON object a line: read one by one, however many there are.

They are checked some way ahead of where they are asked, so that a fault in a small file costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from forge import report
from forge.chat.modelfile import OLLAMA_PARAMETERS
from forge.errors import DataError, Problem, StageError
from forge.serve import wire
from forge.serve.endpoint import ROLES, Turn
from forge.serve.front_asks import not_done
from forge.serve.ids import MOST_PROBLEMS, Id, Ids, is_id, is_stream, parse_object


class WrongRowsError(DataError):
    """Lines of the prompts cannot be used."""


LONGEST_LINE = 128 << 20
# Until something is sent the rows are checked, so that a fault in a small file costs nothing.
SECONDS_OF_CHECKING = 1.0
_HINT = (
    'each line is {"id": ..., "prompt": "..."}, {"id": ..., "messages": [...]}, or a row of OpenAI batches: '
    '{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
)
# What would ask for another answer, were it read, by whose requests have it: of a whole request only.
# What tables have for things of their own, too (options, reasoning, prediction), is only reported.
_OPENAI = {
    "best_of", "echo", "frequency_penalty", "function_call", "functions",
    "instructions", "logit_bias", "logprobs", "max_completion_tokens", "max_output_tokens", "max_tokens",
    "max_tool_calls", "modalities", "n", "parallel_tool_calls", "presence_penalty",
    "previous_response_id", "reasoning_effort", "response_format", "seed", "stop", "suffix",
    "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "verbosity", "web_search_options",
}  # fmt: skip
_LLAMA_SERVER = {
    "adaptive_decay", "adaptive_target", "add_generation_prompt", "chat_format", "chat_template",
    "chat_template_kwargs", "continue_final_message", "dry_allowed_length", "dry_base", "dry_multiplier",
    "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent", "dynatemp_range",
    "enable_thinking", "generation_prompt", "grammar", "grammar_lazy", "grammar_triggers", "ignore_eos",
    "input_prefix", "input_suffix", "json_schema", "lora", "min_keep", "min_tokens", "n_cmpl", "n_discard",
    "n_indent", "n_keep", "n_predict", "n_probs", "post_sampling_probs", "reasoning_budget_message",
    "reasoning_budget_tokens", "reasoning_format", "repetition_penalty", "samplers", "t_max_predict_ms",
    "thinking_budget_tokens", "top_n_sigma", "xtc_probability", "xtc_threshold",
}  # fmt: skip
_OTHERS = {
    "system", "developer", "images", "think", "stop_sequences", "system_instruction", "generation_config",
    "max_new_tokens",
}  # fmt: skip
_OF_REQUESTS = OLLAMA_PARAMETERS | _OPENAI | _LLAMA_SERVER | _OTHERS
# As many names are shown of what is not read.
_MOST_NAMES = 20


@dataclass(frozen=True)
class PromptRow:
    """One prompt: a conversation, `raw` text that no template is put around, or a `body` as it is to be sent.

    `path` is the route that a body is for; `unread` are the fields beside it.
    """

    id: Id
    messages: tuple[Turn, ...] = ()
    raw: str = ""
    body: Mapping[str, Any] | None = None
    path: str = wire.CHAT
    unread: tuple[str, ...] = ()


@dataclass
class PromptRows:
    """The rows of `path`, checked some way ahead of where they are read. Use it as a context manager.

    `total` is how many rows were checked: all of them once `whole`.
    """

    path: Path
    ids: Ids
    raw: bool = False
    total: int = 0
    whole: bool = False
    _checked: int = field(default=0, init=False)
    _lines: int = field(default=0, init=False)
    _problems: list[Problem] = field(default_factory=list, init=False)
    _faults: int = field(default=0, init=False)
    _unread: dict[str, None] = field(default_factory=dict, init=False)

    def __enter__(self) -> PromptRows:
        self._stack = contextlib.ExitStack()
        try:
            place = self._stack.enter_context(_on_disk(self.path))
            self._ahead = self._stack.enter_context(_opened(place))
            self._behind = self._stack.enter_context(_opened(place))
            self._check(time.monotonic() + SECONDS_OF_CHECKING)
            if self._faults:
                self._check(float("inf"))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check_some(self) -> None:
        """Check for a moment. Raises `DataError` with the lines that are wrong once all were looked at."""
        if not self.whole:
            self._check(time.monotonic() + 0.02)

    def _check(self, deadline: float) -> None:
        while line := self._line(self._ahead):
            self._lines += 1
            self._checked += len(line)
            if line.strip():
                self._check_line(line)
            if not self._lines % 64 and time.monotonic() > deadline:
                return
        self.whole = True
        if self._faults:
            shown = f" (the first {MOST_PROBLEMS} are shown)" if self._faults > MOST_PROBLEMS else ""
            raise WrongRowsError(
                f"{self.path}: {self._faults} of its lines cannot be used{shown}",
                hint=_HINT,
                problems=self._problems,
            )
        if not self.total:
            raise DataError(f"{self.path}: no prompts in it")
        if self._unread:
            names = list(self._unread)
            more = " and more" if len(names) > _MOST_NAMES else ""
            report.info(f"{self.path}: not read of its rows: {', '.join(names[:_MOST_NAMES])}{more}")

    def _check_line(self, line: bytes) -> None:
        try:
            row = _row(line, self.raw)
            before, _ = self.ids.of(row.id)
            if before is not None:
                raise ValueError(f"the id {row.id!r} stands on line {before} already")
        except ValueError as wrong:
            self._faults += 1
            if len(self._problems) < MOST_PROBLEMS:
                self._problems.append(Problem(str(wrong), file=str(self.path), line=self._lines))
        else:
            self.ids.prompt(row.id, self._lines)
            if len(self._unread) <= _MOST_NAMES:
                self._unread |= dict.fromkeys(row.unread)
            self.total += 1

    def __iter__(self) -> Iterator[PromptRow]:
        """The rows without an answer, checking further when it comes to what was not looked at.

        Raises `DataError` once a line is known to be wrong.
        """
        place = 0
        while True:
            while place >= self._checked and not self.whole:
                self.check_some()
            if self._faults:
                self._check(float("inf"))
            if place >= self._checked:
                return
            line = self._line(self._behind)
            place += len(line)
            if line.strip():
                row = _row(line, self.raw)
                if self.ids.of(row.id)[1] is None:
                    yield row

    def _line(self, stream: IO[bytes]) -> bytes:
        try:
            line = stream.readline(LONGEST_LINE)
        except OSError as wrong:
            raise DataError(f"{self.path} cannot be read: {wrong.strerror}") from wrong
        if len(line) == LONGEST_LINE:
            raise DataError(f"{self.path}: it has a line of more than {LONGEST_LINE >> 20} MiB")
        return line


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[Path]:
    """A file with what `path` holds: itself, or a copy of what a pipe or standard input (`-`) gives."""
    if str(path) != "-" and not is_stream(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="forge-prompts-") as copy:
        try:
            with sys.stdin.buffer if str(path) == "-" else path.open("rb") as stream:
                shutil.copyfileobj(stream, copy)
            copy.flush()
        except OSError as wrong:
            raise StageError(f"{path} cannot be copied to {copy.name}: {wrong.strerror}") from wrong
        yield Path(copy.name)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as wrong:
        raise DataError(f"{path} cannot be read: {wrong.strerror}") from wrong


def _row(line: bytes, raw: bool) -> PromptRow:
    fields = parse_object(line)
    if rb"\ud" in line.lower():
        # Half a surrogate pair is JSON but no text: it could be neither sent nor written.
        json.dumps(fields, ensure_ascii=False).encode()
    if "custom_id" in fields or "body" in fields:
        return _batch_row(fields, raw)
    if "id" not in fields:
        raise ValueError("no id")
    if not is_id(fields["id"]):
        raise ValueError(f"the id must be a text or a whole number, not {fields['id']!r}")
    if asked := sorted(_OF_REQUESTS & fields.keys()):
        raise ValueError(
            f"{asked[0]} is not read from such a row: write a message, an option, or a whole body"
        )
    unread = _beside(fields, "id", "prompt", "messages")
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError("give prompt or messages, one of the two")
    if raw and "prompt" not in fields:
        raise ValueError("messages cannot be sent raw; give a prompt")
    if "prompt" not in fields:
        return PromptRow(fields["id"], _messages(fields["messages"]), unread=unread)
    if not isinstance(fields["prompt"], str):
        raise ValueError("prompt must be a text")
    if raw:
        return PromptRow(fields["id"], raw=fields["prompt"], unread=unread)
    return PromptRow(fields["id"], ({"role": "user", "content": fields["prompt"]},), unread=unread)


def _beside(fields: Mapping[str, Any], *read: str) -> tuple[str, ...]:
    return tuple(name for name in fields if name not in read)


_BATCH_PATHS = (wire.CHAT, wire.COMPLETION, wire.EMBEDDINGS)


def _batch_row(fields: Mapping[str, Any], raw: bool) -> PromptRow:
    """A row of OpenAI's batch files: its `body` is the whole request."""
    custom_id, body, path = fields.get("custom_id"), fields.get("body"), fields.get("url", wire.CHAT)
    if not isinstance(custom_id, str) or not isinstance(body, dict):
        raise ValueError("a row of a batch needs a custom_id that is a text and a body that is an object")
    if raw:
        raise ValueError(f"a body cannot be sent raw; its url may be {wire.COMPLETION}")
    if path not in _BATCH_PATHS or fields.get("method", "POST") != "POST":
        raise ValueError(f"method must be POST and url one of {', '.join(_BATCH_PATHS)}")
    if body.get("stream"):
        raise ValueError("an answer in a file cannot be streamed; leave stream out of the body")
    if reason := not_done(body):
        raise ValueError(reason)
    if path == wire.CHAT:
        body = body | {"messages": _messages(body.get("messages"))}
    unread = _beside(fields, "custom_id", "method", "url", "body")
    return PromptRow(custom_id, body=body, path=path, unread=unread)


def _messages(value: object) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list with at least one message")
    return tuple(map(_message, value))


def _message(message: object) -> Turn:
    if not isinstance(message, dict):
        raise ValueError("every message must be an object")
    role, content = message.get("role"), message.get("content")
    if role == "developer":
        # OpenAI's newer name of it. Templates know the older one, and many drop a role they do not know.
        message = message | {"role": (role := "system")}
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; known are {', '.join(ROLES)}, developer")
    calls = role == "assistant" and message.get("tool_calls")
    if isinstance(content, list) and content:
        if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
            raise ValueError('every part of a content needs a type, such as {"type": "text", "text": ...}')
        if not all(isinstance(part.get("text"), str) for part in content if part["type"] == "text"):
            raise ValueError("a part of type text needs a text")
    elif not isinstance(content, str) and not (content is None and calls):
        raise ValueError("every message needs a role and a content: a text or a list of parts")
    return message
