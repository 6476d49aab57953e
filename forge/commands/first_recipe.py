"""The first recipe for a base and some rows: what is chosen, each choice with its reason as a comment.

Looks at the rows as a ship would read them and, where the base is on this machine, encodes some with its
template. Not covered: what only training shows (learning rate, epochs), which start at usual values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from forge.chat.template import ChatTemplate
from forge.codec import Json
from forge.data.conversation import Conversation
from forge.data.layout import TEXT
from forge.data.problems import BadRows
from forge.data.prompt_format import prompt_format
from forge.data.reading import Read, read, refuse_absent, refuse_unheard
from forge.data.split import split
from forge.data.tokens import encode_all
from forge.errors import DataError
from forge.model.base import ResolvedBase
from forge.model.checkpoint import open_checkpoint
from forge.model.config import read_configuration
from forge.model.tokenizer_files import TokenizerFiles, open_tokenizer, read_tokenizer
from forge.recipe.checks import local_path
from forge.recipe.load import load
from forge.resolve.bases import find_base
from forge.resolve.sources import data_sources
from forge.resolve.taught import template_text

_ENCODED = 500
_SMALL = 1_000_000_000
_TINY = 500_000_000


@dataclass(frozen=True)
class RowsFit:
    """What the rows are to the base: the longest of those encoded, and which answers can be learned.

    `chat_template` names what the base lacks, and `why` says why that one; empty where it has its own.
    """

    parameters: int
    context: int | None
    longest: int
    supervise: str
    chat_template: str = ""
    why: str = ""
    variables: Mapping[str, Json] = field(default_factory=dict)
    """Those of the template that every row has alike."""


@dataclass(frozen=True)
class _Rows:
    """The rows, those of them that are held out, and what the recipe is to say of them."""

    read: Read
    training: Sequence[Conversation]
    heldout: Sequence[Conversation]
    settings: Mapping[str, Json]
    evaluation: tuple[float | str, str]

    @property
    def is_text(self) -> bool:
        return self.read.reading.format == TEXT


def first_recipe(name: str, base: str, data: str, directory: Path, overrides: Sequence[str] = ()) -> str:
    """The text of a recipe; raises `DataError` for rows or a base that no recipe could ship.

    `overrides` are settings of `data` as `-o` takes them, which the recipe gets; `RecipeError` for one that
    there is not.
    """
    rows = _rows(data, directory, overrides)
    headers = find_base(base, fetch=False, relative_to=Path())
    fit = _fit(headers, rows.training, is_text=rows.is_text)
    return "\n".join(_lines(name, _named(base, directory), rows, fit)) + "\n"


def _rows(data: str, directory: Path, overrides: Sequence[str]) -> _Rows:
    source = json.dumps(data)
    text = f"name: rows\nbase: builtin:tiny\ndata: {{source: {source}}}\n"
    asked = load(Path("rows.yaml"), overrides, text=text)  # what the command line names is relative to here
    chosen = asked.recipe.data
    assert chosen is not None
    (its_source,), heldout = data_sources(asked, offline=False, fetch=True)
    rows = read(its_source, limit=chosen.limit, bad=BadRows(chosen.skip_bad_rows))
    refuse_absent([rows])
    settings = {**chosen.model_dump(mode="json", exclude_unset=True), "source": _named(data, directory)}
    usual, why = _held_out(len(rows.conversations))
    refuse_unheard([rows])
    share = heldout if "eval" in settings else usual
    evaluation: tuple[float | str, str] = usual, why
    if "eval" in settings:
        named = settings.pop("eval")
        evaluation = _named(named, directory) if isinstance(named, str) else named, "as asked for"
    if isinstance(share, Path):
        file = replace(its_source, files=(share,), split="train", weight=1.0)
        return _Rows(rows, rows.conversations, read(file).conversations, settings, evaluation)
    training, held = split(rows.conversations, share, chosen.seed)
    return _Rows(rows, training, held, settings, evaluation)


def _named(path: str, directory: Path) -> str:
    """A file or a base as the recipe names it: relative to the recipe's own directory."""
    is_pattern = any(mark in path for mark in "*?[")
    if path.startswith("builtin:") or Path(path).expanduser().is_absolute():
        return path
    if local_path(path, Path()) is None and not is_pattern:
        return path
    return os.path.relpath(Path(path).absolute(), directory.absolute())


def _held_out(rows: int) -> tuple[float, str]:
    if rows < 2:
        return 0, "one row: nothing can be held out, so nothing is measured"
    if rows < 10:
        return 1, "one row: a tenth of so few is none"
    if rows > 5000:
        return 500, "enough to measure on; the rest is learned"
    return 0.1, "a tenth, held out to measure what was learned"


