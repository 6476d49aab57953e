"""The licence of a base: its short name from the model card, else from the licence file.

Not covered: legal advice. A licence is named, and one that clearly forbids commercial use is
warned about before money is spent; what a licence means is for its reader.
"""

from __future__ import annotations

import re
from pathlib import Path

from forge.errors import DataError

# First lines that name a licence without a model card: marker in the text -> short name.
_KNOWN_TEXTS = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "llama 3.3 community": "llama3.3",
    "llama 3.2 community": "llama3.2",
    "llama 3.1 community": "llama3.1",
    "llama 3 community": "llama3",
    "llama 2 community": "llama2",
    "attribution-noncommercial": "cc-by-nc-4.0",
}

# What the licences of these families ask everybody to say who passes on what was made from them.
_NOTICES = {
    r"llama([\d.]+)": "Built with Llama. Llama {0} is licensed under the Llama {0} Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    r"gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms.",
}
_WITHOUT_DERIVATIVES = re.compile(r"(^|[-_ ])nd($|[-_ ])|no-?derivatives", re.IGNORECASE)

_CONDITIONAL = ("llama", "gemma", "openrail", "bigscience", "falcon", "other")


def read_licence(directory: Path) -> str | None:
    """The licence's short name (such as `apache-2.0`), the file's first line, or None if unnamed."""
    card = directory / "README.md"
    named = licence_in_card(_text(card)) if card.is_file() else None
    if named:
        return named
    for path in sorted(directory.glob("LICENSE*")) + sorted(directory.glob("LICENCE*")):
        text = _text(path)
        lowered = text[:2000].lower()
        for marker, name in _KNOWN_TEXTS.items():
            if marker in lowered:
                return name
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        if first:
            return first[:80]
    return None


def licence_in_card(card: str) -> str | None:
    """`license`, or `license_name` where that is `other`, from the front matter of a model card."""
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    if not front:
        return None
    fields = dict(
        re.findall(r"^(license(?:_name)?):[ \t]*(?:\n[ \t]*-[ \t]*)?(\S.*?)[ \t]*$", front[1], re.M)
    )
    named = fields.get("license", "").strip("'\"[] ")
    if named == "other":
        named = fields.get("license_name", "other").strip("'\"[] ")
    return named or None


def licence_warning(licence: str | None) -> str | None:
    """What to know before training on a base with this licence, or None if it is plainly permissive."""
    if licence is None:
        return "the base names no licence: check that you may use it; forge push asks you for one"
    lowered = licence.lower()
    if _WITHOUT_DERIVATIVES.search(licence):
        return f"licence {licence}: nothing that is made from this base may be published"
    if re.search(r"(^|[-_ ])nc($|[-_ ])|non-?commercial|research", lowered):
        return f"licence {licence}: commercial use is not allowed, nor of anything made from this base"
    if lowered.startswith(_CONDITIONAL):
        return f"licence {licence}: it sets conditions of its own; read it before you publish or sell"
    return None


def refuse_publishing(licence: str | None, name: str) -> None:
    """Raise `DataError` where a base of this licence gives no right to publish a model called `name`."""
    hint = "--licence names the one under which you may publish it, where you know better"
    if licence is None:
        raise DataError("the base names no licence, so nothing says that it may be passed on", hint=hint)
    if _WITHOUT_DERIVATIVES.search(licence):
        raise DataError(f"licence {licence}: nothing that is made from the base may be published", hint=hint)
    if re.match(r"llama[34]", licence, re.IGNORECASE) and not name.lower().startswith("llama"):
        raise DataError(
            f"licence {licence}: the name of a model that is made from the base must begin with Llama",
            hint=f"such as --to ORG/Llama-{name}",
        )


def notice(licence: str) -> str:
    """What the licence asks to be said of a model that is passed on; empty where nothing is known."""
    for pattern, words in _NOTICES.items():
        if match := re.fullmatch(pattern, licence, re.IGNORECASE):
            return words.format(*match.groups())
    return ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
