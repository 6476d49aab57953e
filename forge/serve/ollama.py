"""Into Ollama, with proof: blobs, a model under a name of its own, its prompts and stops, then the name.

The server itself is asked what it would give to the model (`_debug_render_only`), for a set of
conversations, and that must be what the chat template writes. Only then does the name become the
new model's, by a copy, which writes one small manifest; whatever fails before leaves the name as
it was. Servers since 0.30 get the GGUF's own Jinja first; where that differs, or on older ones, a
Go TEMPLATE. A server built from source says 0.0.0 and is taken for a current one.

Not covered: safetensors, which Ollama converts by itself and not always rightly. Of tools and thinking
`prove_kinds` says how far the server's prompts are the template's; they choose no way.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from forge import report
from forge.chat.difference import difference_of, first_difference
from forge.chat.format_check import unseen_bos
from forge.chat.hand_over import JINJA_SINCE, HandOver, Way, hand_over_of
from forge.chat.template import ChatTemplate
from forge.errors import CheckError, ForgeError, Problem, RecipeError
from forge.model.gguf_header import read_whole_gguf
from forge.serve import ready
from forge.serve.endpoint import Endpoint, Message
from forge.serve.ollama_talks import PLAIN, Count, choose
from forge.serve.runtime import ServerSettings
from forge.serve.runtimes import refuse_foreign
from forge.serve.talk import OfKind, Talk, by_kind
from forge.tools.ollama import Ollama, OllamaError, address_of, server_url, stops_in
from forge.tools.ollama_server import reach, watch

# More than any model has.
_ALL_LAYERS = 999
_LOOK = "Ollama's own log says more; too little memory is a common reason"

Used = Way | Literal["guessed"]


@dataclass(frozen=True)
class Proved:
    """How many prompts are the same, and of how many of them the tokens were counted."""

    prompts: int
    counted: int


@dataclass(frozen=True)
class Imported:
    """`digest` is the manifest's. `prompts` were compared, and of `counted` the tokens too.

    `way` is how the server writes them: `guessed` by a template that Ollama chose by itself. `differ` are
    texts that hardly anybody writes and that the server writes otherwise, `left_out` what was not compared.
    """

    name: str
    digest: str
    way: Used
    prompts: int
    counted: int = 0
    differ: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@contextlib.contextmanager
def serve_ollama(settings: ServerSettings, *, log: Path | None = None) -> Iterator[Endpoint]:
    """Import a GGUF and serve it; see `runtime.Runtime`. The model stays in Ollama's store afterwards.

    Its name is the new model's only when that has answered: to `settings.proof`, else to a tiny chat.
    The server is the one of OLLAMA_HOST, or at `settings.host` and `settings.port` where one of them is
    set; with another host than the default the port is Ollama's usual one.
    """
    _refuse(settings)
    ready.check_files(settings)  # the address is a server's that is there already, not a door of ours
    hand = hand_over_of(settings.model)
    if settings.modelfile:
        hand = hand.with_parameters_of(settings.modelfile)
    machine = {"num_gpu": settings.gpu_layers, "num_thread": settings.threads}
    machine |= {"num_gpu": _ALL_LAYERS} if settings.gpu_layers == -1 else {}
    fixed = {name: value for name, value in machine.items() if value is not None}
    # The context is what was asked for; a Modelfile's is of the day that the run was shipped.
    hand = replace(hand, sampling={**hand.sampling, **fixed}, context_tokens=settings.context_tokens)
    with reach(server_url(address_of(settings.host, settings.port)), log=log) as server:
        ask = settings.proof or partial(ready.prove_answer, model=settings.model, hint=_LOOK)
        imported = import_model(
            server, settings.alias, settings.model, hand, adapter=settings.adapter, ask=ask
        )
        report.info(f"Ollama has it as {imported.name}, with {named(imported.way)}")
        with watch(server.url) as why_gone:
            yield Endpoint(server.url, imported.name, why_gone=why_gone, is_ollama=True)


def _refuse(settings: ServerSettings) -> None:
    """Raise `RecipeError` for what cannot be set in a server that is not ours."""
    refuse_foreign("ollama", settings)
    others = {
        "CORS setting": (settings.cors_origins, "set OLLAMA_ORIGINS where the server starts"),
        "adapters to switch": (
            settings.adapters,
            "forge import --adapter puts one beside its model for good",
        ),
        "API key": (settings.api_key, "put a proxy that asks for one in front of it"),
        "number of parallel requests": (settings.parallel, "set OLLAMA_NUM_PARALLEL where the server starts"),
    }
    for what, (asked, hint) in others.items():
        if asked:
            raise RecipeError(f"the runtime ollama has no {what}", hint=hint)


def import_model(
    server: Ollama,
    name: str,
    gguf: Path,
    handed: HandOver,
    *,
    adapter: Path | None = None,
    count: Count | None = None,
    ask: Callable[[Endpoint], object] | None = None,
) -> Imported:
    """Make `name` the model of `gguf`, proved first under a name that nobody uses.

    `count` is of `prove_prompts`, for the plain conversations. `ask` is given the trial model: it puts the
    smoke queries, and whatever else must be right before the name changes, and raises when it is not.
    Raises `RecipeError` for a name that Ollama does not take, before anything is sent, and `CheckError` with
    the first difference of every way that was tried.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"Ollama takes no model of the name {name!r}",
            hint="letters, digits, dots, dashes and underscores, such as yoda, me/yoda or yoda:q4",
        )
    if _PLACE.fullmatch(name):
        raise RecipeError(
            f"Ollama takes {name!r} for a model that runs elsewhere: chats would go there, not to this one",
            hint="another tag, such as yoda:q4",
        )
    # Ollama checks neither: a wrong one fails when it is loaded, without a reason.
    ready.check_kinds(gguf, read_whole_gguf(gguf), [adapter] if adapter else [])
    _check_bos(gguf, handed)
    fields: dict[str, object] = {"files": {gguf.name: server.push(gguf, gguf.name)}}
    if adapter:
        fields["adapters"] = {adapter.name: server.push(adapter, adapter.name)}
    fields["parameters"] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in handed.parameters.items()
    }
    if handed.system:
        fields["system"] = handed.system
    if handed.licences:
        fields["license"] = list(handed.licences)
    failures: list[Problem] = []
    ways = _ways(server.version(), handed)
    for way in ways:
        template = {"template": handed.compiled.go} if way == "go" else {}
        if way == "go" and "jinja" in ways and not _honours_template(server, fields):
            # Proved or not, it would not be what is used.
            failures.append(Problem(_IGNORED, named(way)))
            continue
        try:
            with _scratch(server, {**fields, **template}) as made:
                used = _used(server, made, way, fields)
                prove_stops(server, made, handed.stops)
                chosen = choose(handed, way, count)
                prove = partial(prove_prompts, server, made, handed.template)
                writes_bos = None if way == "jinja" else not handed.add_bos
                usual = prove(chosen.usual, writes_bos=writes_bos)
                plain = chosen.usual[:PLAIN] if count else ()
                counted = prove(plain, writes_bos=writes_bos, count=count).counted
                odd, differ = _differing(chosen.odd, partial(prove, writes_bos=writes_bos))
                if ask:
                    ask(Endpoint(server.url, made, is_ollama=True))
                server.copy(made, name)
            compared = usual.prompts + odd
            digest = server.digest(name) or ""
            return Imported(name, digest, used, compared, counted, differ, chosen.left_out)
        except PromptsDifferError as wrong:
            failures += [replace(fault, field=f"{named(way)}: {fault.field}") for fault in wrong.problems]
            report.detail(f"{named(way)}: {wrong.message}")
    raise CheckError(
        f"Ollama's prompts are not those of the model's chat template; {name} is as it was",
        hint="serve it with llama-server, which renders the GGUF's own template: forge serve"
        if handed.template.is_pinned
        else f"forge modelfile {gguf} --guard OUT.gguf writes a copy whose dates and thinking are pinned and "
        "which Ollama takes for no other: import that",
        problems=failures or [Problem("no Go TEMPLATE is proved, and the server is older than 0.30")],
    )


