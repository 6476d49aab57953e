"""The Modelfile: Ollama's file format, read and written by the rules of its own parser.

`parse` walks the text as Ollama's `parser/parser.go` does; `render` tries the forms of a value and takes
the first that this parser reads back as the same text. What no form can hold (a character that Go
cannot print, a line that ends in three quotes) is refused: HTTP carries it (`forge import`).
The rules: https://docs.ollama.com/modelfile and `parser/parser.go`; parameters: `api/types.go`.

Not covered: the blobs that `FROM @sha256:...` names; what a native RENDERER or PARSER does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from forge.errors import DataError

_INTEGERS = {
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "num_keep", "seed",
    "num_predict", "top_k", "repeat_last_n",
}  # fmt: skip
_NUMBERS = {
    "top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty",
}  # fmt: skip
_SWITCHES = {"use_mmap"}
_IGNORED = {
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat",
    "mirostat_tau", "mirostat_eta",
}  # fmt: skip
OLLAMA_PARAMETERS = frozenset(_INTEGERS | _NUMBERS | _SWITCHES | _IGNORED | {"stop"})
"""Every parameter of Ollama's, as a Modelfile or the options of a request name it."""
_ROLES = ("system", "user", "assistant")
_SINGLE = ("adapter", "draft", "template", "system", "renderer", "parser", "requires")
_TRUTHS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
_HINT = "`forge import` hands it to the server over HTTP, which carries every text"

Parameter = int | float | bool | tuple[str, ...]


class ModelfileError(DataError):
    """A text that is no Modelfile, or that no Modelfile can hold."""


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says. `base` is its FROM; `parameters` by name, `stop` as a tuple of texts.

    `notes` say what the reader would do in silence: a parameter that is ignored, a value that a later
    one replaces.
    """

    base: str
    template: str | None = None
    system: str | None = None
    adapter: str | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    licences: tuple[str, ...] = ()
    requires: str | None = None
    renderer: str | None = None
    parser: str | None = None
    draft: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def stops(self) -> tuple[str, ...]:
        stop = self.parameters.get("stop", ())
        return stop if isinstance(stop, tuple) else ()


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile; raises `ModelfileError` with the line where it cannot be read."""
    fields: dict[str, str] = {}
    parameters: dict[str, Parameter] = {}
    messages: list[tuple[str, str]] = []
    licences: list[str] = []
    notes: list[str] = []
    for line, command, value in _commands(text):
        name, _, rest = command.partition(" ")
        if name == "parameter":
            _add_parameter(parameters, rest, value, line, notes)
        elif name == "message":
            messages.append((rest, value))
        elif name == "license":
            licences.append(value)
        else:
            if name in fields:
                notes.append(f"line {line}: this {name.upper()} replaces an earlier one")
            fields[name] = value
    if "from" not in fields:
        raise ModelfileError("the Modelfile has no FROM", hint="its first line names a GGUF or a model")
    single = {name: fields.get(name) for name in _SINGLE}
    return Modelfile(
        base=fields["from"], parameters=parameters, messages=tuple(messages), licences=tuple(licences),
        notes=tuple(notes), **single,
    )  # fmt: skip


def _commands(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, lower-case name with its parameter or role, value) of each instruction."""
    position, text = 0, text.removeprefix("\ufeff")
    while True:
        position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n"))
        if position == len(text):
            return
        line = len(re.findall(r"\r\n|\r|\n", text[:position])) + 1
        if text[position] == "#":
            position = _line_end(text, position)
            continue
        name, position = _word(text, position, r"[A-Za-z]+", line, "an instruction")
        name = name.lower()
        if name not in {"from", "parameter", "message", "license", *_SINGLE}:
            raise ModelfileError(f"line {line}: {name.upper()} is no instruction of a Modelfile")
        if name == "parameter":
            word, position = _word(text, position, r"[A-Za-z0-9_]+", line, "a parameter's name")
            name = f"parameter {word}"
        elif name == "message":
            word, position = _word(text, position, r"[A-Za-z]+", line, "a role")
            if word not in _ROLES:
                raise ModelfileError(f"line {line}: a MESSAGE is of {', '.join(_ROLES)}, not of {word}")
            name = f"message {word}"
        value, position = _value(text, position, line)
        yield line, name, value


def _word(text: str, position: int, pattern: str, line: int, what: str) -> tuple[str, int]:
    """A word that white space follows; one space after it is taken."""
    match = re.compile(rf"({pattern})[ \t]").match(text, position)
    if not match:
        shown = text[position : _line_end(text, position)][:40]
        raise ModelfileError(f"line {line}: {what} and its value were expected, not {shown!r}")
    return match[1], match.end()


def _line_end(text: str, position: int) -> int:
    match = re.compile(r"[\r\n]").search(text, position)
    return match.start() if match else len(text)


def _value(text: str, position: int, line: int) -> tuple[str, int]:
    """Everything up to the first line end at which its quotes are closed."""
    start, end = position, _line_end(text, position)
    while True:
        # Nothing closes at a line that does not end with a quote; asked first, for long licences.
        ends = start == position or _kept(text[start:end]).endswith('"')
        if ends and (value := _unquoted(_kept(text[position:end]))) is not None:
            return value, end
        if end == len(text):
            raise ModelfileError(f"line {line}: the quotes of this value are not closed")
        start, end = end + 1, _line_end(text, end + 1)


def _kept(text: str) -> str:
    return "".join(filter(_survives, text)).strip()


def _survives(character: str) -> bool:
    """What Go's strconv.IsPrint refuses is dropped without a word; white space is let in."""
    return character in " \t\r\n" or character.isprintable()


