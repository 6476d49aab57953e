"""All that Ollama needs to know of a model, as one value: for its Modelfiles and for the import over HTTP.

Two ways, both with every stop and the context written out: `go`, a TEMPLATE where `format_check` proved
one, for any server; `jinja`, the GGUF's own template, for servers since 0.30. Sampling is what the recipe
asks for, else the base's generation_config.json, or the GGUF's own keys, or nothing. A stop or a licence
that no Modelfile can hold is left out of it, with a remark, and goes to the server over HTTP.

Not covered: tools and thinking: neither template is claimed to write them (`NOT_CLAIMED` says so).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from forge import report
from forge.chat.format_check import NOT_CLAIMED, CompiledTemplate, compile_template, limit_names
from forge.chat.format_source import read_source
from forge.chat.modelfile import Modelfile, ModelfileError, Parameter, modelfile_text, parse_modelfile
from forge.chat.template import ChatTemplate
from forge.errors import CheckError, DataError, Problem
from forge.model.config import read_configuration, read_json
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.model.tokenizer_files import read_tokenizer

MODELFILE = "Modelfile"
MODELFILE_JINJA = "Modelfile.jinja"
# Since this version the server runs llama-server, which renders the GGUF's own Jinja.
JINJA_SINCE = (0, 30)
_REQUIRES = ".".join(map(str, JINJA_SINCE))
_CONTEXT = 4096
# general.sampling.* -> Ollama and llama-server; samplers that Ollama lacks (xtc) are not here.
SAMPLING_IN_GGUF = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "penalty_repeat": "repeat_penalty", "penalty_last_n": "repeat_last_n",
}  # fmt: skip
# generation_config.json -> Ollama.
_SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "typical_p": "typical_p", "repetition_penalty": "repeat_penalty",
}  # fmt: skip

Way = Literal["go", "jinja"]


@dataclass(frozen=True)
class HandOver:
    """`add_bos`: the GGUF's tokenizer writes BOS by itself, so that TEMPLATE must not."""

    template: ChatTemplate
    add_bos: bool
    compiled: CompiledTemplate
    stops: tuple[str, ...]
    context_tokens: int
    sampling: Mapping[str, Parameter] = field(default_factory=dict)
    licences: tuple[str, ...] = ()
    system: str | None = None
    """The template writes it where a conversation has none; for Ollama, which shows it and lets it change."""

    @property
    def bos(self) -> str:
        return self.template.special_tokens.get("bos_token", "")

    @property
    def parameters(self) -> dict[str, Parameter]:
        stops = {"stop": self.stops} if self.stops else {}
        return {**stops, "num_ctx": self.context_tokens, **self.sampling}

    def modelfile(self, way: Way, file: str, *, adapter: str | None = None) -> Modelfile:
        """What a Modelfile says for `file`; the `go` way is there only where it was proved."""
        return Modelfile(
            base=file,
            adapter=adapter,
            template=self.compiled.go if way == "go" else None,
            system=self.system if _is_writable(system=self.system) else None,
            parameters=self.parameters,
            licences=self.licences,
            requires=_REQUIRES if way == "jinja" else None,
        )

    def with_parameters_of(self, modelfile: Modelfile) -> HandOver:
        """The same template with the stops, context, sampling and licences that a Modelfile sets."""
        others = {key: value for key, value in modelfile.parameters.items() if key not in ("stop", "num_ctx")}
        context = modelfile.parameters.get("num_ctx", self.context_tokens)
        return replace(
            self,
            stops=tuple(dict.fromkeys((*modelfile.stops, *self.stops))),
            context_tokens=context if isinstance(context, int) else self.context_tokens,
            sampling=others,
            licences=modelfile.licences or self.licences,
            system=modelfile.system or self.system,
        )

    def facts(self) -> HandOverFacts:
        """What could be proved and what is written."""
        return HandOverFacts(
            status=self.compiled.status,
            stops=self.stops,
            limits=tuple(limit_names(self.compiled.limits)),
            default_system=self.compiled.chat.default_system if self.compiled.chat else None,
            context_tokens=self.context_tokens,
            sampling=self.sampling,
            licences=len(self.licences),
            day=day_in(self.template),
            variables_read=tuple(self.template.variables_read()),
            not_claimed=tuple(NOT_CLAIMED),
        )


@dataclass(frozen=True)
class HandOverFacts:
    """A hand-over for people and manifests: `day` is as in `day_in`, `licences` how many there are."""

    status: str
    stops: tuple[str, ...]
    limits: tuple[str, ...]
    default_system: str | None
    context_tokens: int
    sampling: Mapping[str, Parameter]
    licences: int
    day: str | None
    variables_read: tuple[str, ...]
    not_claimed: tuple[str, ...]


