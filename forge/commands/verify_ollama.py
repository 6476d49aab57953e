"""`forge verify --ollama`: a model that lives in an Ollama, against the base and adapter that it should be.

The server is asked what it would give to the model; the weights are read where its store is on this machine.
The model stays as it is: to learn which template counts, another one is made of it and deleted.

Not covered: prompts with tools, thinking or images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from forge import report
from forge.chat.beginning import with_beginning
from forge.chat.hand_over import HandOver, hand_over_of, sampling_of
from forge.chat.modelfile import Modelfile, Parameter, parse_modelfile
from forge.codec import to_plain
from forge.commands.verify import Files, Terms, judged_on
from forge.errors import CheckError, DataError, Problem
from forge.model.tokenizer_files import open_tokenizer
from forge.resolve.bases import directory_of
from forge.resolve.taught import trained_tokenizer
from forge.serve.ollama import PromptsDifferError, Used, honours_its_template, named, prove_prompts
from forge.serve.ollama_talks import PLAIN, choose
from forge.store.artifacts import open_store
from forge.store.digest import file_digest
from forge.tools.ollama import Ollama, server_url, stops_in
from forge.tools.ollama_server import reach

# Ollama's own, where a model sets none.
_CONTEXT = 4096
# Families whose prompts the server's own code writes, without a RENDERER.
_HARMONY = ("gptoss", "gpt-oss")


@dataclass(frozen=True)
class InOllama:
    """What the server says of a model, and how far that is the base's.

    `way` is which template counts; `prompts` were compared, and the tokens of `counted`. `differ` is what is
    wrong, `notes` what only a reader can judge, `not_proved` what could not be looked at.
    """

    name: str
    url: str
    digest: str
    way: Used | Literal["renderer"]
    prompts: int
    counted: int
    parameters: Mapping[str, Parameter]
    differ: tuple[Problem, ...]
    notes: tuple[str, ...]
    not_proved: tuple[str, ...]


def certify_in_ollama(name: str, host: str | None, files: Files, terms: Terms) -> Mapping[str, object]:
    """Compare prompts, stops and weights of the model `name`; `files` says what it should be made of.

    Raises `DataError` for a name that is not there, `CheckError` for what differs or cannot be proved.
    """
    with reach(server_url(host)) as server:
        served = parse_modelfile(str(_shown(server, name).get("modelfile") or ""))
        model = _compare(server, name, served, files)
    _show(model)
    blob, not_here = _weights(served, files)
    judged = judged_on(blob, terms) if blob else None
    model = replace(model, not_proved=(*model.not_proved, *not_here))
    problems = [*model.differ, *(Problem(problem) for problem in (judged.problems if judged else ()))]
    problems += [Problem(leg, "not proved") for leg in not_here]
    plain = judged.plain() if judged else {}
    fields = {**plain, "ok": not problems, "ollama": to_plain(model)}
    if problems:
        failure = CheckError(
            f"{name} in Ollama is not the base and adapter that it should be"
            if model.differ or judged
            else f"the weights of {name} in Ollama are not proved; its prompts and stops are the base's",
            hint=(judged.remedy if judged and not judged.ok else "")
            or ("import it again: forge import" if model.differ else _ELSEWHERE),
            problems=problems,
        )
        failure.fields = fields
        raise failure
    report.success(f"{name} in Ollama has this base's prompts, stops and weights")
    report.result(fields)
    return fields


_ELSEWHERE = "run this on the server's machine, or verify the file that it was made from: --gguf"


def _shown(server: Ollama, name: str) -> Mapping[str, Any]:
    if server.digest(name) is None:
        raise DataError(f"Ollama at {server.url} has no model {name}", hint="ollama list shows those it has")
    return server.show(name)


def _compare(server: Ollama, name: str, served: Modelfile, files: Files) -> InOllama:
    base = directory_of(files.base)
    trained = trained_tokenizer(base, files.adapter).directory
    handed = _as_served(hand_over_of(trained), served)
    tokenizer = open_tokenizer(trained)

    def count(texts: Sequence[str]) -> Sequence[int]:
        return [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]

    shown = server.show(name)
    way = _way(server, name, served, shown)
    chosen = choose(handed, "go" if way == "go" and handed.compiled.go else "jinja", count)
    differ = list(_stops_that_lack(handed, stops_in(shown)))
    prompts = counted = 0
    try:
        prove = partial(prove_prompts, server, name, handed.template, writes_bos=None)
        prompts = prove(chosen.usual).prompts
        counted = prove(chosen.usual[:PLAIN], count=count).counted
    except PromptsDifferError as wrong:
        differ += [replace(problem, field=f"{wrong.message}: {problem.field}") for problem in wrong.problems]
    return InOllama(
        name,
        server.url,
        server.digest(name) or "",
        way,
        prompts,
        counted,
        served.parameters,
        tuple(differ),
        tuple(_notes(served, stops_in(shown) - set(handed.stops), sampling_of(base))),
        chosen.left_out,
    )


def _as_served(handed: HandOver, served: Modelfile) -> HandOver:
    """What the base's template writes behind this model's SYSTEM and MESSAGEs, in its context."""
    turns = [{"role": role, "content": content} for role, content in served.messages]
    source = with_beginning(handed.template.source, served.system, turns)
    context = served.parameters.get("num_ctx")
    return replace(
        handed,
        template=replace(handed.template, source=source),
        context_tokens=context if isinstance(context, int) else handed.context_tokens,
    )


def _way(
    server: Ollama, name: str, served: Modelfile, shown: Mapping[str, Any]
) -> Used | Literal["renderer"]:
    facts = shown.get("model_info")
    architecture = facts.get("general.architecture") if isinstance(facts, Mapping) else None
    if served.renderer or architecture in _HARMONY:
        return "renderer"
    return "go" if honours_its_template(server, name, {"from": name}) else "jinja"


def _stops_that_lack(handed: HandOver, stops: set[str]) -> Iterator[Problem]:
    for stop in handed.stops:
        if stop not in stops:
            yield Problem(f"no stop for {stop}: a reply may not end", "stops")


def _notes(served: Modelfile, more_stops: set[str], usual: Mapping[str, Parameter]) -> Iterator[str]:
    """What the base does not say, and is no fault."""
    if served.system:
        yield f"SYSTEM stands in front of conversations without one: {served.system[:60]!r}"
    if served.messages:
        yield f"{len(served.messages)} MESSAGEs stand in front of every conversation"
    if more_stops:
        yield f"it stops at {', '.join(sorted(more_stops))} too"
    if "num_ctx" not in served.parameters:
        yield f"no num_ctx: {_CONTEXT} tokens on most machines, and older turns are cut without a word"
    for name, value in served.parameters.items():
        if name not in ("stop", "num_ctx") and value != usual.get(name):
            yield f"{name} is {value}, of the base's own {usual.get(name, 'none')}"


def _show(model: InOllama) -> None:
    words = "the server's own code (RENDERER)" if model.way == "renderer" else named(model.way)
    report.info(f"{model.name}: its prompts are written by {words}")
    if model.prompts:
        report.info(f"{model.prompts} prompts compared, the tokens of {model.counted} counted")
    for note in model.notes:
        report.info(note)
    if model.not_proved:
        report.info(f"not compared: {'; '.join(model.not_proved)}")


def _weights(served: Modelfile, files: Files) -> tuple[Files | None, tuple[str, ...]]:
    """The files in the server's store, or why they are not looked at."""
    if served.adapter and not files.adapter:
        raise DataError(
            "the model has an ADAPTER of its own", hint="name the one that it was made from: --adapter"
        )
    for blob in filter(None, (served.base, served.adapter)):
        if why := unread_because(blob):
            return None, (why,)
    lora = Path(served.adapter) if served.adapter else None
    return replace(files, gguf=Path(served.base), lora=lora), ()


def unread_because(blob: str) -> str | None:
    """Why the file in a server's store is not the one that its path says; None where it is."""
    path = Path(blob)
    if not path.is_file():
        return f"its weights: {blob} is not on this machine"
    # A path is the server's word; the bytes are known by their digest.
    if path.name != f"sha256-{file_digest(path, open_store(read_only=True).digests)}":
        return f"its weights: {blob} has not the bytes that its name says"
    return None
