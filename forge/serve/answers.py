"""The rows of a batch's output: what is written of an answer, in the form that its prompt had."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.serve.ids import Id
from forge.serve.rows import PromptRow
from forge.serve.wire import RefusedError, Reply

_NONE = Reply("", "", 0, 0)


@dataclass(frozen=True)
class AnsweredRow:
    """One line of the output; `reply` is empty where it failed."""

    id: Id
    succeeded: bool
    row: Mapping[str, object]
    reply: Reply = _NONE
    has_text: bool = True

    @property
    def cut(self) -> bool:
        return self.reply.finish_reason == "length"

    @property
    def silent(self) -> bool:
        """Whether it succeeded without any text."""
        return self.succeeded and self.has_text and not self.reply.text.strip()


def answer_of(row: PromptRow, reply: Reply | None, payload: Mapping[str, Any]) -> AnsweredRow:
    """The line for an answer: `payload` whole for a row of a batch, else what of it is asked for.

    `reply` is None where the answer is no text (embeddings).
    """
    shown = reply or Reply("", "", int((payload.get("usage") or {}).get("prompt_tokens") or 0), 0)
    if row.body is not None:
        response = {"status_code": 200, "request_id": payload.get("id") or "", "body": payload}
        return AnsweredRow(row.id, True, _batch_row(row, response, None), shown, reply is not None)
    fields: dict[str, object] = {"id": row.id, "text": shown.text}
    if shown.reasoning:
        fields["reasoning_content"] = shown.reasoning
    if shown.tool_calls:
        fields["tool_calls"] = list(shown.tool_calls)
    usage = {"prompt_tokens": shown.prompt_tokens, "completion_tokens": shown.completion_tokens}
    return AnsweredRow(row.id, True, {**fields, "finish_reason": shown.finish_reason, "usage": usage}, shown)


def failed_answer(row: PromptRow, refusal: RefusedError) -> AnsweredRow:
    """The line for a row that the server refused."""
    if row.body is None:
        return AnsweredRow(row.id, False, {"id": row.id, "error": refusal.message})
    error = {"code": str(refusal.status), "message": refusal.message}
    response = {"status_code": refusal.status, "request_id": "", "body": {"error": error}}
    return AnsweredRow(row.id, False, _batch_row(row, response, error))


def _batch_row(
    row: PromptRow, response: Mapping[str, object], error: Mapping[str, object] | None
) -> dict[str, object]:
    number = hashlib.sha256(str(row.id).encode()).hexdigest()[:16]
    return {"id": f"batch_req_{number}", "custom_id": row.id, "response": response, "error": error}
