"""A conversation in the terminal, over two callables: one that reads a line, one that writes text.

Not covered: line editing and history (the caller's `read` has them), several lines in one turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from forge.errors import ForgeError
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint, Message
from forge.serve.wire import Reply, Sampling

PROMPT = "> "
HELP = """\
/system TEXT  set the system prompt (no TEXT: none) and begin anew
/reset        begin anew
/save FILE    append the conversation to FILE as one line of training data
/help         this list
/quit         leave (as does the end of input)
Ctrl-C stops an answer.
"""


class ChatSession:
    """What was said so far, and what a line of input does to it."""

    def __init__(
        self,
        client: Client,
        write: Callable[[str], None],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.client = client
        self.write = write
        self.sampling = sampling or Sampling()
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def take(self, line: str) -> bool:
        """Do what `line` says; False when it ends the conversation."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match word:
            case "":
                pass
            case "/quit":
                return False
            case "/help":
                self.write(HELP)
            case "/reset":
                self.turns.clear()
            case "/system":
                self.system = rest or None
                self.turns.clear()
            case "/save":
                self._save(rest)
            case _ if word.startswith("/"):
                self.write(f"no such command: {word}\n{HELP}")
            case _:
                self._say(line.strip())
        return True

    def _say(self, text: str) -> None:
        """One turn of each. What was not answered is taken back, so that it can be said again."""
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        note = ""
        try:
            reply = self._stream(pieces)
            if reply.finish_reason == "length":
                note = "[cut: the answer reached its limit of tokens]\n"
            if not reply.text and (silent := reply.reasoning or json.dumps(reply.tool_calls)[1:-1]):
                note = f"[no text, only {'thinking' if reply.reasoning else 'tool calls'}: {silent}]\n" + note
        except KeyboardInterrupt:
            note = "[stopped]\n"
        except ForgeError as failure:
            note = f"error: {failure.message}\n" + (f"hint: {failure.hint}\n" if failure.hint else "")
            pieces.clear()
        self.write("\n" + note)
        if pieces:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self.turns.pop()

    def _stream(self, pieces: list[str]) -> Reply:
        answer = self.client.stream_chat(self.messages, self.sampling)
        try:
            while True:
                piece = next(answer)
                pieces.append(piece)
                self.write(piece)
        except StopIteration as end:
            reply: Reply = end.value
            return reply
        finally:
            # Closes the connection of an answer that was stopped.
            answer.close()

    def _save(self, name: str) -> None:
        if not name or not self.turns:
            self.write("nothing was said yet\n" if name else "save to which file? /save FILE\n")
            return
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, ValueError, RuntimeError) as wrong:  # a name with a NUL, the home of nobody
            self.write(f"error: {name} cannot be written: {getattr(wrong, 'strerror', wrong)}\n")
        else:
            self.write(f"saved to {name}\n")


def converse(
    endpoint: Endpoint,
    *,
    read: Callable[[str], str],
    write: Callable[[str], None],
    system: str | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Talk until /quit, the end of input, or Ctrl-C at the prompt.

    `read` is given the prompt and returns a line, as `input` does; `write` gets pieces of text as
    they come. Errors of the server are shown, and the conversation goes on.
    """
    with Client(endpoint) as client:
        conversation = ChatSession(client, write, system=system, sampling=sampling)
        while True:
            try:
                line = read(PROMPT)
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return
            if not conversation.take(line):
                return
