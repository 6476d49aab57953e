"""What is asked of the certificate's worker, and what it measured: the types on both sides of the pipe.

`codec` reads and writes them as JSON. What follows from a measurement, the certificate, is in `verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

FIGURES = ("nmse", "kl_mean", "kl_max", "top1")
PLUS_ONE = "plus one"
"""The layout of a norm to which one was added."""
TRANSPOSED = "transposed"


@dataclass(frozen=True)
class Positions:
    """Where logits are compared: `indices` of each of the numbered `rows`."""

    rows: tuple[int, ...]
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class VerifyRequest:
    """Compare `gguf` with `base` and `adapter`.

    `chat_template` is as trained, its variables written in; `rows` JSONL of input_ids, labels and messages;
    `scratch` a directory for large temporary files. `lora`: the adapter's GGUF beside that of its base;
    `merged`: a merged checkpoint; `importance`: the matrix that the file was rounded by; `f16`: llama.cpp's
    own conversion, where it is there already. `trained_in_4bit`: the adapter saw the base in NF4.
    `max_kl` and `min_top1` are the limits to be decided; after `minutes` no more positions are added.
    `positions`: exactly those of an earlier measurement, else they are drawn. `goes_on`: `scratch` is of
    this request only, and what a stopped measurement finished there is taken. `shared`: a directory of what
    is the same for files of any type that are made of this base and adapter and compared on these rows.
    """

    base: Path
    gguf: Path
    tokenizer: Path
    chat_template: str | None
    rows: Path
    converters: Path
    scratch: Path
    adapter: Path | None = None
    lora: Path | None = None
    merged: Path | None = None
    importance: Path | None = None
    f16: Path | None = None
    merge_base: Literal["original", "nf4"] = "original"
    trained_in_4bit: bool = False
    end_of_turn_id: int | None = None
    trust_remote_code: bool = False
    max_kl: float | None = None
    min_top1: float | None = None
    minutes: float | None = None
    positions: Positions | None = None
    goes_on: bool = False
    shared: Path | None = None


@dataclass(frozen=True)
class Stretch:
    """The KL divergence of the positions from `position` on."""

    position: int
    mean: float
    max: float


@dataclass(frozen=True)
class Leg:
    """How far one set of logits is from another; see `compare`.

    `loss_difference` ± `loss_error`: how much worse it knows the answers, in nats a token.
    """

    positions: int
    nmse: float
    nmse_error: float
    nmse_middle: float
    beyond: float
    kl_mean: float
    kl_middle: float
    kl_error: float
    kl_max: float
    top1: float
    perplexity_reference: float
    perplexity: float
    loss_difference: float
    loss_error: float
    kl_by_position: tuple[Stretch, ...] = ()


@dataclass(frozen=True)
class Excess:
    """By how much a file is further off than llama.cpp's own may be, as a share of the power; ± `error`."""

    mean: float
    error: float


@dataclass(frozen=True)
class Lost:
    """The tensor of which its type's rounding loses most: `share` of its norm."""

    tensor: str
    share: float


@dataclass(frozen=True)
class Legs:
    """From the float32 reference to each: the file, what it was made from, and what it is measured by.

    `conversion` is the unquantized file (the GGUF itself, or llama.cpp's own f16) from the reference with
    its weights `rounded` as that file's are (`most_lost`: the tensor that loses most by it); `arithmetic`
    what 16-bit products do to the latter. Of a
    quantized file `file_against_f16` and `vendor` are from llama.cpp's own f16.
    """

    file: Leg
    conversion: Leg
    rounded: Leg | None = None
    arithmetic: Leg | None = None
    most_lost: Lost | None = None
    f16: Leg | None = None
    file_against_f16: Leg | None = None
    vendor: Leg | None = None
    beyond_vendor: float | None = None
    beyond: Excess | None = None
    base: Leg | None = None
    trained: Leg | None = None
    merged: Leg | None = None
    as_merged: Leg | None = None


@dataclass(frozen=True)
class RowFit:
    """A matrix of tokens, row by row: how many were `compared`, how many of them the adapter `trained`.

    `wrong` are the tokens whose rows are not peft's, `wrong_trained` those among them that it trained.
    """

    compared: int
    trained: int
    wrong: tuple[int, ...] = ()
    wrong_trained: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fits:
    """What the weights of a file are: how many times the adapter, and what is left; see `weights`.

    By tensor: `scales` (how many times, and how far that can be off), `shares` (how many times more than in a
    sound file, and its standard error), `rests`, `layouts`, `lost_rows`, `odd_rows` (those that are further
    off than the others), and of those with a row for each token `rows`.
    """

    scale: float | None
    rest: float | None
    rest_nf4: float | None
    rest_beside_nf4: float | None
    adapted: tuple[str, ...] = ()
    touched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lost_rows: Mapping[str, int] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    rests: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, RowFit] = field(default_factory=dict)
    odd_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Worse:
    """A tensor of the type `kind` whose rest is over that of llama.cpp's own of the type `own`."""

    kind: str
    own: str
    rest: float
    usual: float


