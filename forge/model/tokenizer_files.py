"""What a base's tokenizer files say: special tokens, BOS, context, chat templates, end tokens.

Read from JSON only, so that a plan or a Modelfile needs neither transformers nor tokenizers.
Where the files disagree, what transformers does at load time counts.

Not covered: encoding text (`open_tokenizer` gives what does that); slow tokenizers without a
`tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.errors import DataError
from forge.model.config import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# transformers writes 10**30 (VERY_LARGE_INTEGER) for "no limit known"; no real context is so long.
_NO_LIMIT = 10**9

NAMES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a base, as far as its files say.

    `tokens` and `ids` have the keys `bos`, `eos`, `pad`, `unk` (a token that is not set is left out).
    `eos_ids` are all ids that end a reply: those of generation_config.json and the tokenizer's EOS.
    `model_max_length` is in tokens, never more than the model's positions; None if nothing says.
    `chat_template` is the default one; `templates` has all by name. `vocabulary_size` is
    `len(tokenizer)`. `sentencepiece` is the base's `tokenizer.model`, which some converters need.
    """

    directory: Path
    tokens: Mapping[str, str]
    ids: Mapping[str, int]
    eos_ids: tuple[int, ...]
    special_tokens: tuple[str, ...]
    add_bos: bool
    vocabulary_size: int
    model_max_length: int | None
    chat_template: str | None
    templates: Mapping[str, str]
    sentencepiece: Path | None

    @property
    def template_tokens(self) -> dict[str, str]:
        """The special tokens by the names that a chat template has for them, such as `bos_token`."""
        return {f"{name}_token": token for name, token in self.tokens.items()}


def read_tokenizer(directory: Path, *, max_positions: int | None = None) -> TokenizerFiles:
    """Read the tokenizer's files in `directory`.

    `max_positions` is the model's (`Configuration.max_positions`): the tokenizer's own limit is
    often a placeholder or wrong. `add_bos` follows the post-processor of tokenizer.json: transformers
    and `tokenizers` ignore `add_bos_token` beside it. Raises `DataError` when tokenizer.json is
    missing or a file is broken.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise _without_tokenizer_json(directory)
    try:
        return _read(directory, read_json(path), max_positions)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{directory}: the tokenizer's files are not as they should be: {type(error).__name__}: {error}",
            hint="download or copy them again",
        ) from error


def read_vocabulary(directory: Path) -> dict[str, int]:
    """Token -> id, added tokens too; raises as `read_tokenizer`."""
    path = directory / "tokenizer.json"
    try:
        return _vocabulary(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: not a tokenizer: {error}", hint="download or copy it again") from error


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer itself, neither truncating nor padding; raises `DataError` if it is missing or broken."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise _without_tokenizer_json(directory)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower kind
        raise DataError(
            f"{path}: not a tokenizer: {error}",
            hint="download or copy it again; transformers writes it: "
            "AutoTokenizer.from_pretrained(ID).save_pretrained(DIR)",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(directory: Path, tokenizer: Mapping[str, Any], max_positions: int | None) -> TokenizerFiles:
    config = _optional(directory / "tokenizer_config.json")
    tokens = _special_tokens(directory, config)
    vocabulary = _vocabulary(tokenizer)
    ids = {name: vocabulary[token] for name, token in tokens.items() if token in vocabulary}
    added = [entry for entry in tokenizer.get("added_tokens") or [] if entry.get("special")]
    templates = _templates(directory, config)
    model = directory / "tokenizer.model"
    return TokenizerFiles(
        directory=directory,
        tokens=tokens,
        ids=ids,
        eos_ids=_eos_ids(directory, ids),
        special_tokens=tuple(str(entry["content"]) for entry in added),
        add_bos="bos" in tokens and _first_special(tokenizer.get("post_processor")) == tokens["bos"],
        vocabulary_size=max(vocabulary.values(), default=-1) + 1,
        model_max_length=_max_length(config, max_positions),
        chat_template=templates.get("default"),
        templates=templates,
        sentencepiece=model if model.is_file() else None,
    )


def _without_tokenizer_json(directory: Path) -> DataError:
    resave = "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) with transformers writes it"
    if (directory / "tokenizer.model").is_file():
        return DataError(
            f"{directory}: only a SentencePiece tokenizer.model is there; tokenizer.json is needed",
            hint=resave,
        )
    if (directory / "vocab.json").is_file() or (directory / "merges.txt").is_file():
        return DataError(
            f"{directory}: only vocab.json and merges.txt are there; tokenizer.json is needed", hint=resave
        )
    own = (
        "tekken.json",
        "*.tiktoken",
        "tiktoken.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.txt",
    )
    if others := [path.name for pattern in own for path in directory.glob(pattern)]:
        return DataError(
            f"{directory}: only {others[0]} is there; tokenizer.json is needed",
            hint=f"copy tokenizer.json from the model's other copies on the hub, or: {resave}",
        )
    return DataError(
        f"{directory}: no tokenizer: tokenizer.json is missing",
        hint="the directory of a base holds config.json, the tokenizer's files and the weights",
    )


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: object) -> str | None:
    """A special token is written as a string or as an AddedToken's dictionary."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    older = _optional(directory / "special_tokens_map.json")
    tokens = {}
    for name in NAMES:
        field = f"{name}_token"
        stated = config[field] if field in config else older.get(field)
        token = _content(stated)
        if token is not None:
            tokens[name] = token
        elif stated is not None:
            raise DataError(
                f"{directory / 'tokenizer_config.json'}: {field} must be a token's text (got {stated!r})",
                hint="compare it with the one on the hub",
            )
    return tokens


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the model and of the added tokens, which win."""
    model = tokenizer.get("model") or {}
    listed = model.get("vocab") or {}
    if isinstance(listed, list):  # Unigram: [[token, score], ...], the id is the place.
        vocabulary = {str(pair[0]): number for number, pair in enumerate(listed)}
    else:
        vocabulary = {str(token): int(number) for token, number in listed.items()}
    for entry in tokenizer.get("added_tokens") or []:
        vocabulary[str(entry["content"])] = int(entry["id"])
    return vocabulary


def _first_special(processor: object) -> str | None:
    """The token that a TemplateProcessing puts before a single text, looked for inside a Sequence too."""
    match processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
        case {"type": "Sequence", "processors": list(inner)}:
            return next((token for token in map(_first_special, inner) if token), None)
    return None


def _max_length(config: Mapping[str, Any], max_positions: int | None) -> int | None:
    length = config.get("model_max_length")
    limits = [
        limit for limit in (length, max_positions) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT
    ]
    return int(min(limits)) if limits else None


def _eos_ids(directory: Path, ids: Mapping[str, int]) -> tuple[int, ...]:
    eos = _optional(directory / "generation_config.json").get("eos_token_id")
    listed = eos if isinstance(eos, list) else [eos]
    numbers = [number for number in [*listed, ids.get("eos")] if isinstance(number, int) and number >= 0]
    return tuple(dict.fromkeys(numbers))


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All templates by name. Where files of today's form are, transformers ignores the older keys."""
    templates = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    today = directory / "chat_template.jinja"
    if today.is_file():
        templates["default"] = today.read_text(encoding="utf-8")
    if templates:
        return templates
    template = config.get("chat_template") or _optional(directory / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    return {str(name): str(text) for name, text in template.items()} if isinstance(template, dict) else {}
