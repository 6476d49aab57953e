"""Somebody else's chat template, rendered in a process of its own that cannot eat the machine.

The kernel holds it: a timer of computing time that ends it, and a limit on its address space. It is started
with the first template, renders all of them, one request and one answer a line, and is started again when it
was ended. A template that ran into a limit is not tried again.

Not covered: macOS does not enforce the limit of memory.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from forge import process
from forge.chat.render_process import Prompts, Rendered, RenderRequest, rendered_of, to_line
from forge.errors import DataError, ForgeError

SECONDS = 3.0
"""Of computing, for one prompt: the longest rows take milliseconds."""
SECONDS_IN_ALL = 20.0
"""Of computing, before the average counts, and what a prompt may take then."""
SECONDS_ON_AVERAGE = 0.05
MEMORY_BYTES = 1 << 30
LONGEST_TEXT = 10_000_000
_COMMAND = (sys.executable, "-m", "forge.chat.render_process")
_HINT = "no chat template needs that: look at its loops, or use another one"


class TemplateLimitError(ForgeError):
    """A template takes more time or memory than any chat template needs."""

    code = 2


class _Renderer:
    """The process, and what is known of the templates that it was given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: process.Child | None = None
        self._known: dict[tuple[str, str], int] = {}
        self._numbers = itertools.count()
        self._spent: dict[tuple[str, str], tuple[float, int]] = {}
        self._refused: dict[tuple[str, str], str] = {}

    def render(
        self, source: str, day: str, values: Mapping[str, Any], prompts: Sequence[Prompts]
    ) -> list[list[str | DataError]]:
        key = (source, day)
        with self._lock:
            if reason := self._refused.get(key):
                raise TemplateLimitError(reason, hint=_HINT)
            answer = self._ask(key, values, prompts)
            seconds, count = self._spent.get(key, (0.0, 0))
            count += sum(len(prompt.cuts) for prompt in prompts)
            seconds += answer.seconds
            self._spent[key] = seconds, count
            if seconds > max(SECONDS_IN_ALL, SECONDS_ON_AVERAGE * count):
                self._refuse(key, f"the chat template took {seconds:.0f} seconds to compute {count} prompts")
        return [
            [text if isinstance(text, str) else _refusal(text.error) for text in texts]
            for texts in answer.texts
        ]

    def _ask(self, key: tuple[str, str], values: Mapping[str, Any], prompts: Sequence[Prompts]) -> Rendered:
        for is_last in (False, True):
            child = self._started()
            known = self._known.get(key)
            number = next(self._numbers) if known is None else known
            request = RenderRequest(number, values, SECONDS, prompts)
            if known is None:
                request = replace(request, source=key[0], day=key[1])
            line = self._exchange(child, to_line(request))
            if line is not None:
                answer = rendered_of(line)
                if answer.limit:
                    self._refuse(key, f"the chat template {answer.limit}")
                if answer.known:
                    self._known[key] = request.number
                return answer
            self._child = None
            status = child.stop(0)
            if status == -signal.SIGPROF:
                self._refuse(key, f"the chat template's prompt took more than {SECONDS:g} seconds to compute")
            if is_last:
                self._refuse(key, f"the chat template ended the process that renders it (status {status})")
        raise AssertionError("unreachable")

    def _exchange(self, child: process.Child, request: str) -> str | None:
        """The line that answers, or None where the process ended."""
        try:
            child.send(request)
            return next(child.lines(), None)
        except BaseException:
            # Its answer would be taken for that to another request.
            self.close()
            raise

    def _refuse(self, key: tuple[str, str], reason: str) -> NoReturn:
        self._refused[key] = reason
        raise TemplateLimitError(reason, hint=_HINT)

    def _started(self) -> process.Child:
        if self._child is None:
            self._known.clear()
            environment = {"FORGE_TEMPLATE_LIMITS": f"{MEMORY_BYTES} {LONGEST_TEXT}"}
            self._child = process.Child(_COMMAND, environment=environment, separate_errors=True)
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.stop(0)
            self._child = None


_renderer = _Renderer()


def render(
    source: str, day: str, values: Mapping[str, Any], prompts: Sequence[Prompts]
) -> list[list[str | DataError]]:
    """Render the template `source` with `values` (plain JSON) where today is `day`, each of the `prompts`.

    A prompt that the template refuses is the error with its words. Raises `TemplateLimitError` where one
    ran into a limit.
    """
    return _renderer.render(source, day, values, prompts)


def _refusal(reason: str) -> DataError:
    return DataError(
        f"the chat template refuses the conversation: {reason}",
        hint="the template says which roles it takes, and in which order; `forge template` shows it",
    )


def _close() -> None:
    _renderer.close()


def _forget() -> None:
    """In a forked process: the pipes are its parent's."""
    global _renderer  # noqa: PLW0603
    _renderer = _Renderer()


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)