class PromptsDifferError(CheckError):
    """The server writes another prompt, or stops at other texts."""


def _check_bos(gguf: Path, handed: HandOver) -> None:
    """No way hands over the right tokens where the file adds a BOS of its own."""
    reason = unseen_bos(handed.template, add_bos=handed.add_bos)
    if reason:
        raise CheckError(
            f"{gguf.name}: {reason}",
            hint="write tokenizer.ggml.add_bos_token = false into it, as forge export does",
        )


def _ways(version: tuple[int, ...], handed: HandOver) -> list[Way]:
    is_current = version >= JINJA_SINCE or not any(version)
    ways: list[Way] = ["jinja"] if is_current else []
    return [*ways, "go"] if handed.compiled.go is not None else ways


_IGNORED = (
    "this server ignores a TEMPLATE for the file, since its own Jinja knows tools or thinking; "
    "OLLAMA_GO_TEMPLATE=1, where the server starts, makes it honour one"
)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_SPACE = _PART.replace(".", "", 1)  # a namespace has no dots
_NAME = re.compile(rf"(({_PART}(:\d+)?/)?{_SPACE}/)?{_PART}(:{_PART})?")
# Tags that say where a model runs: a chat with such a name goes to Ollama's cloud, or to another model.
_PLACE = re.compile(r".*:(cloud|local|.*-cloud)", re.IGNORECASE)
_MARK = "forge asks whether TEMPLATE is used: "