def day_in(template: ChatTemplate) -> str | None:
    """The day that a template is given; None when it asks for none."""
    return template.day if "strftime_now" in template.source else None


def prefers_jinja(source: str) -> bool:
    """Whether Ollama since 0.30 renders this Jinja and ignores a TEMPLATE that knows no tools, as ours.

    It looks for words, remarks included. https://github.com/ollama/ollama, server/images.go.
    """
    if "tools" in source or "tool_call" in source:
        return True
    if "<think>" in source and "</think>" in source:
        return True
    cuts_thinking = re.search(r"""content\.split\((['"])</think>\1\)""", source)
    return bool(cuts_thinking) and not any(word in source for word in ("reasoning_content", "<SPECIAL_12>"))


def hand_over(
    template: ChatTemplate,
    *,
    add_bos: bool,
    stops: Sequence[str],
    context_tokens: int,
    sampling: Mapping[str, Parameter] | None = None,
    licences: Sequence[str] = (),
    system: str | None = None,
) -> HandOver:
    """Compile the template, which writes `system` by itself; `stops` are what ends a reply, none twice."""
    compiled = compile_template(template, add_bos=add_bos)
    unique = tuple(dict.fromkeys(stop for stop in stops if stop))
    return HandOver(
        template, add_bos, compiled, unique, context_tokens, sampling or {}, tuple(licences), system
    )


def hand_over_of(path: Path, *, bos: str | None = None, eos: str | None = None) -> HandOver:
    """That of a GGUF file, a model's directory or a .jinja file; raises `DataError` as `read_source` does."""
    source = read_source(path, bos=bos, eos=eos)
    handed = hand_over(source.template, add_bos=source.add_bos, stops=(), context_tokens=_CONTEXT)
    if path.is_dir():
        tokenizer = read_tokenizer(path, max_positions=_most_positions(path))
        ends = [tokenizer.tokens.get("eos", "")]
        context = min(tokenizer.model_max_length or _CONTEXT, _CONTEXT)
        sampling, licences = sampling_of(path), licences_of(path)
    elif path.suffix == ".jinja":
        ends, context, sampling, licences = [], _CONTEXT, {}, ()
    else:
        header = read_gguf(path)
        ends = list(end_tokens(header).values())
        most = header.metadata.get(f"{header.architecture}.context_length")
        context = min(most, _CONTEXT) if isinstance(most, int) else _CONTEXT
        named = header.metadata.get("general.license")
        sampling, licences = sampling_in(header), (named,) if isinstance(named, str) else ()
    stops = tuple(dict.fromkeys(stop for stop in (*handed.compiled.stops, *ends) if stop))
    if not stops:
        raise DataError(f"{path}: nothing says what ends a reply, so it would never end")
    return replace(handed, stops=stops, context_tokens=context, sampling=sampling, licences=licences)


def _most_positions(directory: Path) -> int | None:
    """The model's; None for a directory that has only the tokenizer, or a model of no known kind."""
    try:
        return read_configuration(directory).max_positions
    except DataError:
        return None


def end_tokens(header: GgufHeader) -> dict[str, str]:
    """The texts of a GGUF's `eos` and `eot` tokens, those that it names."""
    vocabulary = header.array("tokenizer.ggml.tokens")
    ids = {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    return {
        name: str(vocabulary[number])
        for name, number in ids.items()
        if isinstance(number, int) and number < len(vocabulary)
    }


def sampling_of(directory: Path, asked: Mapping[str, int | float] | None = None) -> dict[str, Parameter]:
    """What generation_config.json asks for where it samples, with what is `asked` over it.

    Else nothing, and the server's own holds.
    """
    path = directory / "generation_config.json"
    configured = read_json(path) if path.is_file() else {}
    configured = {**(configured if configured.get("do_sample") else {}), **(asked or {})}
    return {
        ours: configured[name]
        for name, ours in _SAMPLING.items()
        if isinstance(configured.get(name), int | float) and not isinstance(configured[name], bool)
    }


def sampling_in(header: GgufHeader) -> dict[str, Parameter]:
    """The file's own `general.sampling` keys: llama.cpp's server takes these for its defaults."""
    written = {
        ours: header.metadata.get(f"general.sampling.{name}") for name, ours in SAMPLING_IN_GGUF.items()
    }
    return {
        # A float32 is written with the digits that it has.
        name: float(f"{value:.7g}") if isinstance(value, float) else value
        for name, value in written.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def refuse_other_sampling(header: GgufHeader, asked: Mapping[str, int | float]) -> None:
    """Raise `CheckError` where the GGUF, from which servers take their defaults, says other than `asked`."""
    written = sampling_in(header)
    in_file = {name: written.get(_SAMPLING[name]) for name in asked}
    other = [
        Problem(f"the GGUF says {in_file[name]}, asked for is {value}", f"model.sampling.{name}")
        for name, value in asked.items()
        if not _is_near(in_file[name], value)
    ]
    if other:
        raise CheckError(
            "the GGUF does not carry the sampling that was asked for",
            hint="this should not be: please report it",
            problems=other,
        )


def _is_near(stated: Parameter | None, asked: float) -> bool:
    """Whether it is that number, as float32 has it."""
    return isinstance(stated, int | float) and math.isclose(stated, asked, rel_tol=1e-6)


def licences_of(directory: Path) -> tuple[str, ...]:
    """The licence files of a base, whole."""
    paths = sorted({*directory.glob("LICENSE*"), *directory.glob("LICENCE*")})
    contents = [path.read_bytes() for path in paths if path.is_file()]
    # Other files than text have zeros, as a PDF does.
    return tuple(content.decode(errors="replace").strip() for content in contents if b"\0" not in content)


@dataclass(frozen=True)
class LeftOut:
    """What no Modelfile can hold, and a server takes over HTTP."""

    stops: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stops or self.licences)

    def __str__(self) -> str:
        """One line of printable ASCII, for a comment or a warning."""
        lines = [f"PARAMETER stop {json.dumps(stop)}" for stop in self.stops]
        lines += [f"LICENSE {json.dumps(f'{text[:40]}...')}" for text in self.licences]
        return f"left out, since no Modelfile can hold it: {', '.join(lines)}; forge import hands it over"

    def put_back(self, modelfile: Modelfile) -> Modelfile:
        """The Modelfile with all that was meant: nothing to write, all that a server must know."""
        stops = {"stop": (*modelfile.stops, *self.stops)} if self.stops else {}
        return replace(
            modelfile,
            parameters={**modelfile.parameters, **stops},
            licences=(*modelfile.licences, *self.licences),
        )


def without_unwritable(handed: HandOver) -> tuple[HandOver, LeftOut]:
    """`handed` as far as a Modelfile can hold it, and the rest."""
    left = LeftOut(
        tuple(stop for stop in handed.stops if not _is_writable(parameters={"stop": (stop,)})),
        tuple(text for text in handed.licences if not _is_writable(licences=(text,))),
    )
    stops = tuple(stop for stop in handed.stops if stop not in left.stops)
    licences = tuple(text for text in handed.licences if text not in left.licences)
    return replace(handed, stops=stops, licences=licences), left


def _is_writable(**fields: Any) -> bool:
    try:
        modelfile_text(Modelfile("x", **fields))
    except ModelfileError:
        return False
    return True


@dataclass(frozen=True)
class WrittenModelfiles(HandOverFacts):
    """`modelfile` is None where there is only the Jinja one, for the `reason`."""

    left_out: LeftOut
    modelfile: str | None
    reason: str | None


def write_modelfiles(
    out: Path, *, file: str, handed: HandOver, adapter: str | None = None
) -> WrittenModelfiles:
    """Write Modelfile.jinja, and Modelfile where a Go TEMPLATE was proved, into `out`.

    `file` and `adapter` are names in the directory where they will lie. What the two cannot hold is named in
    a comment of both and in the facts, as `left_out`.
    """
    written, left = without_unwritable(handed)
    facts = vars(handed.facts())
    remark = f"# {left}\n" if left else ""
    if left:
        report.warning(f"Modelfile: {left}")
    beside = f"./{adapter}" if adapter else None
    jinja = remark + modelfile_text(written.modelfile("jinja", f"./{file}", adapter=beside))
    (out / MODELFILE_JINJA).write_text(jinja, encoding="utf-8")
    if handed.compiled.go is None:
        reason = f"no Go TEMPLATE says what the chat template does: {handed.compiled.reason}"
        return WrittenModelfiles(**facts, left_out=left, modelfile=None, reason=reason)
    go = remark + modelfile_text(written.modelfile("go", f"./{file}", adapter=beside))
    (out / MODELFILE).write_text(go, encoding="utf-8")
    return WrittenModelfiles(**facts, left_out=left, modelfile=MODELFILE, reason=None)


def read_modelfile(path: Path, left_out: LeftOut | None = None) -> Modelfile:
    """A Modelfile that `write_modelfiles` wrote, with what its facts say was `left_out` put back."""
    return (left_out or LeftOut()).put_back(parse_modelfile(path.read_text(encoding="utf-8")))