def _unquoted(text: str) -> str | None:
    """The text inside its quotes; None while they are open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def _add_parameter(
    parameters: dict[str, Parameter], name: str, value: str, line: int, notes: list[str]
) -> None:
    if name in _IGNORED:
        notes.append(f"line {line}: the server ignores PARAMETER {name}")
    elif name == "stop":
        stops = parameters.get("stop", ())
        assert isinstance(stops, tuple)
        parameters["stop"] = (*stops, value)
    else:
        if name in parameters:
            notes.append(f"line {line}: this PARAMETER {name} replaces an earlier one")
        parameters[name] = _typed(name, value, line)


def _typed(name: str, value: str, line: int) -> Parameter:
    kinds = {"int": _INTEGERS, "float": _NUMBERS, "bool": _SWITCHES}
    kind = next((kind for kind, names in kinds.items() if name in names), None)
    if kind is None:
        raise ModelfileError(f"line {line}: unknown parameter {name}")
    try:
        if kind == "bool":
            return _TRUTHS[value.lower()]
        return int(value) if kind == "int" else float(value)
    except (ValueError, KeyError):
        raise ModelfileError(
            f"line {line}: PARAMETER {name}: invalid {kind} value [{value}]",
            hint="a comment stands on a line of its own" if "#" in value else "",
        ) from None


def modelfile_text(modelfile: Modelfile) -> str:
    """The file's text, which `parse` reads as the same; raises `ModelfileError` for what it cannot hold."""
    lines = []
    if modelfile.requires is not None:
        lines.append(f"REQUIRES {_written('REQUIRES', modelfile.requires)}")
    lines.append(f"FROM {_written('FROM', modelfile.base)}")
    single = {name: getattr(modelfile, name) for name in _SINGLE if name != "requires"}
    lines += [
        f"{name.upper()} {_written(name.upper(), value)}"
        for name, value in single.items()
        if value is not None
    ]
    for name, parameter in modelfile.parameters.items():
        lines += [f"PARAMETER {name} {text}" for text in _parameter_texts(name, parameter)]
    lines += [f"MESSAGE {role} {_written('MESSAGE', text)}" for role, text in modelfile.messages]
    lines += [f"LICENSE {_written('LICENSE', text)}" for text in modelfile.licences]
    text = "\n".join(lines) + "\n"
    if parse_modelfile(text) != modelfile:
        raise ModelfileError("this cannot be written as a Modelfile that reads back the same", hint=_HINT)
    return text


def _parameter_texts(name: str, value: Parameter) -> Sequence[str]:
    if isinstance(value, tuple):
        return [_written(f"PARAMETER {name}", item, plain=False) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _written(what: str, text: str, *, plain: bool = True) -> str:
    """`text` as a value: bare, in quotes or in triple quotes, whichever is read back as it is."""
    forms = [f'"{text}"', f'"""{text}"""']
    if "\n" in text or '"' in text:
        forms.reverse()
    for form in [text, *forms] if plain and "\n" not in text else forms:
        try:
            if _value(f"{form}\nFROM x", 0, 1) == (text, len(form)):
                return form
        except ModelfileError:
            continue
    lost = sorted({character for character in text if not _survives(character)})
    shown = ", ".join(f"U+{ord(character):04X}" for character in lost)
    why = f"Ollama drops {shown} from it" if lost else 'a line of it ends in """ or the like'
    raise ModelfileError(f"a Modelfile cannot hold this {what}: {why}", hint=_HINT)
