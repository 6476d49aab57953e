"""The same conversations through every template that a run leaves behind: are the prompts the same bytes?

The training tokenizer's template, the Jinja that the GGUF carries and the Go TEMPLATE of the Modelfile. The
GGUF's is given what a server would give it: today's date, thinking on, every variable that it reads
set to something else. The Go text is read back out of the Modelfile.

Not covered: a server's own reading of them; *deploy* asks that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice

from forge.chat import go_interpreter, probe
from forge.chat.difference import difference_of, first_difference
from forge.chat.hand_over import HandOver
from forge.chat.modelfile import Modelfile
from forge.chat.probe import Conversation
from forge.chat.template import DAY_VARIABLE, ChatTemplate
from forge.errors import CheckError, DataError

CONVERSATIONS = 200
_MOST_TRIED = 20 * CONVERSATIONS


@dataclass(frozen=True)
class ComparedPrompts:
    """How many conversations gave the same prompts, through which templates."""

    conversations: int
    through: tuple[str, ...]


def compare_prompts(handed: HandOver, gguf_template: str, modelfile: Modelfile | None) -> ComparedPrompts:
    """Raise `CheckError` with the first difference and the place that writes it.

    Where there is a Go TEMPLATE the conversations are those that it claims.
    """
    go = go_interpreter.parse_go(modelfile.template) if modelfile and modelfile.template else None
    conversations = _compare(handed, as_served(gguf_template, handed.template), go)
    places = ("the training tokenizer", "the GGUF's Jinja", *(("the Modelfile's TEMPLATE",) if go else ()))
    return ComparedPrompts(conversations, places)


def _compare(handed: HandOver, served: ChatTemplate, go: go_interpreter.GoTemplate | None) -> int:
    chosen = list(islice(_conversations(handed, only_claimed=go is not None), CONVERSATIONS))
    if len(chosen) < CONVERSATIONS:
        raise CheckError(
            f"only {len(chosen)} generated conversations can be compared, and {CONVERSATIONS} are the proof",
            hint="the chat template refuses nearly all of them: forge template shows what it takes",
        )
    compared = 0
    for conversation in chosen:
        trained = handed.template.render(conversation, add_generation_prompt=True)
        written = {"the GGUF's Jinja": served.render(conversation, add_generation_prompt=True)}
        if go is not None:
            # Where the tokenizer writes BOS, the TEMPLATE leaves it out.
            bos = handed.bos if handed.add_bos and trained.startswith(handed.bos) else ""
            written["the Modelfile's TEMPLATE"] = bos + go.render(conversation)
        for place, prompt in written.items():
            if prompt != trained:
                raise _differs(place, trained, prompt)
        compared += 1
    return compared


def as_served(source: str, trained: ChatTemplate) -> ChatTemplate:
    """The template with what a server sets where nobody asked: thinking, dates, other variables."""
    read = ChatTemplate(source, trained.special_tokens).variables_read()
    names = {*read, *trained.variables_read()} - {DAY_VARIABLE}
    hostile = {name: not trained.variables.get(name) for name in names}
    return ChatTemplate(source, trained.special_tokens, {**hostile, DAY_VARIABLE: date.today().isoformat()})


def _conversations(handed: HandOver, *, only_claimed: bool) -> Iterator[Conversation]:
    takes_system = handed.compiled.chat is None or handed.compiled.chat.system != "refused"
    literals = probe.literals(handed.template)
    tried = (
        talk
        for seed in range(_MOST_TRIED // CONVERSATIONS)
        for talk in probe.conversations(literals, has_system=takes_system, seed=seed)
    )
    seen: set[str] = set()
    for talk in islice(tried, _MOST_TRIED):
        if (key := repr(talk)) in seen or (only_claimed and not handed.compiled.claims(talk)):
            continue
        seen.add(key)
        try:
            handed.template.render(talk, add_generation_prompt=True)
        except DataError:
            continue
        yield talk


def _differs(place: str, trained: str, served: str) -> CheckError:
    return CheckError(
        f"{place} writes another prompt than training did, from character "
        f"{first_difference(trained, served)} on",
        hint="this should not be: please report the base",
        problems=difference_of(trained, served, place),
    )
