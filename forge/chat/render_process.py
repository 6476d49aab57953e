"""The process that renders templates for `renderer`: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import jinja2

from forge.chat.jinja import environment_of

# What a template can raise that is its own fault.
_ITS_OWN = (
    jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError,
    RecursionError, SyntaxError, NameError,
)  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """What is rendered of one conversation: of its first messages, so many, and whether an answer begins."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    cuts: Sequence[tuple[int, bool]]


@dataclass(frozen=True)
class RenderRequest:
    """Prompts of the template `number`, whose `source` comes with the first request for it.

    `day` is what the template takes for today; each prompt may take `seconds` of computing.
    """

    number: int
    values: Mapping[str, Any]
    seconds: float
    prompts: Sequence[Prompts]
    source: str | None = None
    day: str = ""


@dataclass(frozen=True)
class Refused:
    """Why the template renders no prompt."""

    error: str


@dataclass(frozen=True)
class Rendered:
    """For each of the `prompts` its texts; `known`: the template need not be sent again.

    `limit` says which limit was hit; nothing else holds then.
    """

    texts: Sequence[Sequence[str | Refused]] = ()
    known: bool = False
    seconds: float = 0.0
    limit: str = ""


def to_line(value: RenderRequest | Rendered) -> str:
    """A line of JSON. Of rows by the thousand: `codec` would look at every message."""
    return json.dumps(value, default=lambda part: vars(part) if is_dataclass(part) else str(part)) + "\n"


def read_request(line: str) -> RenderRequest:
    """The request that `to_line` wrote."""
    fields = json.loads(line)
    return RenderRequest(**{**fields, "prompts": [Prompts(**prompts) for prompts in fields["prompts"]]})


def rendered_of(line: str) -> Rendered:
    """The answer that `to_line` wrote."""
    fields = json.loads(line)
    texts = [[text if isinstance(text, str) else Refused(**text) for text in row] for row in fields["texts"]]
    return Rendered(**{**fields, "texts": texts})


def main() -> None:
    """Answer until standard input ends."""
    most, longest = map(int, os.environ["FORGE_TEMPLATE_LIMITS"].split())
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # A template that takes too long ends here, wherever it is: the default of this signal is the end.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    templates: dict[int, jinja2.Template] = {}
    for line in sys.stdin:
        try:
            answer = _answer(read_request(line), templates, longest, len(line))
        except MemoryError:
            answer = Rendered(limit=f"takes more than {most >> 20} MiB of memory")
        sys.stdout.write(to_line(answer))
        sys.stdout.flush()


def _answer(
    request: RenderRequest, templates: dict[int, jinja2.Template], longest: int, asked: int
) -> Rendered:
    """The texts of all prompts of the request, each under a timer of its own; or the limit that one hit.

    A prompt may have `longest` characters more than the `asked` of the request: a row of ten megabytes makes
    a prompt of ten megabytes, which is not the template's doing.
    """
    began = time.process_time()
    source = request.source
    texts: list[list[str | Refused]] = []
    for prompts in request.prompts:
        texts.append([])
        for length, adds_generation_prompt in prompts.cuts:
            signal.setitimer(signal.ITIMER_PROF, request.seconds)
            try:
                if source is not None:
                    taken, source = source, None
                    templates[request.number] = environment_of(request.day).from_string(taken)
                text: str | Refused = templates[request.number].render(
                    request.values,
                    messages=prompts.messages[:length],
                    tools=prompts.tools or None,
                    add_generation_prompt=adds_generation_prompt,
                )
            except _ITS_OWN as error:
                # str() of it may run the template's own objects, so it stands under the timer too.
                text = Refused(str(error)[:2000])
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if isinstance(text, str) and len(text) > longest + asked:
                return Rendered(limit=f"writes a prompt of more than {longest:,} characters")
            texts[-1].append(text)
    return Rendered(texts, request.number in templates, time.process_time() - began)


if __name__ == "__main__":
    main()