@dataclass(frozen=True)
class Beside:
    """A quantized file's tensors beside llama.cpp's own: those that are `worse`, and those it lacks.

    `other_types`: the type, and that of llama.cpp's own, where these differ.
    """

    worse: Mapping[str, Worse] = field(default_factory=dict)
    other_types: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class FitsOfFiles:
    """Those of the file, of llama.cpp's own f16, and of its own file of the same type.

    `numbers`: where the file's metadata says another model's shape or rotation than llama.cpp's own;
    `unmatched`: what only one of the two says, which may be what the other takes for granted;
    `padding`: a PAD that is another.
    """

    file: Fits
    f16: Fits | None = None
    vendor: Fits | None = None
    beside: Beside = field(default=Beside(), kw_only=True)
    numbers: tuple[str, ...] = field(default=(), kw_only=True)
    unmatched: tuple[str, ...] = field(default=(), kw_only=True)
    padding: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Unlike:
    """The most frequent type of a file's tensors, where it is not that of llama.cpp's own."""

    tensors: str
    expected: str


@dataclass(frozen=True)
class FileFacts:
    """A GGUF by its header; `type` is what it is held against, `says` its own word."""

    type: str
    says: str | None
    architecture: str
    bytes: int
    tensor_types: Mapping[str, int]
    vocabulary: int | None
    sampling: Mapping[str, int | float | bool | str]
    unlike: Unlike | None = None


@dataclass(frozen=True)
class UnlikeIds:
    """A text of which the file makes other ids, and how they differ."""

    text: str
    difference: str


@dataclass(frozen=True)
class TokenCheck:
    """Texts whose ids were compared; `limits` are what could not be."""

    ok: bool
    compared: int
    different: int = 0
    message: str = ""
    limits: tuple[str, ...] = ()
    examples: tuple[UnlikeIds, ...] = ()


@dataclass(frozen=True)
class PromptCheck:
    """Conversations whose prompts were compared; `reason` why there were none, or not of all."""

    ok: bool
    compared: int
    message: str = ""
    reason: str = ""
    examples: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class StopCheck:
    """Whether llama.cpp stops at the token that ends an answer, and at no word.

    `words`: the tokens of plain text that the file's end ids name.
    """

    ok: bool
    token: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """What `check_vocabulary` compared."""

    tokens: TokenCheck
    prompt: PromptCheck
    stops: StopCheck


@dataclass(frozen=True)
class Drawn:
    """How much was compared: rows of those there are, positions, those of answers.

    In `looks`, each with more positions; `undecided` are the gates too near to their limits to be sure.
    `positions_in` the rows as they were given, drawn by `seed`.
    """

    rows: int
    rows_given: int
    positions: int
    answers: int
    longest: int
    cut_at: int
    seed: int
    positions_in: Positions
    looks: int = 1
    undecided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Greedy:
    """The file's greedy answers, and where the reference would have gone on otherwise."""

    prompts: int
    same: int
    first_difference: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What a server should say after `ids`: its `top` tokens with their log-probabilities.

    `shift`: the KL divergence of what its settings cause by themselves.
    """

    ids: tuple[int, ...]
    top: tuple[tuple[int, float], ...]
    shift: float


@dataclass(frozen=True)
class Item:
    """A file or directory by its digest; `where` it was: a path, or a base's name."""

    where: str
    sha256: str


@dataclass(frozen=True)
class Basis:
    """What was compared, and with what: `items` by the options of `forge verify` that name them.

    `tokenizer` is the digest of its tokenizer.json, `rows` that of the file of rows. `versions` are those of
    the packages and of llama.cpp's converters.
    """

    items: Mapping[str, Item]
    tokenizer: str
    rows: str
    chat_template: str | None
    end_of_turn_id: int | None
    merge_base: Literal["original", "nf4"]
    trained_in_4bit: bool
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Gates:
    """The recipe's own limits; None where it sets none."""

    max_kl: float | None = None
    min_top1: float | None = None
    as_trained: bool = False
    """Whether answers that are worse than on the base as QLoRA had it are a fault."""


@dataclass(frozen=True)
class Measurement:
    """All of it. Nothing here says whether that is good; `basis` is what whoever asked for it adds."""

    file: FileFacts
    experts: int
    merge_base: str
    tokens: TokenCheck
    prompt: PromptCheck
    stops: StopCheck
    sample: Drawn
    legs: Legs
    greedy: Greedy
    live: tuple[Expected, ...]
    weights: FitsOfFiles
    seconds: Mapping[str, float]
    basis: Basis | None = None

    def of(self, basis: Basis) -> Measurement:
        """This measurement with what it is of."""
        return replace(self, basis=basis)


@dataclass(frozen=True)
class Handover:
    """How far what came `after` is from what was `before`.

    `vendor` is llama.cpp's own, of a quantized file.
    """

    before: str
    after: str
    ok: bool
    nmse: float
    kl_mean: float
    kl_max: float
    top1: float
    perplexity: float
    vendor: Leg | None = None
    beyond_vendor: float | None = None

    def plain(self) -> Mapping[str, object]:
        """With the names of the contract."""
        figures = {name: getattr(self, name) for name in FIGURES}
        fields = {"from": self.before, "to": self.after, "ok": self.ok, **figures}
        fields["perplexity"] = self.perplexity
        if self.vendor:
            fields["vendor"] = {name: getattr(self.vendor, name) for name in FIGURES}
            fields["beyond_vendor"] = self.beyond_vendor
        return fields
