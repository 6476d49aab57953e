"""The process that renders templates for `renderer`: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

import jinja2

from forge.chat.jinja import environment_of

# What a template can raise that is its own fault.
_ITS_OWN = (
    jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError,
    RecursionError, SyntaxError, NameError,
)  # fmt: skip


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
            answer = _answer(json.loads(line), templates, longest)
        except MemoryError:
            answer = {"limit": f"takes more than {most >> 20} MiB of memory"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, Any], templates: dict[int, jinja2.Template], longest: int) -> dict[str, Any]:
    """The texts of all prompts of the request, each under a timer of its own; or the limit that one hit."""
    began = time.process_time()
    texts: list[list[Any]] = []
    for prompts in request["prompts"]:
        texts.append([])
        for length, adds_generation_prompt in prompts["cuts"]:
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            try:
                if "source" in request:
                    source, day = request.pop("source"), request["day"]
                    templates[request["template"]] = environment_of(day).from_string(source)
                text: Any = templates[request["template"]].render(
                    request["values"],
                    messages=prompts["messages"][:length],
                    tools=prompts["tools"],
                    add_generation_prompt=adds_generation_prompt,
                )
            except _ITS_OWN as error:
                # str() of it may run the template's own objects, so it stands under the timer too.
                text = {"error": str(error)[:2000]}
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if len(text) > longest:
                return {"limit": f"writes a prompt of more than {longest:,} characters"}
            texts[-1].append(text)
    known = request["template"] in templates
    return {"texts": texts, "known": known, "seconds": time.process_time() - began}


if __name__ == "__main__":
    main()
