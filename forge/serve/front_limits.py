"""What a request may take of llama-server's memory, stack and time, which it hardly bounds itself.

Each of these, by a single request, ended the server for everybody, or stopped it (docs/decisions.md).

Not covered: work that is long by its nature, such as a long prompt; nginx, which does not read a body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Of each token, where an answer has several.
MOST_LOG_PROBABILITIES = 100
# In all of a request, which the server holds until it is answered.
_MOST_IN_ALL = 500_000
BYTES_OF_LOG_PROBABILITY = 700
# What `logprobs: true` means, where no `top_logprobs` says another.
_USUAL_COUNT = 20
_COUNTS = ("top_logprobs", "n_probs", "logprobs")
# llama-server takes the first that is there; a response's takes the place of `max_tokens`.
_LENGTHS = ("n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens")
_ANSWERS = ("n_cmpl", "n")
# As many as OpenAI takes. The rest of the request is copied for each of them.
_MOST_PROMPTS = 2048
_MOST_COPIED_BYTES = 64 << 20
# Of these many tokens a place is made in memory, however few there are.
_LOOK_BACK = ("repeat_last_n", "dry_penalty_last_n")
_MOST_TOKENS_BACK = 1 << 20
# The server reads what is nested, or refers to the next, by calling itself.
_MOST_NESTED = 4096
_MOST_REFERENCES = 1000
# A request that is smaller has no more references than that.
_SMALL_BYTES = 16 << 10
# The rules for what an object may leave out grow with the cube of their number (1000 take 4 s, 2000 34 s),
# the time for alternatives with their square (an `enum` of 20,000 takes 21 s).
_MOST_OPTIONAL = 256
_MOST_OPTIONAL_IN_ALL = 4096
_MOST_ALTERNATIVES = 4096
_ALTERNATIVES = ("enum", "anyOf", "oneOf")
_SCHEMAS = ("json_schema", "response_format", "tools", "text")
# Of its own making: patterns that take for ever, and what is read without a check.
_OWN = ("grammar_triggers", "chat_parser")


def most_log_probabilities(context_tokens: int) -> int:
    """How many a request may ask for: the usual ones of an answer that fills the context, at least."""
    return max(_MOST_IN_ALL, _USUAL_COUNT * context_tokens)


def too_much_of(path: str, fields: Mapping[str, Any], size: int, context_tokens: int) -> str:
    """Why a request of `size` bytes is too much for a server of such a context; empty where it is not."""
    prompts = _prompts(
        fields.get("input", fields.get("content")) if "embedding" in path else fields.get("prompt")
    )
    if own := [name for name in _OWN if name in fields]:
        return f"`{own[0]}` is llama-server's own: leave it out"
    for name in _LOOK_BACK:
        if isinstance(back := fields.get(name), int | float) and back > _MOST_TOKENS_BACK:
            return f"{name}: at most {_MOST_TOKENS_BACK}"
    grammar = fields.get("grammar")
    if isinstance(grammar, str) and max(map(grammar.count, ("(", "::=", "|"))) > _MOST_NESTED:
        return f"a grammar of at most {_MOST_NESTED} rules, brackets and alternatives"
    if size > _SMALL_BYTES and json.dumps(fields).count('"$ref"') > _MOST_REFERENCES:
        return f"at most {_MOST_REFERENCES} references in schemas"
    if reason := _against_choices([fields.get(name) for name in _SCHEMAS]):
        return reason
    if prompts > _MOST_PROMPTS:
        return f"at most {_MOST_PROMPTS} prompts in a request"
    if prompts > 1 and size > _SMALL_BYTES:
        rest = {name: value for name, value in fields.items() if name not in ("prompt", "input", "content")}
        if len(json.dumps(rest)) * prompts > _MOST_COPIED_BYTES:
            return "too much beside the prompts, for so many of them"
    return _against_log_probabilities(fields, prompts, context_tokens)


def _against_choices(schemas: list[Any]) -> str:
    """What `allOf` puts together is one object, each reference in it as large as all that there is."""
    counts, references, is_joined, alternatives = [0], 1, False, 0
    waiting = schemas
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            required = node.get("required")
            names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else ()
            if isinstance(properties := node.get("properties"), dict):
                counts.append(len(properties.keys() - names))
            parts = node.get("allOf")
            is_joined = is_joined or (isinstance(parts, list) and len(parts) > 1)
            references += "$ref" in node
            lists = (node.get(name) for name in _ALTERNATIVES)
            alternatives += sum(len(several) for several in lists if isinstance(several, list))
            waiting += node.values()
    largest = sum(counts) * references if is_joined else max(counts)
    if largest > _MOST_OPTIONAL or sum(counts) > _MOST_OPTIONAL_IN_ALL:
        return f"at most {_MOST_OPTIONAL} properties of an object that may be left out"
    if alternatives > _MOST_ALTERNATIVES:
        return f"at most {_MOST_ALTERNATIVES} alternatives in schemas"
    return ""


def _against_log_probabilities(fields: Mapping[str, Any], prompts: int, context_tokens: int) -> str:
    """Those of a whole vocabulary at every token are many gigabytes, and so are fewer of many answers.

    Whichever of the lengths counts, of a whole vocabulary it is one token, in one answer to one prompt.
    """
    numbers = {name: number for name in _COUNTS if isinstance(number := fields.get(name), int | float)}
    counts = [abs(number) for number in numbers.values()]
    if numbers.get("logprobs") is True and "top_logprobs" not in numbers:
        counts.append(_USUAL_COUNT)
    if not any(counts):
        return ""
    lengths, answers = (
        [fields[name] for name in names if fields.get(name) is not None] for names in (_LENGTHS, _ANSWERS)
    )
    # Of a number that is too large for it, or too small, llama-server takes the lowest 32 bits.
    if max(counts) > MOST_LOG_PROBABILITIES:
        is_one = lengths and prompts == 1 and all(number == 1 for number in (*lengths, *answers))
        return (
            "" if is_one else f"at most {MOST_LOG_PROBABILITIES} log-probabilities for each of several tokens"
        )
    bounds = [
        min(number, context_tokens) for number in lengths if isinstance(number, int | float) and number >= 0
    ]
    tokens = max(bounds) if bounds and len(bounds) == len(lengths) else context_tokens
    several = max([1, *(number for number in answers if isinstance(number, int | float))])
    most = most_log_probabilities(context_tokens)
    if max(counts) * tokens * several * prompts > most:
        return f"at most {most} log-probabilities in an answer: ask for fewer, or for fewer tokens"
    return ""


def _prompts(prompt: object) -> int:
    """How many llama-server reads: a list with numbers in it is the tokens of a single one."""
    if not isinstance(prompt, list) or any(isinstance(item, int | float) for item in prompt):
        return 1
    return max(1, len(prompt))