def _fit(base: ResolvedBase, rows: Sequence[Conversation], *, is_text: bool) -> RowsFit | None:
    """None where the base is not on this machine."""
    if base.directory is None:
        return None
    configuration = read_configuration(base.directory)
    files = read_tokenizer(base.directory, max_positions=configuration.max_positions)
    parameters = sum(tensor.numel for tensor in open_checkpoint(base.directory).tensors.values())
    name, why, text = "", "", files.chat_template
    if text is None:
        if is_text:
            return RowsFit(parameters, configuration.max_positions, 0, "all")
        name, why = _missing_template(files)
        text = template_text(name, Path(), files.templates)
    template = ChatTemplate(text, files.template_tokens)
    variables = _alike(rows, template)
    template = replace(template, variables=variables)
    form = prompt_format(template, open_tokenizer(files.directory))
    some = rows[:_ENCODED]
    try:
        encoded, supervise = encode_all(some, form), "all"
    except DataError as every:
        try:
            encoded, supervise = encode_all(some, form, supervise="last"), "last"
        except DataError:
            raise every from None
    longest = max(len(row.input_ids) for row in encoded)
    return RowsFit(parameters, configuration.max_positions, longest, supervise, name, why, variables)


def _alike(rows: Sequence[Conversation], template: ChatTemplate) -> dict[str, Json]:
    """The template's variables that every row has, and with one value."""
    each = [row.variables.values if row.variables else {} for row in rows]
    first = each[0] if each else {}
    return {
        name: first[name]
        for name in sorted(template.names & first.keys())
        if isinstance(first[name], (str, int, float)) and all(row.get(name) == first[name] for row in each)
    }


def _missing_template(files: TokenizerFiles) -> tuple[str, str]:
    """The chat template for a tokenizer without a default one, and why that."""
    if files.templates:
        return min(
            files.templates
        ), f"the base's own are {', '.join(sorted(files.templates))}; none is its default"
    return "alpaca", "the base has none; this one is of words and EOS, so no token is added"


def _lines(name: str, base: str, rows: _Rows, fit: RowsFit | None) -> Iterator[str]:
    count, notes, heldout = len(rows.training), rows.read.reading.notes, rows.heldout
    source, evaluation = json.dumps(rows.settings["source"]), rows.evaluation
    yield f"# By forge init, of {json.dumps(base)} and {source}. Next: forge plan {name}.yaml"
    yield f"name: {json.dumps(name)}"
    size = f"  # {fit.parameters:,} parameters" if fit else "  # not here yet"
    if fit and fit.chat_template:
        yield "base:"
        yield f"  id: {json.dumps(base)}{size}"
        yield f"  chat_template: {json.dumps(fit.chat_template)}  # {fit.why}"
    else:
        yield f"base: {json.dumps(base)}{size}"
    yield "data:"
    for key, value in rows.settings.items():
        yield f"  {key}: {json.dumps(value, ensure_ascii=False)}"
    yield f"  # {rows.read.line}"
    yield from (f"  # {number} rows: {note}" for note, number in notes.counts.items())
    if notes.unused:
        yield f"  # not used: {', '.join(notes.unused)}"
    yield f"  eval: {json.dumps(evaluation[0])}  # {evaluation[1]}"
    if fit and fit.context and fit.longest > fit.context and "overlong" not in rows.settings:
        way = "chunk" if rows.is_text else "drop"
        yield f"  overlong: {way}  # a row has {fit.longest:,} tokens, the base {fit.context:,} positions"
    yield from _training(count, fit)
    if fit and fit.parameters < _TINY:
        yield "export:"
        yield "  quant: q8_0  # of a small base fewer bits save little, and change many answers"
    if not heldout or len(rows.read.conversations) < 20:
        yield "verify:"
        yield "  learned: warn  # so few rows show little"
    asked = [] if rows.is_text else (heldout or rows.training)[:2]
    questions = [line for conversation in asked for line in _query(conversation)]
    if questions:
        yield f"smoke:  # {'held-out rows' if heldout else 'rows'}, asked of the served model"
        yield from questions


def _training(count: int, fit: RowsFit | None) -> Iterator[str]:
    small = fit is not None and fit.parameters < _SMALL
    reason = "small enough to train in 16 bits" if small else "the base in 4 bits: a seventh of the memory"
    epochs = 3 if count >= 1000 else 5 if count >= 200 else 10
    batch = max(1, min(8, count // 4))
    yield "train:"
    yield f"  method: {'lora' if small else 'qlora'}  # {reason}"
    yield f"  epochs: {epochs}  # {count * epochs // batch:,} steps or so of {batch} rows"
    yield f"  batch_size: {batch}"
    if fit and fit.variables:
        yield f"  template_variables: {json.dumps(fit.variables, ensure_ascii=False)}  # as every row has it"
    if fit and fit.supervise == "last":
        yield "  supervise: last  # the template writes earlier answers otherwise than it prompts for them"


def _query(conversation: Conversation) -> Iterator[str]:
    turns = conversation.turns[:-1]
    plain = all(turn.role in ("system", "user", "assistant") and not turn.tool_calls for turn in turns)
    while turns and turns[-1].role != "user":
        turns = turns[:-1]
    if not plain or not turns or conversation.tools:
        return
    if len(turns) == 1:
        yield f"  - prompt: {json.dumps(turns[0].content, ensure_ascii=False)}"
    else:
        yield "  - messages:"
        for turn in turns:
            content = json.dumps(turn.content, ensure_ascii=False)
            yield f"      - {{role: {turn.role}, content: {content}}}"
