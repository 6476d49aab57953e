"""The tokenizer that a model was trained with, and one with another chat template than its own.

Its files are copied into a directory that lives as long as this process, so whatever reads a tokenizer
reads one directory; adapter and run get their copies of it like any other.
"""

from __future__ import annotations

import atexit
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge import report
from forge.adapter.tokenizer import copy_tokenizer
from forge.errors import DataError, RecipeError
from forge.model.tokenizer_files import TokenizerFiles, open_tokenizer, read_tokenizer, read_vocabulary
from forge.tools.scratch import make


def trained_tokenizer(
    base: Path, adapter: Path | None, *, max_positions: int | None = None
) -> TokenizerFiles:
    """The adapter's own tokenizer, where it carries one (D12), else the base's.

    One without a chat template, but of the base's vocabulary, takes the base's templates: transformers
    keeps a template in a file of its own, which is easily not copied along. Raises as `read_tokenizer`.
    """
    if adapter is None or not (adapter / "tokenizer.json").is_file():
        return read_tokenizer(base, max_positions=max_positions)
    own = read_tokenizer(adapter, max_positions=max_positions)
    if own.templates or not (base / "tokenizer.json").is_file():
        return own
    known = read_tokenizer(base, max_positions=max_positions)
    if not known.templates:
        return own
    if read_vocabulary(adapter) != read_vocabulary(base):
        report.warning(
            f"{adapter} has a tokenizer without a chat template, and its vocabulary is not that of {base}, "
            "which has one: if the adapter was trained with that, copy it beside the adapter's tokenizer"
        )
        return own
    report.info(
        f"{adapter} has a tokenizer without a chat template, and the base's vocabulary: taking the base's"
    )
    if known.chat_template is None:
        return replace(own, templates=known.templates)  # a recipe chooses among them by name
    return read_tokenizer(with_template(adapter, known.chat_template), max_positions=max_positions)


def template_text(asked: str, relative_to: Path, own: Mapping[str, str]) -> str:
    """The chat template that a recipe asks for.

    It is one of the tokenizer's own named templates (`own`), a shipped one by its name, a file, or the
    template itself. Raises `RecipeError` for a name or file that is not there.
    """
    # Here, for an export of files starts without the recipe's schema.
    from forge.recipe.starters import directory_of_starters

    if "{{" in asked or "{%" in asked:
        return asked
    if asked in own:
        return own[asked]
    shipped = {path.stem: path for path in (directory_of_starters().parent / "chat").glob("*.jinja")}
    path = shipped.get(asked) or relative_to / Path(asked).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        named = f"; the base's own are {', '.join(sorted(own))}" if own else ""
        raise RecipeError(
            f"base.chat_template: {asked}: neither a shipped template nor a file that can be read",
            hint=f"shipped are {', '.join(sorted(shipped))}{named}; or give the Jinja text itself",
        ) from error


def with_template(source: Path, template: str) -> Path:
    """A directory with the tokenizer's files of `source` and `template`, removed when this process ends."""
    directory = _copy(source)
    (directory / "chat_template.json").unlink(missing_ok=True)
    fields = _fields(directory / "tokenizer_config.json")
    kept = {name: value for name, value in fields.items() if name != "chat_template"}
    _write(directory / "tokenizer_config.json", kept)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def with_tokens(source: Path, added: Sequence[str], pad: str | None) -> Path:
    """A directory with the tokenizer's files of `source`, the tokens `added` and another PAD.

    Removed when this process ends. Raises `RecipeError` for tokens that the tokenizer has, or a PAD that it
    lacks.
    """
    tokenizer, known = open_tokenizer(source), read_vocabulary(source)
    if there := [token for token in added if token in known]:
        raise RecipeError(
            f"base.tokens.add: the tokenizer has {', '.join(there)} already", hint="leave out what is there"
        )
    if pad is not None and pad not in known and pad not in added:
        raise RecipeError(
            f"base.tokens.pad: the tokenizer has no {pad}",
            hint=f"any token will do, padding carries no loss; or add it: base.tokens.add: [{pad!r}]",
        )
    tokenizer.add_special_tokens(list(added))
    ids = {token: tokenizer.token_to_id(token) for token in added}
    directory = _copy(source)
    stated = _fields(directory / "tokenizer.json")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"id": number, "content": token, **flags} for token, number in ids.items()]
    together = [*(stated.get("added_tokens") or []), *entries]
    _write(directory / "tokenizer.json", {**stated, "added_tokens": together})
    configuration = {**_fields(directory / "tokenizer_config.json")}
    if entries and isinstance(decoder := configuration.get("added_tokens_decoder"), dict):
        new = {str(number): {"content": token, **flags} for token, number in ids.items()}
        configuration["added_tokens_decoder"] = {**decoder, **new}
    if pad is not None:
        configuration["pad_token"] = pad
        if (older := _fields(directory / "special_tokens_map.json")).get("pad_token") is not None:
            _write(directory / "special_tokens_map.json", {**older, "pad_token": pad})
    _write(directory / "tokenizer_config.json", configuration)
    again = open_tokenizer(directory)
    if wrong := [token for token, number in ids.items() if again.token_to_id(token) != number]:
        raise DataError(
            f"base.tokens.add: {', '.join(wrong)} would get another id when the tokenizer is read again",
            hint="its vocabulary has gaps; take a chat template of tokens that the base has, such as alpaca",
        )
    return directory


def _copy(source: Path) -> Path:
    directory = make("tokenizer")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    copy_tokenizer(source, directory)
    return directory


def _fields(path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")
