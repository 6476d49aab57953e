"""A checkpoint without its weights: the configuration, the tokenizer that was trained with, its template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from forge import report
from forge.adapter.tokenizer import copy_tokenizer
from forge.adapter.vocabulary import Fitted
from forge.chat.template import ChatTemplate, Message
from forge.export.tokenizer import repair_tokenizer
from forge.model.config import configuration_of, read_json, with_own_head, with_vocabulary
from forge.model.tokenizer_files import read_tokenizer

_OWN_ROWS = 100


def describe(
    base: Path,
    tokenizer: Path,
    chat_template: str | None,
    out: Path,
    fitted: Fitted | None = None,
    *,
    rows: int | None = None,
    sampling: Mapping[str, int | float] | None = None,
) -> None:
    """Write everything of a checkpoint but its weights into `out`.

    `tokenizer` is the directory whose tokenizer counts; `chat_template` the pinned text; `fitted` the adapter
    on this base, whose embedding may be another; `rows` those of the embedding, where it has not its own;
    `sampling` stands over what the base's generation_config.json says.
    """
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    rows = fitted.rows if fitted and fitted.rows is not None else rows
    if rows is not None:
        described = with_vocabulary(described, rows)
    if fitted and fitted.own_head:
        described = with_own_head(described)
    described.pop("auto_map", None)
    # LLaMA's early files say -1 for no PAD, which the converter takes for a token.
    for name in [name for name, value in described.items() if name.endswith("_token_id") and value == -1]:
        del described[name]
    if "n_positions" in described:
        # GPT-2's converter reads `n_ctx`, which transformers no longer writes.
        described.setdefault("n_ctx", described["n_positions"])
    if described.get("multi_query") and not described.get("new_decoder_architecture"):
        # Falcon-7B's file says 71, transformers takes one, and the converter believes the file.
        described["num_kv_heads"] = 1
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(base, out)
    if tokenizer != base:
        copy_tokenizer(tokenizer, out)
    _drop(out / "tokenizer_config.json", "auto_map")
    if described.get("model_type") == "phi3" and (out / "tokenizer.json").is_file():
        # Phi-4's converter knows a vocabulary of bytes by this name, which transformers 5 no longer writes.
        model = read_json(out / "tokenizer.json").get("model") or {}
        if not model.get("byte_fallback") and (out / "tokenizer_config.json").is_file():
            change_fields(out / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    for note in repair_tokenizer(out, configuration_of(described).vocabulary_size):
        report.warning(note)
    if sampling:
        _sample(out / "generation_config.json", sampling)
    if chat_template is not None:
        # Only the pinned template: an older file beside it might be preferred.
        (out / "chat_template.json").unlink(missing_ok=True)
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        _drop(out / "tokenizer_config.json", "chat_template")
    elif (out / "tokenizer.json").is_file():
        _leave_out_named(out)


def change_fields(path: Path, **fields: object) -> None:
    """Set fields of a JSON file."""
    changed = {**(read_json(path) if path.is_file() else {}), **fields}
    path.write_text(json.dumps(changed, indent=2, ensure_ascii=False), encoding="utf-8")


def _sample(path: Path, sampling: Mapping[str, int | float]) -> None:
    """Write it where transformers and the converter look for it."""
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    samples = sampling.get("temperature", stated.get("temperature", 1.0)) > 0
    fields = {**stated, "do_sample": samples, **sampling}
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _leave_out_named(out: Path) -> None:
    """Templates with names and no default one: a server would take any of them for plain chats."""
    files = read_tokenizer(out)
    if files.templates and files.chat_template is None:
        report.warning(
            f"the chat templates are named {', '.join(sorted(files.templates))} and none is the default: the "
            "GGUF carries none, and servers fall back to ChatML; base.chat_template chooses one in a recipe"
        )
        _drop(out / "tokenizer_config.json", "chat_template")
        _drop(out / "chat_template.json", "chat_template")


def _drop(path: Path, name: str) -> None:
    """Remove a field of a JSON file, where there is such a file and field.

    `auto_map` above all: the converters ask transformers for tokenizers with `trust_remote_code=True`.
    """
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if fields.pop(name, None) is not None:
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")


def template_in(directory: Path) -> ChatTemplate | None:
    """The chat template of the tokenizer in `directory`, if it has one."""
    files = read_tokenizer(directory)
    if files.chat_template is None:
        return None
    return ChatTemplate(files.chat_template, files.template_tokens)


def own_conversations(data: Path | None) -> list[list[Message]]:
    """The first conversations of each file of prepared rows in the directory `data`."""
    talks: list[list[Message]] = []
    for path in sorted(data.glob("*.jsonl")) if data else ():
        with path.open(encoding="utf-8") as stream:
            rows = [json.loads(line)["messages"] for line in islice(stream, _OWN_ROWS)]
            talks += [messages for messages in rows if messages]  # a plain text has none
    return talks
