"""What a recipe may say: the sections, their defaults and what each field means.

The models are frozen, refuse unknown keys and never guess a type (`"8"` is not a number). A field's
`description` is its documentation: `document.py` makes the README's table from it. Checks that
need two sections, another file or the recipe's lines are in `checks.py` and `load.py`.

Not covered: whether a base exists on the hub, what a data file holds, whether it fits in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from forge.recipe.model import Message as Message
from forge.recipe.model import Model as Model
from forge.recipe.section import Section as Section
from forge.recipe.training import Lora as Lora
from forge.recipe.training import Train as Train
from forge.recipe.words import (
    DATA_FORMATS,
    AboveZero,
    DataFormat,
    Evaluation,
    Host,
    Name,
    Names,
    Nothing,
    NotNegativeInteger,
    Pattern,
    Place,
    Positive,
    Quant,
    Seed,
    Text,
    UpTo,
    split_revision,
)


class Tokens(Section):
    """Tokens that the base's tokenizer lacks; their rows are trained with the adapter."""

    add: Names = Field((), description="tokens of their own, such as `<|im_start|>`")
    pad: Text | None = Field(None, description="token to pad with, one of the tokenizer's or of `add`")


class Base(Section):
    """The model to start from; `base: SPEC` is short for `base: {id: SPEC}`."""

    id: Place = Field(
        description="hub id, `id@revision`, a directory, `builtin:tiny` or `builtin:smollm2` (a real "
        "model, with the extra `real`)"
    )
    revision: Place | None = Field(None, description="commit, tag or branch on the hub; pinned at first ship")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the base")
    chat_template: Text | None = Field(
        None,
        description="template in place of the base's: a shipped one by name (`alpaca`, `chatml`), a file, "
        "one that the tokenizer names, or the Jinja text itself",
    )
    tokens: Tokens = Field(Tokens(), description="tokens to add, and what to pad with")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return split_revision({"id": value} if isinstance(value, str) else value, "id")


class Columns(Section):
    """Which columns play which part (`translation.en`: inside of another); others are found by name."""

    prompt: Text | None = Field(None, description="column of the prompt")
    completion: Text | None = Field(None, description="column of the wanted answer")
    system: Text | None = Field(None, description="column of the system prompt")
    input: Text | None = Field(None, description="column of what belongs to the prompt (Alpaca's input)")
    history: Text | None = Field(
        None, description="column of earlier exchanges (`[[question, answer], ...]`)"
    )
    reasoning: Text | None = Field(None, description="column of the thinking before the answer")
    chosen: Text | None = Field(None, description="column of the better answer of a preference pair")
    rejected: Text | None = Field(
        None, description="column of the worse answer, for `train.objective: dpo`, `orpo` and `kto`"
    )
    label: Text | None = Field(
        None, description="column that says whether the answer is good, for `train.objective: kto`"
    )
    tools: Text | None = Field(None, description="column of the tools that the model may call")
    messages: Text | None = Field(None, description="column of the list of messages")
    text: Text | None = Field(None, description="column of plain text, learned whole (`format: text`)")


class DataSource(Section):
    """One of several sources; what is unset is as `data` has it."""

    source: Place = Field(description="file, directory, pattern, hub id or `id@revision`, or `builtin:yoda`")
    revision: Place | None = Field(None, description="commit, tag or branch of a hub data set")
    split: Text | None = Field(
        None, description="split, or one of its sets (`main/train`); slices such as `train[:10%]` too"
    )
    format: DataFormat | None = Field(None, description="shape of its rows")
    columns: Columns | None = Field(None, description="which columns play which part")
    weight: float = Field(1.0, gt=0, le=1000, description="how often each of its rows is seen in an epoch")

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, value: Any) -> Any:
        return split_revision({"source": value} if isinstance(value, str) else value, "source")