def _honours_template(server: Ollama, fields: Mapping[str, Any]) -> bool:
    """Whether the server renders an explicit TEMPLATE for this file, from its own rendering."""
    asked = _MARK + "{{ range .Messages }}{{ .Content }}{{ end }}"
    with _scratch(server, {**fields, "template": asked}) as made:
        return _MARK in server.prompt(made, [{"role": "user", "content": "Hello"}])


def _used(server: Ollama, made: str, way: Way, fields: Mapping[str, Any]) -> Used:
    """The way that the server really goes for a model made without TEMPLATE: it may have put in its own."""
    return "guessed" if way != "go" and honours_its_template(server, made, fields) else way


def honours_its_template(server: Ollama, name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a Go template writes the prompts of `name`, which is made, or could be, of `fields`."""
    is_go = bool(_GO.search(str(server.show(name).get("template") or "")))
    return is_go and _honours_template(server, fields)


# What only Go's templates write; without one the server shows its usual `{{ .Prompt }}`.
_GO = re.compile(r"\{\{[^}]*\.(Messages|System|Response)\b")


def named(way: Used) -> str:
    """In words."""
    return {
        "jinja": "the GGUF's own Jinja",
        "go": "a Go TEMPLATE",
        "guessed": "a template that Ollama put in by itself",
    }[way]


@contextlib.contextmanager
def _scratch(server: Ollama, fields: Mapping[str, object]) -> Iterator[str]:
    """A model that is gone when the block ends; its blobs are shared with the name it was copied to."""
    made = f"forge-import-{secrets.token_hex(4)}"
    try:
        server.create(made, fields)
        yield made
    finally:
        with contextlib.suppress(ForgeError):
            server.delete(made)


def prove_stops(server: Ollama, name: str, stops: Sequence[str]) -> None:
    """Raise `PromptsDifferError` when the server would not stop at one of `stops`, or at others too."""
    if (shown := stops_in(server.show(name))) != set(stops):
        problem = Problem(f"{sorted(shown)} instead of {sorted(stops)}", "stops")
        raise PromptsDifferError("it stops replies at other texts", problems=[problem])


def prove_prompts(
    server: Ollama,
    name: str,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    writes_bos: bool | None,
    count: Count | None = None,
) -> Proved:
    """Raises `PromptsDifferError` at the first prompt that differs.

    `writes_bos`: whether its text begins with the template's BOS; None where either may be, since
    llama-server sees to one BOS. `count` gives how many tokens each prompt should have: then the server
    counts them too, where a second BOS would show: of the first prompt after a fresh load exactly as
    many, of the others no more, since it may count only what it had not kept from the one before. It
    gives nothing where it cannot tell.
    """
    bos = template.special_tokens.get("bos_token", "")
    rendered = [template.render(messages, add_generation_prompt=True) for messages in conversations]
    counts = count(rendered) if count else []
    compared = counted = 0
    if counts:
        server.unload(name)
    for number, (messages, whole) in enumerate(zip(conversations, rendered, strict=True), 1):
        bare = whole.removeprefix(bos)
        right = {True: (whole,), False: (bare,), None: (whole, bare)}[writes_bos]
        shown = server.prompt(name, messages)
        report.advance("compare Ollama's prompts", number, len(conversations))
        if shown not in right:
            # Of the two with and without BOS the nearer: the difference shown is then the difference.
            raise _differs(messages, max(right, key=partial(first_difference, shown)), shown)
        compared += 1
        if counts:
            wanted = counts[number - 1]
            tokens = server.chat(name, messages, options={"num_predict": 1}).get("prompt_eval_count") or 0
            if tokens > wanted or (number == 1 and tokens != wanted):
                raise _differs(messages, f"{wanted} tokens", f"{tokens} tokens")
            counted += 1
    return Proved(compared, counted)


def prove_kinds(server: Ollama, name: str, template: ChatTemplate, talks: Sequence[Talk]) -> list[OfKind]:
    """How far the server writes prompts with tools, calls and thinking as the template does.

    Nothing of it is an error: what the server makes of them is its own, and no template of ours reaches it.
    """
    bos = template.special_tokens.get("bos_token", "")
    kinds = []
    for kind, of_kind in by_kind(talks).items():
        compared, same, why = 0, 0, ""
        for talk in of_kind:
            compared += 1
            whole = talk.prompt(template)
            tools = {"tools": [dict(tool) for tool in talk.tools]} if talk.tools else {}
            try:
                shown = server.prompt(name, [_as_sent(message) for message in talk.messages], **tools)
            except OllamaError as refused:
                why = why or f"the server writes none: {refused.message}"
                continue
            if shown in (whole, whole.removeprefix(bos)):
                same += 1
            elif not why:
                trained, written = difference_of(whole, shown, "")
                why = f"trained on {trained.message}, Ollama writes {written.message}"
        kinds.append(OfKind(kind, compared, same, why))
    return kinds


def _as_sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message under Ollama's names; its arguments of calls are JSON, not text, as a template's."""
    names = {"reasoning_content": "thinking", "name": "tool_name"}
    return {names.get(key, key): value for key, value in message.items()}


def _differing(
    odd: Sequence[tuple[Message, ...]], prove: Callable[[Sequence[tuple[Message, ...]]], Proved]
) -> tuple[int, tuple[str, ...]]:
    """Of texts that hardly anybody writes: how many were compared, and those the server writes otherwise."""
    compared, messages = 0, []
    for talk in odd:
        try:
            compared += prove([talk]).prompts
        except PromptsDifferError as wrong:
            compared += 1
            messages.append(wrong.message.removesuffix(_ANOTHER))
    return compared, tuple(messages)


_ANOTHER = " the prompt is another"


def _differs(messages: Sequence[Message], expected: str, shown: str) -> PromptsDifferError:
    """The first place where two prompts part."""
    turns = ", ".join(f"{message['role']} {message['content'][:40]!r}" for message in messages)
    problems = difference_of(expected, shown, "Ollama")
    return PromptsDifferError(f"for {turns}{_ANOTHER}", problems=problems)
