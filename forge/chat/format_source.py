"""Where a chat template is read from: a model's directory, a GGUF file, or a `.jinja` file.

Of several named templates the default one is taken, and the others are named.

Not covered: hub ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from forge import report
from forge.chat.format_check import unseen_bos
from forge.chat.template import ChatTemplate
from forge.errors import DataError
from forge.files import small_text
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import read_tokenizer

_HINT = "ChatML is a common choice for models without one; name it in the base's chat_template.jinja"


@dataclass(frozen=True)
class TemplateSource:
    """A template, and whether the tokenizer behind it writes BOS by itself."""

    template: ChatTemplate
    add_bos: bool


def read_source(path: Path, *, bos: str | None = None, eos: str | None = None) -> TemplateSource:
    """Read the template at `path`; `bos` and `eos` replace what the files say.

    Raises `DataError`: nothing there, no template, or one that reads a special token nobody names.
    """
    add_bos: bool | None
    if path.is_dir():
        text, tokens, add_bos = _of_directory(path)
    elif path.suffix == ".gguf":
        text, tokens, add_bos = _of_gguf(path)
    else:
        text, tokens, add_bos = _of_file(path), {}, None
    named = {"bos_token": bos, "eos_token": eos}
    tokens |= {name: token for name, token in named.items() if token is not None}
    template = ChatTemplate(text, tokens)
    missing = [name for name in ("bos_token", "eos_token") if name in text and name not in tokens]
    if missing and path.suffix == ".jinja":
        raise DataError(
            f"{path}: the template writes {' and '.join(missing)}, which a .jinja file does not say",
            hint="give them: --bos '<s>' --eos '</s>' (an empty text for none)",
        )
    if add_bos is None:
        # A file says nothing of its tokenizer: one BOS, as the template has it, is what is right.
        add_bos = not unseen_bos(template, add_bos=True)
    return TemplateSource(template, add_bos)


def _of_directory(path: Path) -> tuple[str, dict[str, str], bool]:
    tokenizer = read_tokenizer(path)
    others = ", ".join(sorted(name for name in tokenizer.templates if name != "default"))
    if tokenizer.chat_template is None and others:
        raise DataError(
            f"{path}: none of its templates is the default: {others}",
            hint="put the one that is meant into chat_template.jinja beside the tokenizer",
        )
    if others:
        report.info(f"{path} also has the templates {others}: the default one is taken")
    if tokenizer.chat_template is None:
        raise DataError(f"{path}: the tokenizer has no chat template", hint=_HINT)
    return tokenizer.chat_template, tokenizer.template_tokens, tokenizer.add_bos


def _of_gguf(path: Path) -> tuple[str, dict[str, str], bool]:
    header = read_gguf(path)
    if header.chat_template is None:
        raise DataError(f"{path}: the GGUF has no chat template", hint=_HINT)
    vocabulary = header.array("tokenizer.ggml.tokens")
    tokens = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos")):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < len(vocabulary):
            tokens[name] = str(vocabulary[number])
    return header.chat_template, tokens, header.adds_bos


def _of_file(path: Path) -> str:
    try:
        return small_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}", hint="give a model's directory, a .jinja or a .gguf file"
        ) from error