class Data(Section):
    """The rows to learn from; `data: SOURCE` is short for `data: {source: SOURCE}`."""

    source: Annotated[
        Annotated[Place, Tag("one")] | Annotated[tuple[DataSource, ...], Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "one"),
    ] = Field(
        description="file (jsonl, json, csv, parquet, arrow, text; packed too), directory, pattern such as "
        "`rows/*.jsonl`, hub id or `id@revision`, `builtin:yoda`; or a list of sources"
    )
    revision: Place | None = Field(None, description="commit, tag or branch of a hub data set")
    split: Text = Field(
        "train", description="split, or one of its sets (`main/train`); slices such as `train[:10%]` too"
    )
    format: DataFormat = Field(
        "auto",
        description="shape of the rows: " + ", ".join(DATA_FORMATS) + ", or `module:function` of your own; "
        "`auto` reads it off their columns",
    )
    columns: Columns = Field(Columns(), description="which columns play which part")
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        {}, description="who speaks under a name beyond the usual ones: `{bot: assistant}`"
    )
    ignore: Names = Field((), description="columns that are left out of account")
    encoding: Text | None = Field(None, description="of text files; UTF-8, or what the file says, when unset")
    skip_bad_rows: NotNegativeInteger = Field(
        0, description="so many rows that cannot be used may be left out"
    )
    eval: Evaluation = Field(
        0.1,
        description="held-out rows: a share (below 1), a number, a file (or `builtin:`) of their own, or a "
        "split of the directory or hub data set",
    )
    seed: Seed = Field(42, description="seed of the split into training and held-out rows")
    limit: Positive | None = Field(None, description="use at most this many rows; all when unset")
    overlong: Literal["error", "drop", "truncate", "chunk"] = Field(
        "error",
        description="for a row longer than `train.max_length`; `chunk` makes several of a plain text",
    )

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, value: Any) -> Any:
        value = {"source": value} if isinstance(value, str | list | tuple) else value
        if isinstance(value, dict) and isinstance(value.get("source"), list):
            value = {**value, "source": tuple(value["source"])}
        return split_revision(value, "source")

    @model_validator(mode="after")
    def _some_source(self) -> Data:
        if not self.source:
            raise ValueError("source: the list is empty")
        return self

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The sources, each whole: what it leaves unset is as `data` has it."""
        alone = (
            DataSource(source=self.source, revision=self.revision) if isinstance(self.source, str) else None
        )
        return tuple(
            source.model_copy(
                update={
                    "split": source.split or self.split,
                    "format": source.format or self.format,
                    "columns": source.columns or self.columns,
                }
            )
            for source in ((alone,) if alone else self.source)
            if isinstance(source, DataSource)
        )


class Adopted(Section):
    """An adapter that another tool made; nothing is trained."""

    source: Place = Field(alias="from", description="adapter: a directory, hub id or `id@revision`")
    revision: Place | None = Field(None, description="commit, tag or branch on the hub")

    @model_validator(mode="before")
    @classmethod
    def _pinned(cls, value: Any) -> Any:
        return split_revision(value, "source" if isinstance(value, dict) and "source" in value else "from")


class Budget(Section):
    """A loss instead of a type: the smallest type within it is found by trying, from `q8_0` down."""

    max_kl: AboveZero = Field(description="mean KL divergence (nats) from F16 on held-out rows, at most")


def _quant_kind(value: Any) -> str:
    if isinstance(value, Budget | dict):
        return "budget"
    return "types" if isinstance(value, list | tuple) else "type"


class Export(Section):
    """The GGUF file; `export: none` ends with the merged checkpoint, of a base that has no GGUF form."""

    mode: Literal["merged", "adapter", "auto", "none"] = Field(
        "merged",
        description="one model; a quantized base with the adapter beside it; the second where possible; or "
        "the merged checkpoint without a GGUF, for transformers and vLLM",
    )
    quant: Annotated[
        Annotated[Quant, Tag("type")]
        | Annotated[tuple[Quant, ...], Field(min_length=1), Tag("types")]
        | Annotated[Budget, Tag("budget")],
        Discriminator(_quant_kind),
    ] = Field(
        "q4_k_m",
        description="type of the weights, capitals do not matter; a list of them makes a file and a "
        "certificate of each and serves the first; or `{max_kl: LOSS}`",
    )
    imatrix: bool = Field(False, description="round by an importance matrix of the training rows")
    merge_base: Literal["auto", "original", "nf4", "measured"] = Field(
        "auto",
        description="what the adapter is merged into, or lies beside; nf4: the base as QLoRA rounded it; "
        "measured: whichever of the two answers held-out rows better; auto: measured after QLoRA where rows "
        "are held out, else original",
    )
    keep_merged: bool = Field(False, description="keep the merged checkpoint (for vLLM, for other tools)")

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"mode": "none"} if value == "none" else value

    @field_validator("quant")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if isinstance(value, tuple) and len({*value}) < len(value):
            raise ValueError("names a type twice")
        return value

    @property
    def types(self) -> tuple[str, ...]:
        """The types that are named, the one that is served first; none where a budget chooses."""
        if isinstance(self.quant, Budget):
            return ()
        return (self.quant,) if isinstance(self.quant, str) else self.quant

    @property
    def makes_gguf(self) -> bool:
        return self.mode != "none"

    @property
    def max_kl(self) -> float | None:
        """The budget that chooses the type, which is done with an importance matrix."""
        return self.quant.max_kl if isinstance(self.quant, Budget) else None

    @property
    def is_calibrated(self) -> bool:
        return self.imatrix or self.max_kl is not None


class Verify(Section):
    """What must hold before anything is deployed."""

    learned: Literal["required", "warn", "off"] = Field(
        "required", description="the tuned model must do better than the base on held-out rows"
    )
    max_kl: AboveZero | None = Field(
        None, description="mean KL divergence (nats) of the GGUF from fp32 base + adapter, at most"
    )
    min_top1: UpTo | None = Field(None, description="share of positions with the same top token, at least")
    minutes: AboveZero | None = Field(
        None,
        description="compare few positions first, and no more than fit; what is then undecided is reported",
    )
    as_trained: Literal["required", "warn"] = Field(
        "required",
        description="the export must answer held-out rows as well as what QLoRA trained, on the NF4 base",
    )


class Deploy(Section):
    """Where the model is served while the smoke queries run."""

    runtime: Literal["embedded", "llama-server", "container", "ollama", "none"] = Field(
        "embedded", description="what serves it"
    )
    keep: bool = Field(False, description="leave it running after the smoke queries; `forge stop` ends it")
    host: Host = Field("127.0.0.1", description="address to listen on; of `ollama`, where it is")
    without_key: bool = Field(False, description="let others than this machine in, where `host` does")
    port: int = Field(0, ge=0, le=65535, description="port; 0: any free one")
    context_tokens: Positive | None = Field(
        None, description="context of each request; the base's when unset"
    )
    parallel: Positive | None = Field(None, description="requests served at once; chosen when unset")
    threads: Positive | None = Field(None, description="CPU threads; the physical cores when unset")
    gpu_layers: int | None = Field(None, ge=-1, le=2**31 - 1, description="layers on the GPU; -1: all")


class ExpectedCall(Section):
    """A call of a tool."""

    name: Text = Field(description="the function's name")
    arguments: dict[Text, Any] | None = Field(
        None, description="its arguments, whole; any JSON object when unset"
    )


class SmokeQuery(Section):
    """A question that the served model is asked at temperature 0."""

    prompt: Text | None = Field(None, description="the user's message; either this or `messages`")
    messages: tuple[Message, ...] | None = Field(None, description="a conversation that ends with the user")
    system: Text | None = Field(None, description="system prompt, beside `prompt`")
    expect: Pattern | None = Field(None, description="regular expression that the answer must hold")
    tools: tuple[dict[str, Any], ...] = Field(
        (), description="functions that the model may call, as JSON schemas"
    )
    expect_call: ExpectedCall | None = Field(None, description="call that the answer must make")
    max_tokens: Positive = Field(256, description="longest answer, in tokens")

    @model_validator(mode="after")
    def _one_question(self) -> SmokeQuery:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either prompt or messages")
        if self.messages is not None and self.system is not None:
            raise ValueError("put the system prompt into messages, or use prompt")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("messages must end with the user's turn")
        if self.expect_call is not None and not self.tools:
            raise ValueError("expect_call needs tools: the functions that the model may call")
        return self


def _training_kind(value: Any) -> str:
    if value is None or value == "none":
        return "none"
    adopted = isinstance(value, Adopted) or (isinstance(value, dict) and {"from", "source"} & value.keys())
    return "adopted" if adopted else "training"


Training = Annotated[
    Annotated[Train, Tag("training")] | Annotated[Adopted, Tag("adopted")] | Annotated[Nothing, Tag("none")],
    Discriminator(_training_kind),
]


class Recipe(Section):
    """Everything that a ship needs to know."""

    name: Name = Field(description="name of the run and of its files: letters, digits, `.`, `_`, `-`")
    base: Base = Field(description="the model to start from")
    data: Data | None = Field(None, description="the rows to learn from; needed when something is trained")
    train: Training = Field(
        Train(), description="a training run; `{from: ADAPTER}` adopts one; `none` ships the base"
    )
    model: Model = Field(Model(), description="how the model meets people")
    export: Export = Field(Export(), description="the GGUF file")
    verify: Verify = Field(Verify(), description="what must hold before anything is deployed")
    deploy: Deploy = Field(Deploy(), description="where the model is served")
    smoke: tuple[SmokeQuery, ...] = Field((), description="questions that the served model is asked")

    def as_json(self) -> Mapping[str, object]:
        """The recipe as plain JSON values under the names of the file; `from_json` reads it back."""
        return self.model_dump(mode="json", by_alias=True)


def recipe_from_json(values: Mapping[str, object]) -> Recipe:
    """The inverse of `Recipe.as_json`, for a recipe that was valid when it was written."""
    return Recipe.model_validate_json(json.dumps(values))
