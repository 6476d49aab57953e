"""A tokenizer with another chat template than its own, for a base that was never taught to chat.

Its files are copied into a directory that lives as long as this process, so whatever reads a tokenizer
reads one directory; adapter and run get their copies of it like any other.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from forge.adapter.tokenizer import copy_tokenizer
from forge.errors import RecipeError
from forge.recipe.starters import directory_of_starters


def template_text(asked: str, relative_to: Path, own: Mapping[str, str]) -> str:
    """The chat template that a recipe asks for.

    It is one of the tokenizer's own named templates (`own`), a shipped one by its name, a file, or the
    template itself. Raises `RecipeError` for a name or file that is not there.
    """
    if "{{" in asked or "{%" in asked:
        return asked
    if asked in own:
        return own[asked]
    shipped = {path.stem: path for path in (directory_of_starters().parent / "chat").glob("*.jinja")}
    path = shipped.get(asked) or relative_to / Path(asked).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        named = f"; the base's own are {', '.join(sorted(own))}" if own else ""
        raise RecipeError(
            f"base.chat_template: {asked}: neither a shipped template nor a file that can be read",
            hint=f"shipped are {', '.join(sorted(shipped))}{named}; or give the Jinja text itself",
        ) from error


def with_template(source: Path, template: str) -> Path:
    """A directory with the tokenizer's files of `source` and `template`, removed when this process ends."""
    directory = Path(tempfile.mkdtemp(prefix="forge-tokenizer-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    copy_tokenizer(source, directory)
    (directory / "chat_template.json").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    fields.pop("chat_template", None)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory
